import io
import types

import rich.console

from experiments import progress


def test_bar_counts_all_runs(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=150)
    with progress.progress_bar(console, total_steps=20, batch_size=8) as bar:
        task = bar._progress.tasks[0]
        bar.start_run("sgd seed 0", epochs=2, steps_per_epoch=5)
        now[0] = 1.0
        bar.step(6, 0.25, 0.05)
        assert task.completed == 6
        assert task.description == "sgd seed 0"
        assert task.fields["status"] == "epoch 2/2 loss 0.250 lr 0.050"
        bar.step(7, 0.25, 0.05)  # too soon to redraw
        assert task.completed == 6
        bar.finish_run()
        assert task.completed == 10
        bar.start_run("swa3 seed 0", epochs=2, steps_per_epoch=5)
        now[0] = 2.0
        bar.step(1, 0.5, 0.05)
        assert task.completed == 11
        bar.finish_run()
        assert task.finished
    shown = console.file.getvalue()
    assert "swa3 seed 0" in shown


def test_speed_is_in_examples():
    column = progress._Speed()
    for speed, shown in ((None, ""), (1000.0, "8,000 examples/s")):
        task = types.SimpleNamespace(speed=speed, fields={"batch_size": 8})
        assert column.render(task).plain == shown


def test_bar_fits_a_terminal_of_80_columns():
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress.progress_bar(console, total_steps=20, batch_size=8) as bar:
        bar.start_run("swa10 seed 4", epochs=40, steps_per_epoch=5)
        bar.step(200, 0.001, 0.05)
    shown = console.file.getvalue()
    assert "swa10 seed 4" in shown
    assert "epoch 40/40 loss 0.001 lr 0.050" in shown
