"""The directory of a job: what its files are called, who may write, and whose it is."""

import contextlib
import fcntl
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

from experiments.runtime import processes
from experiments.runtime.errors import StorageError
from experiments.runtime.files import write_json

Settings = Mapping[str, Any]  # by name, in JSON's types


def changes(before: Settings, now: Settings, free: Set[str]) -> list[str]:
    """The settings in which two jobs differ, apart from `free` ones, in words.

    What only one of two versions of this program knows does not count.
    """
    return [
        f"{name} was {before[name]}, now {now[name]}"
        for name in sorted((before.keys() & now.keys()) - free)
        if before[name] != now[name]
    ]


class Run:
    """The part of a work directory that belongs to one run."""

    def __init__(self, runs: pathlib.Path, arm: str, seed: int) -> None:
        """Of an arm with a seed, under `runs`."""
        self.name = f"{arm}-seed{seed}"
        self.directory = runs / self.name
        self.checkpoints = self.directory / "checkpoints"
        self.finished = self.directory / "finished.json"
        self.snapshots = self.directory / "snapshots"


class Workdir:
    """Owns the names of a job's files."""

    def __init__(self, path: pathlib.Path, share: tuple[int, int] = (1, 1)) -> None:
        """Nothing is made or read yet.

        Args:
            path: The directory.
            share: Which part of the job this one does, of how many that may be at work
                here at once. The first of one does the whole job.
        """
        self.path = path
        self.config = path / "config.json"
        self._part = "" if share[1] == 1 else "-{}-of-{}".format(*share)
        self.metrics = path / f"metrics{self._part}.jsonl"
        self.results = path / "results.json"
        self.markdown = path / "results.md"
        self.curves = path / "curves.png"
        self.width = path / "width.json"
        self.width_figure = path / "width.png"
        self.scores_figure = path / "scores.png"
        self.budgets_figure = path / "budgets.png"
        self.tuning = path / "tuning.json"
        self.tensorboard = path / "tensorboard"
        self.export = path / "export"
        self._runs = path / "runs"

    def run(self, arm: str, seed: int) -> Run:
        """Where a run keeps its checkpoints and its scores."""
        return Run(self._runs, arm, seed)

    @contextlib.contextmanager
    def locked(
        self, settings: Settings | None = None, free: Set[str] = frozenset()
    ) -> Iterator[None]:
        """Take the directory for one job that trains, until the body or process ends.

        Args:
            settings: The job's, "name" among them; kept in config.json. Compared with
                what is there if that job has begun to train: one that failed before,
                for want of data perhaps, leaves the directory free. None: of a tuning,
                whose own file has them.
            free: Names of settings that may change while a job goes on.

        Raises:
            StorageError: Another job is at work there, settings differ, or the
                directory cannot be used.
        """

        def claim() -> None:
            if settings is not None:
                self._claim(settings, free)

        if not self._part:
            with self._lock(".lock", "another job", claim):
                yield
            return
        others = fcntl.LOCK_SH  # other shares may be at work, the whole job may not
        with (
            self._lock(".lock", "the whole job", claim, others),
            self._lock(f".lock{self._part}", "the same share of the job", lambda: None),
        ):
            yield

    @contextlib.contextmanager
    def drawing(self) -> Iterator[None]:
        """Take the figures and the export, which may be made while a job trains.

        Raises:
            StorageError: Another report or export is at work there, or the directory
                cannot be used.
        """
        with self._lock(".drawing.lock", "another report or export", lambda: None):
            yield

    @contextlib.contextmanager
    def _lock(
        self,
        name: str,
        who: str,
        work: Callable[[], None],
        kind: int = fcntl.LOCK_EX,
    ) -> Iterator[None]:
        with contextlib.ExitStack() as stack:

            def take() -> None:
                try:
                    self.path.mkdir(parents=True, exist_ok=True)
                    lock = stack.enter_context((self.path / name).open("a"))
                    fcntl.flock(lock, kind | fcntl.LOCK_NB)
                    work()
                except BlockingIOError:
                    raise StorageError(
                        f"{self.path} is in use by {who}. Wait for it, or give another"
                        " --workdir."
                    ) from None
                except OSError as error:
                    raise self.unwritable(error) from error

            processes.from_main(take)
            yield

    def unwritable(self, error: OSError) -> StorageError:
        """What to raise where the directory cannot be written."""
        return StorageError(
            f"workdir is {self.path}, which cannot be written ({error}). Give another"
            " --workdir, or make room."
        )

    def _claim(self, settings: Settings, free: Set[str]) -> None:
        """Write config.json, unless the one that is there may not be replaced."""
        if self.config.exists():
            before = self.read_settings()
            begun = self.metrics.exists() or self._runs.exists()
            if begun and (changed := changes(before, settings, free)):
                raise StorageError(
                    f"{self.path} holds a job with other settings:"
                    f" {'; '.join(changed)}. Give another --workdir for these, or the"
                    " old settings to go on."
                )
        write_json(self.config, settings)  # free ones may differ

    def read_settings(self) -> dict[str, Any]:
        """What a job wrote to config.json.

        Raises:
            StorageError: There is no such file, or another program wrote it.
        """
        try:
            found = json.loads(self.config.read_text())
            if isinstance(found, dict) and "name" in found:
                return found
            why = "it has no name of an experiment"
        except (OSError, ValueError) as error:
            why = str(error)
        raise StorageError(
            f"{self.config} is not a job's configuration ({why}). Give another"
            " --workdir."
        )
