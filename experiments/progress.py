"""A progress bar over all training runs of a job; plain lines without a terminal."""

import contextlib
import time
from collections.abc import Iterator

import rich.console
import rich.progress
import rich.table

_REDRAW_SECONDS = 0.1  # of the bar
_LINE_SECONDS = 10.0  # between plain lines
_SPEED_WINDOW = 30.0  # seconds behind the speed shown


class Bar:
    """Counts training steps over all runs, and shows the latest run's numbers."""

    def __init__(
        self,
        console: rich.console.Console,
        total_steps: int,
        batch_size: int,
        progress: rich.progress.Progress | None,
    ) -> None:
        self._console, self._progress = console, progress
        self._total, self._batch_size = total_steps, batch_size
        self._task = None
        if progress is not None:
            self._task = progress.add_task("starting", total=total_steps, status="")
        self._done_before = 0  # steps of runs that are over
        self._label, self._epochs, self._steps_per_epoch = "", 0, 1
        self._shown = 0.0
        self._marks: list[tuple[float, int]] = []  # time, step: of this run, recent

    def start_run(
        self, label: str, epochs: int, steps_per_epoch: int, first_step: int = 0
    ) -> None:
        """Begin a run, named `label`, of which `first_step` steps are done already."""
        self._label, self._epochs = label, epochs
        self._steps_per_epoch = steps_per_epoch
        self._marks = []
        if self._progress is None and first_step:
            self._print(f"{label}: goes on after step {first_step}")

    def finish_run(self) -> None:
        """Count the run as complete, even where it stopped early."""
        self.skip_run(self._label, self._epochs * self._steps_per_epoch)

    def skip_run(self, label: str, steps: int) -> None:
        """Count a run of `steps` steps as complete."""
        self._done_before += steps
        if self._progress is None:
            self._print(f"{label}: finished")
        elif self._task is not None:
            self._progress.update(self._task, completed=self._done_before)

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Show a step of the current run."""
        now = time.monotonic()
        pause = _LINE_SECONDS if self._progress is None else _REDRAW_SECONDS
        if now - self._shown < pause:
            return
        self._shown = now
        self._marks.append((now, step))
        while len(self._marks) > 2 and now - self._marks[1][0] > _SPEED_WINDOW:
            del self._marks[0]
        done = self._done_before + step
        status = self._status(step, done, loss, learning_rate)
        if self._progress is None:
            self._print(f"{self._label}: {status}")
        elif self._task is not None:
            self._progress.update(
                self._task, completed=done, description=self._label, status=status
            )

    def _status(self, step: int, done: int, loss: float, learning_rate: float) -> str:
        epoch = -(-step // self._steps_per_epoch)
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        steps_per_second = (last - first) / (end - start) if end > start else 0.0
        parts = [
            f"epoch {epoch}/{self._epochs}",
            f"loss {loss:.3f}",
            f"lr {learning_rate:.3g}",
        ]
        if steps_per_second:
            parts.append(f"{steps_per_second * self._batch_size:,.0f} examples/s")
            parts.append(f"{_duration((self._total - done) / steps_per_second)} left")
        return "  ".join(parts)

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


@contextlib.contextmanager
def progress_bar(
    console: rich.console.Console, total_steps: int, batch_size: int
) -> Iterator[Bar]:
    """Show the progress of `total_steps` training steps, over all runs of a job.

    Args:
        console: A terminal gets a bar; a file or a pipe gets a line now and then.
        total_steps: Runs that are skipped count too.
        batch_size: Examples in a step.
    """
    if not console.is_terminal:
        yield Bar(console, total_steps, batch_size, None)
        return
    unbroken = rich.table.Column(no_wrap=True)
    columns = (
        rich.progress.TextColumn("{task.description}", table_column=unbroken),
        rich.progress.BarColumn(bar_width=None),  # takes the width that is left
        rich.progress.TextColumn("{task.fields[status]}", table_column=unbroken),
    )
    with rich.progress.Progress(*columns, console=console, expand=True) as progress:
        yield Bar(console, total_steps, batch_size, progress)
