import io

import pytest
import rich.console

from experiments import progress


@pytest.fixture
def now(monkeypatch):
    """The time, which the test sets."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_bar_counts_all_runs(now):
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=150)
    with progress.progress_bar(console, total_steps=30, batch_size=8) as bar:
        task = bar._progress.tasks[0]
        bar.skip_run("sgd seed 9", 10)
        bar.start_run("sgd seed 0", epochs=2, steps_per_epoch=5)
        now[0] = 1.0
        bar.step(2, 0.5, 0.05)
        assert task.fields["status"] == "epoch 1/2  loss 0.500  lr 0.05"
        now[0] = 2.0
        bar.step(6, 0.25, 0.05)
        assert task.completed == 16
        assert task.description == "sgd seed 0"
        # Four steps of 8 examples in a second; 14 of 30 steps are left.
        assert task.fields["status"] == (
            "epoch 2/2  loss 0.250  lr 0.05  32 examples/s  0:00:04 left"
        )
        bar.step(7, 0.25, 0.05)  # too soon to redraw
        assert task.completed == 16
        bar.finish_run()
        assert task.completed == 20
        bar.start_run("swa3 seed 0", epochs=2, steps_per_epoch=5, first_step=5)
        now[0] = 3.0
        bar.step(6, 0.5, 0.05)
        assert task.completed == 26
        bar.finish_run()
        assert task.finished
    assert "swa3 seed 0" in console.file.getvalue()


def test_without_a_terminal_there_are_plain_lines(now):
    console = rich.console.Console(file=io.StringIO(), width=40)
    with progress.progress_bar(console, total_steps=300, batch_size=8) as bar:
        bar.skip_run("sgd seed 0", 100)
        bar.start_run("swa3 seed 0", epochs=2, steps_per_epoch=50, first_step=20)
        for step in range(21, 101):
            now[0] += 1.0
            bar.step(step, 1 / step, 0.05)
        bar.finish_run()
    lines = console.file.getvalue().splitlines()
    assert lines[:2] == ["sgd seed 0: finished", "swa3 seed 0: goes on after step 20"]
    assert lines[-1] == "swa3 seed 0: finished"
    # One every ten of the 80 seconds, unbroken however narrow.
    assert len(lines) == 3 + 8
    assert lines[3] == (
        "swa3 seed 0: epoch 1/2  loss 0.025  lr 0.05  8 examples/s  0:02:40 left"
    )


def test_durations():
    assert progress._duration(59.6) == "0:01:00"
    assert progress._duration(3 * 3600 + 25 * 60 + 7) == "3:25:07"
