import concurrent.futures
import dataclasses
import gzip
import logging
import re
import threading
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments.config.schema import override
from experiments.data import fashion_mnist
from experiments.data import splits as splits_module
from experiments.data import tfds as tfds_module
from experiments.data.augment import Share, shift_and_flip
from experiments.data.batches import EvalBatches, InputBatches, epoch_order
from experiments.data.cifar import Cifar10
from experiments.data.dataset import Examples
from experiments.data.digits import Digits
from experiments.data.fashion_mnist import FashionMnist
from experiments.data.imagenet import ImageNet
from experiments.data.splits import MemorySplit, load_splits
from experiments.runtime import errors
from experiments.runtime.errors import DataError, DataUnavailableError
from tests.helpers import memory_splits, train_batches


def numbered(count):
    """Examples whose label tells them apart."""
    labels = np.arange(count, dtype=np.int32)
    images = np.broadcast_to(labels[:, None, None, None], (count, 8, 8, 1))
    return Examples(images.astype(np.uint8), labels)


def test_train_examples_is_a_fixed_prefix(tiny):
    (small,) = memory_splits(tiny.data, ("train",)).values()
    more = override(tiny, train_examples=1050, seeds=1)
    with pytest.raises(DataError, match=r"train_examples is 1050; .* has 896"):
        load_splits(more.data, ("train",))
    wider = override(tiny, train_examples=60)
    (larger,) = memory_splits(wider.data, ("train",)).values()
    assert small.examples.inputs.shape == (20, 8, 8, 1)
    assert small.examples.inputs.dtype == np.uint8
    assert small.examples.labels.dtype == np.int32
    np.testing.assert_array_equal(small.examples.inputs, larger.examples.inputs[:20])
    np.testing.assert_array_equal(small.examples.labels, larger.examples.labels[:20])


def test_reading_in_blocks_keeps_the_stored_order(tiny, monkeypatch):
    monkeypatch.setattr(
        splits_module, "_READ_BLOCK", 7
    )  # 20 examples: a ragged last block
    (blocks,) = memory_splits(tiny.data, ("train",)).values()
    builder, _ = tiny.data.prepare()
    source = builder.as_data_source("train")
    np.testing.assert_array_equal(
        blocks.examples.labels, [source[i]["label"] for i in range(20)]
    )
    np.testing.assert_array_equal(blocks.examples.inputs[19], source[19]["image"])


def test_load_splits_reads_only_what_is_named(tiny):
    assert list(load_splits(tiny.data, ("validation",))) == ["validation"]


def as_bytes(split):
    return [image.tobytes() for image in split.examples.inputs]


def test_training_may_have_the_validation_split_too(tiny):
    held = override(tiny, train_examples=None)
    names = "train", "validation", "test"
    train, validation, test = memory_splits(held.data, names).values()
    everything = override(held, hold_out=False)
    both = memory_splits(everything.data, ("train", "test"))
    assert as_bytes(both["train"]) == as_bytes(train) + as_bytes(validation)
    np.testing.assert_array_equal(
        both["train"].examples.labels,
        np.concatenate([train.examples.labels, validation.examples.labels]),
    )
    assert as_bytes(both["test"]) == as_bytes(test)


def test_tuning_holds_out_all_the_same(tiny):
    held = override(tiny, train_examples=None)
    tuned = override(held, hold_out=False)
    names = "train", "validation"
    for a, b in zip(
        load_splits(held.data, names).values(),
        load_splits(tuned.data, names, hold_out=True).values(),
        strict=True,
    ):
        assert as_bytes(a) == as_bytes(b)


def test_a_limit_counts_both_splits(tiny):
    config = override(tiny, hold_out=False, train_examples=900)
    (split,) = load_splits(config.data, ("train",)).values()
    assert split.num_examples == 900  # four more than the train split has
    more = override(config, train_examples=1197)
    with pytest.raises(DataError, match=r"train_examples is 1197; .* has 1196"):
        load_splits(more.data, ("train",))


def test_slices_of_one_split_are_put_together(tiny, monkeypatch):
    """As CIFAR's are, whose validation split tfds does not have."""
    slices = {"train": "test[:100]", "validation": "test[100:]", "test": "train"}
    monkeypatch.setattr(Digits, "splits", slices)
    config = override(tiny, train_examples=None)
    train, validation = load_splits(config.data, ("train", "validation")).values()
    assert (train.num_examples, validation.num_examples) == (100, 501)
    both = override(config, hold_out=False)
    (split,) = load_splits(both.data, ("train",)).values()
    assert as_bytes(split) == as_bytes(train) + as_bytes(validation)


def test_a_split_names_its_source(tiny, split):
    (loaded,) = load_splits(tiny.data, ("test",)).values()
    assert loaded.source == "digits/1.0.0"
    assert split.source == "memory"


