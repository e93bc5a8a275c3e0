"""A progress bar over all training runs of a job."""

import contextlib
import time
from collections.abc import Iterator

import rich.console
import rich.progress
import rich.table
import rich.text


class _Speed(rich.progress.ProgressColumn):
    """Examples per second, from rich's own estimate of steps per second."""

    def render(self, task: rich.progress.Task) -> rich.text.Text:
        if task.speed is None:
            return rich.text.Text("")
        speed = task.speed * task.fields["batch_size"]
        return rich.text.Text(f"{speed:,.0f} examples/s")


def _text(template: str) -> rich.progress.TextColumn:
    return rich.progress.TextColumn(
        template, table_column=rich.table.Column(no_wrap=True)
    )


class Bar:
    """Counts training steps over all runs, and shows the latest run's numbers."""

    def __init__(
        self, progress: rich.progress.Progress, task: rich.progress.TaskID
    ) -> None:
        self._progress, self._task = progress, task
        self._done_before = 0  # steps of finished runs
        self._label = ""
        self._epochs, self._steps_per_epoch = 0, 1
        self._drawn = 0.0

    def start_run(self, label: str, epochs: int, steps_per_epoch: int) -> None:
        """Begin a run, named `label`."""
        self._label, self._epochs = label, epochs
        self._steps_per_epoch = steps_per_epoch

    def finish_run(self) -> None:
        """Count the run as complete, even where it stopped early."""
        self._done_before += self._epochs * self._steps_per_epoch
        self._progress.update(self._task, completed=self._done_before)

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Show a step of the current run."""
        now = time.monotonic()
        if now - self._drawn < 0.1:  # the terminal is redrawn ten times a second
            return
        self._drawn = now
        epoch = -(-step // self._steps_per_epoch)
        self._progress.update(
            self._task,
            completed=self._done_before + step,
            description=self._label,
            status=f"epoch {epoch}/{self._epochs} loss {loss:.3f}"
            f" lr {learning_rate:.3f}",
        )


@contextlib.contextmanager
def progress_bar(
    console: rich.console.Console, total_steps: int, batch_size: int
) -> Iterator[Bar]:
    """Show a progress bar for `total_steps` training steps."""
    columns = (
        _text("{task.description}"),
        rich.progress.BarColumn(bar_width=None),  # takes the width that is left
        _text("{task.fields[status]}"),
        _Speed(table_column=rich.table.Column(no_wrap=True)),
        rich.progress.TimeRemainingColumn(),
    )
    with rich.progress.Progress(*columns, console=console, expand=True) as progress:
        task = progress.add_task(
            "starting", total=total_steps, status="", batch_size=batch_size
        )
        yield Bar(progress, task)
