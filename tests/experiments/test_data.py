import dataclasses
import gzip
import logging
import re

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import builders, data, errors
from experiments.augment import shift_and_flip
from experiments.builders import Examples
from experiments.data import MemorySplit


def numbered(count):
    """Examples whose label tells them apart."""
    labels = np.arange(count, dtype=np.int32)
    images = np.broadcast_to(labels[:, None, None, None], (count, 8, 8, 1))
    return Examples(images.astype(np.uint8), labels)


def test_train_examples_is_a_fixed_prefix(tiny):
    (small,) = data.load_splits(tiny, ("train",)).values()
    more = dataclasses.replace(tiny, train_examples=1050, seeds=1)
    with pytest.raises(data.DataError, match=r"train_examples is 1050; .* has 896"):
        data.load_splits(more, ("train",))
    (larger,) = data.load_splits(
        dataclasses.replace(tiny, train_examples=60), ("train",)
    ).values()
    assert small.examples.inputs.shape == (20, 8, 8, 1)
    assert small.examples.inputs.dtype == np.uint8
    assert small.examples.labels.dtype == np.int32
    np.testing.assert_array_equal(small.examples.inputs, larger.examples.inputs[:20])
    np.testing.assert_array_equal(small.examples.labels, larger.examples.labels[:20])


def test_reading_in_blocks_keeps_the_stored_order(tiny, monkeypatch):
    monkeypatch.setattr(data, "_READ_BLOCK", 7)  # 20 examples: a ragged last block
    (blocks,) = data.load_splits(tiny, ("train",)).values()
    source = builders.Digits(
        data_dir=tiny.data_dir, file_format="array_record"
    ).as_data_source("train")
    np.testing.assert_array_equal(
        blocks.examples.labels, [source[i]["label"] for i in range(20)]
    )
    np.testing.assert_array_equal(blocks.examples.inputs[19], source[19]["image"])


def test_load_splits_reads_only_what_is_named(tiny):
    assert list(data.load_splits(tiny, ("validation",))) == ["validation"]


def as_bytes(split):
    return [image.tobytes() for image in split.examples.inputs]


def test_training_may_have_the_validation_split_too(tiny):
    held = dataclasses.replace(tiny, train_examples=None)
    names = "train", "validation", "test"
    train, validation, test = data.load_splits(held, names).values()
    everything = dataclasses.replace(held, hold_out=False)
    both = data.load_splits(everything, ("train", "test"))
    assert as_bytes(both["train"]) == as_bytes(train) + as_bytes(validation)
    np.testing.assert_array_equal(
        both["train"].examples.labels,
        np.concatenate([train.examples.labels, validation.examples.labels]),
    )
    assert as_bytes(both["test"]) == as_bytes(test)


def test_tuning_holds_out_all_the_same(tiny):
    held = dataclasses.replace(tiny, train_examples=None)
    tuned = dataclasses.replace(held, hold_out=False, tune=True)
    names = "train", "validation"
    for a, b in zip(
        data.load_splits(held, names).values(),
        data.load_splits(tuned, names).values(),
        strict=True,
    ):
        assert as_bytes(a) == as_bytes(b)


def test_a_limit_counts_both_splits(tiny):
    config = dataclasses.replace(tiny, hold_out=False, train_examples=900)
    (split,) = data.load_splits(config, ("train",)).values()
    assert split.num_examples == 900  # four more than the train split has
    more = dataclasses.replace(config, train_examples=1197)
    with pytest.raises(data.DataError, match=r"train_examples is 1197; .* has 1196"):
        data.load_splits(more, ("train",))


def test_slices_of_one_split_are_put_together(tiny, monkeypatch):
    """As CIFAR's are, whose validation split tfds does not have."""
    slices = {"train": "test[:100]", "validation": "test[100:]", "test": "train"}
    monkeypatch.setattr(data, "OWN_SPLITS", slices)
    config = dataclasses.replace(tiny, train_examples=None)
    train, validation = data.load_splits(config, ("train", "validation")).values()
    assert (train.num_examples, validation.num_examples) == (100, 501)
    both = dataclasses.replace(config, hold_out=False)
    (split,) = data.load_splits(both, ("train",)).values()
    assert as_bytes(split) == as_bytes(train) + as_bytes(validation)


def test_a_split_names_its_source(tiny, split):
    (loaded,) = data.load_splits(tiny, ("test",)).values()
    assert loaded.source == "digits/1.0.0"
    assert split.source == "memory"


