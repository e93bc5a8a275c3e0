"""A progress bar over all training runs of a job; plain lines without a terminal."""

import contextlib
import datetime
import time
from collections.abc import Iterator

import rich.console
import rich.progress

_REDRAW_SECONDS = 0.1  # of the bar
_LINE_SECONDS = 10.0  # between plain lines


class _TimeLeft(rich.progress.ProgressColumn):
    """Time left, in words, where it is known."""

    def render(self, task: rich.progress.Task) -> rich.progress.Text:
        return rich.progress.Text(_left(task))


def _left(task: rich.progress.Task) -> str:
    if task.time_remaining is None:
        return ""
    return f"{datetime.timedelta(seconds=round(task.time_remaining))} left"


class Bar:
    """Counts runs and steps of a job, and shows the latest run's numbers.

    rich keeps the count, the speed and the time left, in a terminal or not.
    """

    def __init__(
        self,
        console: rich.console.Console,
        progress: rich.progress.Progress,
        runs: int,
        steps: int,
        batch_size: int,
    ) -> None:
        self._console, self._progress = console, progress
        self._live = console.is_terminal
        self._runs, self._run, self._batch_size = runs, 0, batch_size
        self._task = progress.add_task("starting", total=steps, status="")
        self._before = 0  # steps of runs that are over
        self._label, self._epochs, self._steps_per_epoch = "", 0, 1
        self._drawn, self._printed = -_REDRAW_SECONDS, -_LINE_SECONDS

    def start_run(
        self, label: str, epochs: int, steps_per_epoch: int, first_step: int = 0
    ) -> None:
        """Begin a run, named `label`, of which `first_step` steps are done already."""
        self._run += 1
        self._label = f"run {self._run} of {self._runs}: {label}"
        self._epochs, self._steps_per_epoch = epochs, steps_per_epoch
        # A speed over the steps that were skipped would be none.
        self._progress.reset(self._task, completed=self._before + first_step)
        if first_step:
            self._print(f"{self._label}: goes on after step {first_step}")

    def finish_run(self) -> None:
        """Count the run as complete, even where it stopped early."""
        self._finish(self._epochs * self._steps_per_epoch)

    def skip_run(self, label: str, steps: int) -> None:
        """Count a run of `steps` steps as complete."""
        self._run += 1
        self._label = f"run {self._run} of {self._runs}: {label}"
        self._finish(steps)

    def _finish(self, steps: int) -> None:
        self._before += steps
        self._progress.update(self._task, completed=self._before)
        self._print(f"{self._label}: finished")

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Show a step of the current run."""
        now = time.monotonic()
        if now - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn = now
        self._progress.update(self._task, completed=self._before + step)
        if not self._live and now - self._printed < _LINE_SECONDS:
            return
        self._printed = now
        (task,) = self._progress.tasks
        speed = (task.speed or 0) * self._batch_size
        status = (
            f"epoch {-(-step // self._steps_per_epoch)}/{self._epochs}"
            f"  batch loss {loss:.3f}  lr {learning_rate:.3g}"
            + (f"  {speed:,.0f} examples/s" if speed else "")
        )
        self._progress.update(self._task, description=self._label, status=status)
        self._print("  ".join(filter(None, (f"{self._label}: {status}", _left(task)))))

    def _print(self, line: str) -> None:
        if not self._live:
            self._console.print(line, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress_bar(
    console: rich.console.Console, runs: int, steps: int, batch_size: int
) -> Iterator[Bar]:
    """Show the progress of `steps` training steps, over all runs of a job.

    Args:
        console: A terminal gets a bar; a file or a pipe gets a line now and then.
        runs: Those that are skipped count too.
        steps: Of all runs together.
        batch_size: Examples in a step.
    """
    text = rich.progress.TextColumn
    columns = text("{task.description}"), text("{task.fields[status]}"), _TimeLeft()
    bar = rich.progress.BarColumn(bar_width=None)  # takes the width that is left
    progress = rich.progress.Progress(
        *columns[:1], bar, *columns[1:], console=console, expand=True
    )
    with progress if console.is_terminal else contextlib.nullcontext():
        yield Bar(console, progress, runs, steps, batch_size)
