"""tensorflow-datasets: its own data sets, and ours in its files, without TensorFlow."""

import contextlib
import fcntl
import functools
import io
import logging
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from experiments.runtime import processes
from experiments.runtime.errors import DataUnavailableError

# By key, which decides where tfds stores a row.
Rows = Iterable[tuple[int, Mapping[str, Any]]]


def directory(data_dir: pathlib.Path | None) -> pathlib.Path:
    """Where prepared data sets live."""
    return data_dir or pathlib.Path.home() / "tensorflow_datasets"


def notice(text: str) -> None:
    """Tell what takes a while, before it does."""
    if processes.is_main():
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _alone(data_dir: pathlib.Path | None) -> Iterator[None]:
    """Wait until no other job on this machine prepares data there: tfds does not."""
    with contextlib.ExitStack() as stack:
        # Prepared data may lie where nobody writes, or on a disk without locks.
        with contextlib.suppress(OSError):
            where = directory(data_dir)
            where.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context((where / ".lock").open("a")), fcntl.LOCK_EX)
        yield


def prepare(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
    """Write a builder's files, unless they are there."""
    tfds.disable_progress_bar()
    # Ten warnings of retries say no more than the error after them.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()):  # tfds announces downloads
        builder.download_and_prepare()
    return builder


def stock(
    name: str, data_dir: pathlib.Path | None, hint: str = "", manual: str = ""
) -> tfds.core.DatasetBuilder:
    """One of tfds's own data sets, prepared here or elsewhere.

    Args:
        name: As tfds has it.
        data_dir: Where prepared data sets live.
        hint: Another way to get it, for the error.
        manual: What must be put where by hand, for the error.

    Raises:
        DataUnavailableError: It is not here and cannot be prepared.
    """
    where = directory(data_dir)
    try:
        with _alone(data_dir):
            builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
            if not builder.is_prepared():  # without a network it takes minutes to fail
                notice(f"downloading {name} to {where}, and preparing it there")
            return prepare(builder)
    except Exception as error:  # tfds raises many kinds: network, TensorFlow, disk
        option = f" --data_dir={shlex.quote(str(data_dir))}" if data_dir else ""
        raise DataUnavailableError(
            f"{name} is not prepared in {where}, and tensorflow-datasets could not"
            f" do it ({type(error).__name__}: {error}). Run{hint}:\n"
            "  pip install tensorflow-cpu &&"
            f" tfds build {name} --file_format=array_record{option}{manual}"
        ) from error


class _Own(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A data set that something else than tfds brought here."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, source: Any, features: Any, **kwargs: Any) -> None:
        """Take the rows of each split from `source`; `kwargs` go to tfds."""
        self._source, self._features = source, features
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(self._features)
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # the data are already here
        return dict(self._source())

    def _generate_examples(self) -> Any:
        raise NotImplementedError  # tfds wants it; the splits have their rows


@functools.cache
def _own_class(name: str) -> type[_Own]:
    return type(name, (_Own,), {"name": name}, skip_registration=True)


def own(
    name: str,
    features: Mapping[str, tuple[tuple[int, ...], Any]],
    source: Callable[[], Mapping[str, Rows]],
    data_dir: pathlib.Path | None,
    variant: str | None = None,
) -> tfds.core.DatasetBuilder:
    """A data set of our own, written to tfds's files once.

    Args:
        name: Of its directory.
        features: Shape and dtype of what a row holds. Stored raw: reading and writing
            them needs no TensorFlow.
        source: Returns the rows of each split; called to write them.
        data_dir: Where prepared data sets live.
        variant: Of several that differ in their settings.
    """
    tensors = {
        key: tfds.features.Tensor(shape=shape, dtype=dtype)
        for key, (shape, dtype) in features.items()
    }
    config = {}
    if variant is not None:
        config["config"] = tfds.core.BuilderConfig(name=variant, version=_Own.VERSION)
    with _alone(data_dir):  # the builder looks for prepared data when it is made
        return prepare(
            _own_class(name)(
                source=source,
                features=tensors,
                data_dir=data_dir,
                file_format="array_record",
                **config,
            )
        )