@pytest.mark.parametrize(("count", "batch_size"), [(20, 8), (24, 8), (5, 8), (3, 8)])
def test_an_epoch_shows_every_example(count, batch_size):
    order = epoch_order(count, batch_size, seed=3, epoch=2)
    steps = -(-count // batch_size)
    assert order.shape == (steps, batch_size)
    shown = np.bincount(order.ravel(), minlength=count)
    # Filling up the last batch repeats examples as evenly as can be.
    assert shown.sum() == steps * batch_size
    assert shown.min() == steps * batch_size // count >= 1
    assert shown.max() - shown.min() <= 1


def test_order_depends_on_seed_and_epoch_only():
    epoch_order.cache_clear()
    first = epoch_order(50, 8, seed=1, epoch=4)
    epoch_order.cache_clear()
    np.testing.assert_array_equal(first, epoch_order(50, 8, seed=1, epoch=4))
    assert np.any(first != epoch_order(50, 8, seed=2, epoch=4))
    assert np.any(first != epoch_order(50, 8, seed=1, epoch=5))


def test_train_batches_follow_the_order(tiny):
    split = MemorySplit(numbered(20))
    batches = list(train_batches(split, tiny, seed=7, last_step=12))
    labels = np.stack([batch["labels"] for batch in batches])
    expected = [epoch_order(20, 8, seed=7, epoch=epoch) for epoch in range(4)]
    np.testing.assert_array_equal(labels, np.concatenate(expected))
    for batch in batches:
        np.testing.assert_array_equal(batch["inputs"][:, 3, 5, 0], batch["labels"])


def test_augmented_batches_repeat_and_differ(tiny, split):
    config = override(tiny, max_shift=1, flip=True)
    once, again = (
        list(train_batches(split, config, 0, last_step=12)) for _ in range(2)
    )
    plain = list(train_batches(split, tiny, 0, last_step=12))
    for batch, repeated, original in zip(once, again, plain, strict=True):
        np.testing.assert_array_equal(batch["inputs"], repeated["inputs"])
        np.testing.assert_array_equal(batch["labels"], original["labels"])
        assert np.any(batch["inputs"] != original["inputs"])


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("augmented", [False, True])
def test_processes_share_every_batch(tiny, split, processes, augmented):
    """Side by side, the shares are one process's batches: no row lost or twice."""
    config = override(tiny, max_shift=int(augmented), flip=augmented)
    shares = [
        list(train_batches(split, config, 3, Share(process, processes), last_step=12))
        for process in range(processes)
    ]
    whole = list(train_batches(split, config, 3, last_step=12))
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

    gathered: list[int] = []
    images, labels = numbered(20)
    watched = MemorySplit(Examples(images.view(Watched), labels))
    share = Share(1, 4)
    for batch in train_batches(watched, tiny, 0, share, last_step=12):
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
    batches = list(EvalBatches(MemorySplit(numbered(20)), 8))
    assert [batch["mask"].sum() for batch in batches] == [8, 8, 4]
    assert {batch["inputs"].shape for batch in batches} == {(8, 8, 8, 1)}
    seen = np.concatenate([batch["labels"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(seen, np.arange(20))


def test_input_batches_are_ragged_and_complete():
    examples = numbered(20)
    batches = list(InputBatches(MemorySplit(examples), 8))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    np.testing.assert_array_equal(np.concatenate(batches), examples.inputs)


@pytest.fixture
def fashion():
    return FashionMnist(train_examples=5, batch_size=8, eval_batch_size=16)


def test_fashion_mnist_without_files_or_network(fashion, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIR", tmp_path / "absent")
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", no_network)
    with pytest.raises(DataUnavailableError) as caught:
        load_splits(fashion, ("train",))
    message = str(caught.value)
    assert "apt-get install dataset-fashion-mnist" in message
    assert "pip install tensorflow-cpu &&" in message
    assert "tfds build fashion_mnist --file_format=array_record" in message
    assert "--data_dir" not in message
    assert "no route to host" in message


@pytest.mark.parametrize(
    ("name", "kind"), [("cifar10", Cifar10), ("imagenet2012", ImageNet)]
)
def test_commands_name_the_data_directory(tmp_path, monkeypatch, capsys, name, kind):
    def no_network(*args, **kwargs):
        logging.getLogger("urllib3.connectionpool").warning("Retrying")
        raise OSError("no route to host")

    seen: list[logging.LogRecord] = []

    class Seeing(logging.Handler):
        def emit(self, record):
            seen.append(record)

    logger = logging.getLogger("urllib3.connectionpool")
    monkeypatch.setattr(logger, "handlers", [Seeing()])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", no_network)
    place = tmp_path / "my data"
    with pytest.raises(DataUnavailableError) as caught:
        kind(data_dir=place, batch_size=1, eval_batch_size=1).prepare()
    shown = capsys.readouterr().err  # before minutes of silence
    assert shown == f"downloading {name} to {place}, and preparing it there\n"
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
        pairs = zip(*stock, strict=True)
        rows = [{"image": image, "label": int(label)} for image, label in pairs]
        return Rows({"train[:50000]": rows[:8], "test": rows[8:]}[split])

    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIR", tmp_path / "absent")
    with tfds.testing.mock_data(as_data_source_fn=as_data_source):
        splits = memory_splits(fashion, ("train", "test"))
    np.testing.assert_array_equal(splits["train"].examples.inputs, stock.inputs[:5])
    np.testing.assert_array_equal(splits["test"].examples.labels, stock.labels[8:])
    assert splits["test"].examples.labels.dtype == np.int32
    assert re.fullmatch(r"fashion_mnist/[\d.]+", splits["test"].source)


def test_fashion_mnist_prefers_the_installed_files(fashion, tmp_path, monkeypatch):
    made = []

    def own(name, features, source, data_dir):
        made.append((name, data_dir))
        raise InterruptedError  # far enough

    for prefix in ("train", "t10k"):
        for path in fashion_mnist.idx_files(tmp_path, prefix):
            path.touch()
    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIR", tmp_path)
    monkeypatch.setattr(tfds_module, "own", own)
    with pytest.raises(InterruptedError):
        load_splits(fashion, ("train",))
    assert made == [("fashion_mnist_idx", None)]


def test_damaged_fashion_mnist_is_a_data_error(fashion, tmp_path, monkeypatch):
    """It goes through tfds, which wraps some errors in its own."""
    for prefix in ("train", "t10k"):
        for path in fashion_mnist.idx_files(tmp_path, prefix):
            path.write_bytes(gzip.compress(bytes(100)))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIR", tmp_path)
    dataset = dataclasses.replace(fashion, data_dir=tmp_path / "tfds")
    with pytest.raises(DataError, match="an IDX file of unsigned bytes") as caught:
        load_splits(dataset, ("train",))
    # The command line says it in a line.
    assert errors.explanation(caught.value) == str(caught.value)


@pytest.mark.parametrize("noisy_validation", [False, True])
def test_label_noise_is_a_fixed_share_of_the_labels(tiny, noisy_validation):
    names = ("train", "validation", "test")
    clean = memory_splits(override(tiny, train_examples=800).data, names)
    config = override(
        tiny, train_examples=800, label_noise=0.4, noisy_validation=noisy_validation
    )
    found, again = (memory_splits(config.data, names) for _ in range(2))
    assert found["train"].source.endswith(", 40% of the labels drawn anew")
    for name in names:
        before, after = clean[name].examples, found[name].examples
        np.testing.assert_array_equal(after.inputs, before.inputs)
        np.testing.assert_array_equal(after.labels, again[name].examples.labels)
        changed = np.mean(after.labels != before.labels)
        if name == "train" or (noisy_validation and name == "validation"):
            # A tenth of those drawn anew is what it was: 0.36, give or take 0.01.
            assert 0.3 < changed < 0.4
            counts = np.bincount(after.labels[after.labels != before.labels])
            assert len(counts) == 10
        else:
            assert changed == 0


def test_noise_in_labels_that_are_read_from_files_is_refused():
    with pytest.raises(ValueError, match=r"label_noise is 0.1; it must be 0"):
        ImageNet(batch_size=2, eval_batch_size=2, label_noise=0.1)
    with pytest.raises(ValueError, match=r"label_noise is 1.0"):
        Digits(batch_size=2, eval_batch_size=2, label_noise=1.0)


def test_validation_examples_is_a_fixed_prefix(tiny):
    whole = memory_splits(tiny.data, ("validation",))["validation"].examples
    few = override(tiny, validation_examples=7).data
    found = memory_splits(few, ("validation",))["validation"].examples
    np.testing.assert_array_equal(found.labels, whole.labels[:7])
    with pytest.raises(ValueError, match="validation_examples is 0"):
        override(tiny, validation_examples=0)
    many = override(tiny, validation_examples=5000).data
    with pytest.raises(DataError, match="validation_examples is 5000; the validation"):
        load_splits(many, ("validation",))


def test_jobs_that_start_at_once_prepare_the_data_once(tmp_path):
    made = []

    def source():
        made.append(threading.get_ident())
        time.sleep(0.2)
        return {"train": ((n, {"x": np.full(2, n)}) for n in range(3))}

    def prepare(_):
        features = {"x": ((2,), np.int64)}
        return tfds_module.own("numbers", features, source, tmp_path)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        builders = list(pool.map(prepare, range(4)))
    assert len(made) == 1
    for builder in builders:
        assert len(builder.as_data_source("train")) == 3