@pytest.mark.parametrize(("count", "batch_size"), [(20, 8), (24, 8), (5, 8), (3, 8)])
def test_an_epoch_shows_every_example(count, batch_size):
    order = data.epoch_order(count, batch_size, seed=3, epoch=2)
    steps = -(-count // batch_size)
    assert order.shape == (steps, batch_size)
    shown = np.bincount(order.ravel(), minlength=count)
    # Filling up the last batch repeats examples as evenly as can be.
    assert shown.sum() == steps * batch_size
    assert shown.min() == steps * batch_size // count >= 1
    assert shown.max() - shown.min() <= 1


def test_order_depends_on_seed_and_epoch_only():
    data.epoch_order.cache_clear()
    first = data.epoch_order(50, 8, seed=1, epoch=4)
    data.epoch_order.cache_clear()
    np.testing.assert_array_equal(first, data.epoch_order(50, 8, seed=1, epoch=4))
    assert np.any(first != data.epoch_order(50, 8, seed=2, epoch=4))
    assert np.any(first != data.epoch_order(50, 8, seed=1, epoch=5))


def test_train_batches_follow_the_order(tiny):
    split = MemorySplit(numbered(20), 20)
    batches = list(data.train_batches(split, tiny, seed=7, last_step=12))
    labels = np.stack([batch["labels"] for batch in batches])
    expected = [data.epoch_order(20, 8, seed=7, epoch=epoch) for epoch in range(4)]
    np.testing.assert_array_equal(labels, np.concatenate(expected))
    for batch in batches:
        np.testing.assert_array_equal(batch["inputs"][:, 3, 5, 0], batch["labels"])


def test_augmented_batches_repeat_and_differ(tiny, split):
    config = dataclasses.replace(tiny, max_shift=1, flip=True)
    once, again = (
        list(data.train_batches(split, config, 0, last_step=12)) for _ in range(2)
    )
    plain = list(data.train_batches(split, tiny, 0, last_step=12))
    for batch, repeated, original in zip(once, again, plain, strict=True):
        np.testing.assert_array_equal(batch["inputs"], repeated["inputs"])
        np.testing.assert_array_equal(batch["labels"], original["labels"])
        assert np.any(batch["inputs"] != original["inputs"])


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("augmented", [False, True])
def test_processes_share_every_batch(tiny, split, processes, augmented):
    """Side by side, the shares are one process's batches: no row lost or twice."""
    config = dataclasses.replace(tiny, max_shift=int(augmented), flip=augmented)
    shares = [
        list(
            data.train_batches(
                split, config, 3, data.Share(process, processes), last_step=12
            )
        )
        for process in range(processes)
    ]
    whole = list(data.train_batches(split, config, 3, last_step=12))
    assert {len(share) for share in shares} == {len(whole)}
    for batch, *parts in zip(whole, *shares, strict=True):
        assert {len(part["labels"]) for part in parts} == {8 // processes}
        for name in ("inputs", "labels"):
            together = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(together, batch[name])


def test_a_process_gathers_its_own_rows_only(tiny):
    class Watched(np.ndarray):
        def __getitem__(self, rows):
            gathered.append(np.size(rows))
            return super().__getitem__(rows)

    gathered = []
    images, labels = numbered(20)
    watched = MemorySplit(Examples(images.view(Watched), labels), 20)
    share = data.Share(1, 4)
    for batch in data.train_batches(watched, tiny, 0, share, last_step=12):
        assert len(batch["labels"]) == 2
    assert gathered == [2] * 12


def test_augment_shifts_and_mirrors():
    rng = np.random.default_rng(0)
    image = rng.integers(1, 256, (6, 5), dtype=np.uint8)
    images = np.repeat(image[None, :, :, None], 200, axis=0)
    # Oracle: all 3 x 3 shifts of the image and of its mirror image, by slicing.
    possible = set()
    for source in (image, image[:, ::-1]):
        framed = np.zeros((8, 7), np.uint8)
        framed[1:-1, 1:-1] = source
        for top in range(3):
            for left in range(3):
                possible.add(framed[top : top + 6, left : left + 5].tobytes())
    got = shift_and_flip(images, rng, max_shift=1, flip=True)
    assert got.shape == images.shape
    # 200 draws of 18: each is missed with probability 1e-5.
    assert {one[..., 0].tobytes() for one in got} == possible


def test_eval_batches_count_every_example_once():
    batches = list(data.EvalBatches(MemorySplit(numbered(20), 20), 8))
    assert [batch["mask"].sum() for batch in batches] == [8, 8, 4]
    assert {batch["inputs"].shape for batch in batches} == {(8, 8, 8, 1)}
    seen = np.concatenate([batch["labels"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(seen, np.arange(20))


def test_input_batches_are_ragged_and_complete():
    examples = numbered(20)
    batches = list(data.InputBatches(MemorySplit(examples, 20), 8))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    np.testing.assert_array_equal(np.concatenate(batches), examples.inputs)


@pytest.fixture
def fashion(tiny):
    return dataclasses.replace(
        tiny, dataset="fashion_mnist", pixel_max=255, data_dir=None, train_examples=5
    )


def test_fashion_mnist_without_files_or_network(fashion, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(data, "FASHION_MNIST_DIR", tmp_path / "absent")
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", no_network)
    with pytest.raises(data.DataUnavailableError) as caught:
        data.load_splits(fashion, ("train",))
    message = str(caught.value)
    assert "apt-get install dataset-fashion-mnist" in message
    assert "pip install tensorflow-cpu &&" in message
    assert "tfds build fashion_mnist --file_format=array_record" in message
    assert "--data_dir" not in message
    assert "no route to host" in message


@pytest.mark.parametrize("name", ["cifar10", "imagenet2012"])
def test_commands_name_the_data_directory(tmp_path, monkeypatch, name):
    def no_network(*args, **kwargs):
        logging.getLogger("urllib3.connectionpool").warning("Retrying")
        raise OSError("no route to host")

    seen = []
    handler = logging.Handler()
    handler.emit = seen.append
    logger = logging.getLogger("urllib3.connectionpool")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", no_network)
    place = tmp_path / "my data"
    with pytest.raises(data.DataUnavailableError) as caught:
        data._stock(name, place)
    assert f"tfds build {name} --file_format=array_record --data_dir='{place}'" in str(
        caught.value
    )
    manual = f"archives must lie in {place}/downloads/manual"
    assert (manual in str(caught.value)) == (name == "imagenet2012")
    assert not seen  # ten warnings, one for each retry


class Rows(list):
    """A data source in a list, read in blocks as tfds's are."""

    def __getitems__(self, keys):
        return [self[key] for key in keys]


def test_fashion_mnist_falls_back_on_tfds(fashion, tmp_path, monkeypatch):
    stock = numbered(12)

    def as_data_source(builder, split, **kwargs):
        del kwargs
        assert builder.name == "fashion_mnist"
        rows = zip(*stock, strict=True)
        rows = [{"image": image, "label": int(label)} for image, label in rows]
        return Rows({"train[:50000]": rows[:8], "test": rows[8:]}[split])

    monkeypatch.setattr(data, "FASHION_MNIST_DIR", tmp_path / "absent")
    with tfds.testing.mock_data(as_data_source_fn=as_data_source):
        splits = data.load_splits(fashion, ("train", "test"))
    np.testing.assert_array_equal(splits["train"].examples.inputs, stock.inputs[:5])
    np.testing.assert_array_equal(splits["test"].examples.labels, stock.labels[8:])
    assert splits["test"].examples.labels.dtype == np.int32
    assert re.fullmatch(r"fashion_mnist/[\d.]+", splits["test"].source)


def test_fashion_mnist_prefers_the_installed_files(fashion, tmp_path, monkeypatch):
    made = []

    class Recorder:
        def __init__(self, **kwargs):
            made.append(kwargs["idx_dir"])

        def download_and_prepare(self):
            raise InterruptedError  # far enough

    for prefix in ("train", "t10k"):
        for path in builders.idx_files(tmp_path, prefix):
            path.touch()
    monkeypatch.setattr(data, "FASHION_MNIST_DIR", tmp_path)
    monkeypatch.setattr(builders, "FashionMnistIdx", Recorder)
    with pytest.raises(InterruptedError):
        data.load_splits(fashion, ("train",))
    assert made == [tmp_path]


def test_damaged_fashion_mnist_is_a_data_error(fashion, tmp_path, monkeypatch):
    """It goes through tfds, which wraps some errors in its own."""
    for prefix in ("train", "t10k"):
        for path in builders.idx_files(tmp_path, prefix):
            path.write_bytes(gzip.compress(bytes(100)))
    monkeypatch.setattr(data, "FASHION_MNIST_DIR", tmp_path)
    config = dataclasses.replace(fashion, data_dir=tmp_path / "tfds")
    with pytest.raises(data.DataError, match="an IDX file of unsigned bytes") as caught:
        data.load_splits(config, ("train",))
    # The command line says it in a line.
    assert errors.explanation(caught.value) == str(caught.value)
