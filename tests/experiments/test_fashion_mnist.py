import gzip
import struct

import numpy as np
import pytest
import sklearn.datasets

from experiments.config.schema import override
from experiments.data import fashion_mnist
from experiments.data.fashion_mnist import FashionMnist
from experiments.runtime.errors import DataError
from tests.helpers import memory_splits


def idx_bytes(array):
    """The IDX format, written from its description."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write_fashion_mnist(directory, counts):
    """Tiny files with the names of Debian's package; returns their arrays."""
    rng = np.random.default_rng(1)
    arrays = {}
    for prefix, count in counts.items():
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        arrays[prefix] = images, labels
        image_path, label_path = fashion_mnist.idx_files(directory, prefix)
        image_path.write_bytes(gzip.compress(idx_bytes(images)))
        label_path.write_bytes(gzip.compress(idx_bytes(labels)))
    return arrays


def as_sorted_rows(images, labels):
    """Rows in an order that does not depend on the order they came in."""
    rows = np.concatenate([images.reshape(len(images), -1), labels[:, None]], axis=1)
    return rows[np.lexsort(rows.T)]


@pytest.fixture
def idx_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "COUNTS", {"train": 13, "t10k": 4})
    directory = tmp_path / "idx"
    directory.mkdir()
    return directory


def test_digits_splits_hold_every_image_once(tiny):
    config = override(tiny, train_examples=None)
    splits = memory_splits(config.data, ("train", "validation", "test"))
    images, labels = sklearn.datasets.load_digits(return_X_y=True)
    got = as_sorted_rows(
        np.concatenate([split.examples.inputs for split in splits.values()]),
        np.concatenate([split.examples.labels for split in splits.values()]),
    )
    np.testing.assert_array_equal(got, as_sorted_rows(images, labels))
    sizes = {name: split.num_examples for name, split in splits.items()}
    assert sizes == {"train": 896, "validation": 300, "test": 601}


def test_digits_splits_are_stratified(tiny):
    config = override(tiny, train_examples=None)
    splits = memory_splits(config.data, ("train", "validation", "test"))
    _, labels = sklearn.datasets.load_digits(return_X_y=True)
    totals = np.bincount(labels)
    shares = {"train": 1 / 2, "validation": 1 / 6, "test": 1 / 3}
    for name, share in shares.items():
        counts = np.bincount(splits[name].examples.labels, minlength=10)
        # Of every six successive examples of a class a split takes a fixed number,
        # so a remainder of up to five is all that can be off.
        assert np.all(np.abs(counts - share * totals) <= 1.5), name


def test_idx_builder_reads_what_was_written(idx_dir, tmp_path, monkeypatch):
    arrays = write_fashion_mnist(idx_dir, fashion_mnist.COUNTS)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_DIR", idx_dir)
    place = tmp_path / "tfds"
    dataset = FashionMnist(data_dir=place, batch_size=1, eval_batch_size=1)
    builder, splits = dataset.prepare()
    assert splits == {name: name for name in ("train", "validation", "test")}
    every = np.arange(13)
    expected = {
        "train": [a[every % 6 != 5] for a in arrays["train"]],
        "validation": [a[every % 6 == 5] for a in arrays["train"]],
        "test": arrays["t10k"],
    }
    for name, (images, labels) in expected.items():
        rows = list(builder.as_data_source(name))
        got = as_sorted_rows(
            np.stack([row["image"] for row in rows]),
            np.array([row["label"] for row in rows]),
        )
        np.testing.assert_array_equal(got, as_sorted_rows(images, labels), name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip at all", "not a complete gzip file"),
        (gzip.compress(bytes(5000))[:-9], "not a complete gzip file"),
        (gzip.compress(idx_bytes(np.zeros(3, np.uint8))), "starts with bytes 00000801"),
        (gzip.compress(b"\0\0\x08\x03\0\0"), "starts with bytes 00000803"),
        (gzip.compress(b""), "starts with bytes ;"),
        (
            gzip.compress(idx_bytes(np.zeros((2, 3, 3), np.uint8))[:-1]),
            r"holds 17 bytes of data; its header promises 18 for shape \(2, 3, 3\)",
        ),
        (
            gzip.compress(idx_bytes(np.zeros((2, 3, 3), np.uint8)) + b"\0"),
            "holds 19 bytes of data; its header promises 18",
        ),
    ],
    # Compressed bytes carry the time, which would name the tests anew each second.
    ids=[
        "no gzip",
        "cut short",
        "one dimension",
        "no sizes",
        "empty",
        "a byte less",
        "a byte more",
    ],
)
def test_damaged_idx_file_is_an_error(tmp_path, content, message):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        fashion_mnist.read_idx(path, 3)
    assert str(path) in str(caught.value)


def test_wrong_number_of_images_is_an_error(idx_dir):
    write_fashion_mnist(idx_dir, {"train": 12})
    with pytest.raises(DataError, match=r"has shape \(12, 28, 28\).*\(13, 28, 28\)"):
        fashion_mnist.read(idx_dir, "train")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(12, np.uint8), "holds 12 labels up to 0; the 13 images need one"),
        (np.full(13, 10, np.uint8), "holds 13 labels up to 10; the 13 images need"),
    ],
)
def test_wrong_labels_are_an_error(idx_dir, labels, message):
    write_fashion_mnist(idx_dir, {"train": 13})
    _, label_path = fashion_mnist.idx_files(idx_dir, "train")
    label_path.write_bytes(gzip.compress(idx_bytes(labels)))
    with pytest.raises(DataError, match=message):
        fashion_mnist.read(idx_dir, "train")
