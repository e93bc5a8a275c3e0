"""The log of a job: metrics.jsonl, and the same for TensorBoard.

The first line of metrics.jsonl has the configuration and the arms. A line after it is
one event of a run, which `arm` and `seed` name:

- `step`, every `log_every` steps: step, batch_loss, learning_rate;
- `train`, at the end of an epoch: epoch, step, the mean batch_loss and batch_accuracy
  of its steps, learning_rate, examples_per_second;
- `average`, at the end of an epoch of an arm that averages: epoch, step, num_averaged
  (models in it), distance (between it and the weights);
- `test`, at the end of an epoch: epoch, weights ("iterate" or "average"), accuracy,
  loss;
- `resumed`: step; `finished`.

A run that was killed repeats some events when it goes on; the last of each counts.
Shares of a job that were at work at once have a file each, metrics-1-of-2.jsonl.
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from experiments.runtime.errors import StorageError
from experiments.runtime.workdir import Workdir

Line = dict[str, Any]


class Log:
    """Writes events as they come."""

    def __init__(self, workdir: Workdir, file: TextIO | None) -> None:
        """Append to `file`; None: all writing does nothing."""
        self._workdir, self._file = workdir, file
        self._boards: dict[str, EventFileWriter] = {}

    def write(self, event: str, **values: Any) -> None:
        """Write an event; all but the first name their `arm` and `seed`."""
        if self._file is None:
            return
        print(json.dumps({"event": event, **values}), file=self._file, flush=True)
        if event in ("step", "train", "average", "validation", "test"):
            self._write_scalars(event, dict(values))

    def _write_scalars(self, event: str, values: Line) -> None:
        run = values.pop("arm"), values.pop("seed")
        epoch = values.pop("epoch", None)
        if event in ("validation", "test"):
            # An epoch's test may come before its training means: both end there.
            step, place = epoch, f"{event}/{values.pop('weights')}"
        else:
            step, place = values.pop("step"), event
        name = f"{run[0]}-seed{run[1]}"
        if name not in self._boards:
            directory = self._workdir.tensorboard / name
            self._boards[name] = EventFileWriter(str(directory))
        scalars = [
            Summary.Value(tag=f"{place}/{key}", simple_value=value)
            for key, value in values.items()
        ]
        if event == "train":
            scalars.append(Summary.Value(tag="train/epoch", simple_value=epoch))
        self._boards[name].add_event(
            Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
        )

    def close(self) -> None:
        """Write out what is left."""
        for board in self._boards.values():
            board.close()
        self._boards.clear()


@contextlib.contextmanager
def open_log(workdir: Workdir, header: Line, enabled: bool = True) -> Iterator[Log]:
    """Open metrics.jsonl, to append to it, and TensorBoard's files.

    Args:
        workdir: Where they are.
        header: The first line of a new log. Where a job goes on with another one (more
            seeds, say), it is written once more, and the last one counts.
        enabled: False in all processes of a job but one: writing does nothing.
    """
    if not enabled:
        yield Log(workdir, None)
        return
    known = False
    path = workdir.metrics
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(StorageError):
        before = read_log(path)
        known = before.header == header
    with _complete_lines(path).open("a") as file:
        log = Log(workdir, file)
        if not known:
            log.write("config", **header)
        try:
            yield log
        finally:
            log.close()


def _complete_lines(path: pathlib.Path) -> pathlib.Path:
    """Cut off what a killed process left of a line."""
    if path.exists():
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
    return path


class LoggedArm(NamedTuple):
    """What the log says of an arm."""

    name: str
    label: str
    epochs: int
    first_epoch: int
    parent: str | None
    steps_per_epoch: int
    averages_from: int | None


class ParsedLog(NamedTuple):
    """A log without repetitions."""

    header: Line
    arms: list[LoggedArm]
    events: list[Line]  # in order

    @property
    def config(self) -> Line:
        """The settings, by name."""
        return self.header["config"]

    @property
    def scored_by(self) -> str:
        """What its experiment is scored by: accuracy, or loss."""
        text = self.config.get("dataset") == "shakespeare"  # of an earlier version
        return self.header.get("scored_by", "loss" if text else "accuracy")

    def of(self, event: str, arm: str, seed: int) -> list[Line]:
        """The events of one kind of one run."""
        return [
            line
            for line in self.events
            if (line["event"], line["arm"], line["seed"]) == (event, arm, seed)
        ]


def read_log(path: pathlib.Path) -> ParsedLog:
    """Read metrics.jsonl and those of shares, also while a job writes them.

    Raises:
        StorageError: There is neither, or it is not a job's log.
    """
    shares = sorted(path.parent.glob("metrics-*-of-*.jsonl"))
    if shares and not path.exists():
        path = shares[0]  # the command that brings them together is yet to come
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise StorageError(
            f"{path} cannot be read ({why}); name the --workdir of a job."
        ) from error
    complete = text[: text.rfind("\n") + 1]  # a job may be in the middle of a line
    try:
        first, *lines = map(json.loads, complete.splitlines())
        header, arms = _header(first)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{path} does not begin with a job's configuration; name the --workdir of"
            " a job that has begun to train."
        ) from error
    for share in shares:
        if share != path:
            text = share.read_text()
            events = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
            lines += [line for line in events if line["event"] != "config"]
    last: dict[tuple[Any, ...], Line] = {}
    for line in lines:
        if line["event"] == "config":
            header, arms = _header(line)
            continue
        if line["event"] in ("step", "train"):  # as an earlier version had them
            renamed = {name: f"batch_{name}" for name in ("loss", "accuracy")}
            line = {renamed.get(name, name): value for name, value in line.items()}
        at = line.get("epoch", line.get("step")), line.get("weights")
        key = line["event"], line["arm"], line["seed"], *at
        last.pop(key, None)  # so that it moves to the end
        last[key] = line
    return ParsedLog(header, arms, list(last.values()))


def _header(line: Line) -> tuple[Line, list[LoggedArm]]:
    """What a header says, and its arms, which it must have."""
    header = {name: value for name, value in line.items() if name != "event"}
    header["config"]["name"]
    return header, [LoggedArm(**arm) for arm in header["arms"]]
