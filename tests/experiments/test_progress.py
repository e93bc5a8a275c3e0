import pytest
import rich.console
import rich.progress

from experiments.runtime import progress
from tests.helpers import quiet, told


@pytest.fixture
def now(monkeypatch):
    """The time, which the test sets, for rich as well."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    made = rich.progress.Progress

    def with_clock(*args, **kwargs):
        return made(*args, get_time=lambda: now[0], auto_refresh=False, **kwargs)

    monkeypatch.setattr(progress.rich.progress, "Progress", with_clock)
    return now


def test_bar_counts_all_runs(now):
    console = rich.console.Console(file=quiet().file, force_terminal=True, width=150)
    with progress.progress_bar(console, runs=3, steps=30, batch_size=8) as bar:
        (task,) = bar._progress.tasks
        bar.skip_run("SGD, seed 9", 10)
        bar.start_run("SGD, seed 0", epochs=2, steps_per_epoch=5)
        now[0] = 1.0
        bar.step(2, 0.5, 0.05)
        assert task.fields["status"].startswith("epoch 1/2  batch loss 0.500  lr 0.05")
        now[0] = 2.0
        bar.step(6, 0.25, 0.05)
        assert task.completed == 16
        assert task.description == "run 2 of 3: SGD, seed 0"
        # Four steps of 8 examples in a second; 14 of 30 steps are left.
        assert task.fields["status"] == (
            "epoch 2/2  batch loss 0.250  lr 0.05  32 examples/s"
        )
        assert progress._left(task) == "0:00:04 left"
        bar.step(7, 0.25, 0.05)  # too soon to redraw
        assert task.completed == 16
        bar.finish_run()
        assert task.completed == 20
        bar.start_run("SWA, seed 0", epochs=2, steps_per_epoch=5, first_step=5)
        now[0] = 3.0
        bar.step(6, 0.5, 0.05)
        assert task.completed == 26
        bar.finish_run()
        assert task.finished
    assert "run 3 of 3: SWA, seed 0" in told(console)


def test_without_a_terminal_there_are_plain_lines(now):
    console = quiet(width=40)
    with progress.progress_bar(console, runs=2, steps=300, batch_size=8) as bar:
        bar.skip_run("SGD, seed 0", 100)
        bar.start_run("SWA, seed 0", epochs=2, steps_per_epoch=50, first_step=20)
        for step in range(21, 101):
            now[0] += 1.0
            bar.step(step, 1 / step, 0.05)
        bar.finish_run()
    lines = told(console).splitlines()
    name = "run 2 of 2: SWA, seed 0"
    assert lines[:2] == [
        "run 1 of 2: SGD, seed 0: finished",
        f"{name}: goes on after step 20",
    ]
    assert lines[-1] == f"{name}: finished"
    # One every ten of the 80 seconds, unbroken however narrow.
    assert len(lines) == 3 + 8
    assert lines[3] == (
        f"{name}: epoch 1/2  batch loss 0.032  lr 0.05  8 examples/s  0:02:49 left"
    )


def test_time_that_is_not_known_is_not_shown():
    made = rich.progress.Progress()
    made.add_task("x", total=10)
    (task,) = made.tasks
    assert progress._left(task) == ""
    assert progress._TimeLeft().render(task).plain == ""
