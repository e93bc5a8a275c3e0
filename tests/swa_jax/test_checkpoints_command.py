"""Which checkpoints ``python -m swa_jax average`` takes, and what it leaves behind."""

import json
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import swa_jax
from swa_jax import __main__ as command

from .transformations import bits


def run(*arguments) -> int:
    return command.main(["average", *map(str, arguments)])


def save(path: pathlib.Path, value: float, **metrics: float) -> pathlib.Path:
    path.parent.mkdir(exist_ok=True)
    safetensors.numpy.save_file({"w": np.full(2, value, np.float32)}, path)
    if metrics:
        path.with_suffix(".json").write_text(json.dumps(metrics))
    return path


def value(path: pathlib.Path) -> float:
    return safetensors.numpy.load_file(path)["w"][0].item()


ACCURACIES = {1: 0.5, 2: 0.9, 10: 0.7, 11: 0.9, 12: 0.1}


@pytest.fixture
def scored(tmp_path):
    """A directory of checkpoints, each of the value of its step."""
    folder = tmp_path / "run"
    for step, accuracy in ACCURACIES.items():
        save(folder / f"step_{step}.safetensors", step, acc=accuracy, loss=-accuracy)
    (folder / "notes.txt").write_text("")
    return folder


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--best 1 --metric acc", [11]),  # of equals the latest
        ("--best 3 --metric acc", [2, 10, 11]),
        ("--best 2 --metric acc --smallest", [1, 12]),
        ("--best 3 --metric loss --smallest", [2, 10, 11]),
        ("--last 2", [11, 12]),
    ],
)
def test_chosen(scored, tmp_path, options, expected, capsys):
    out = tmp_path / "out.safetensors"
    assert run(out, scored, *options.split()) == 0
    assert value(out) == pytest.approx(np.mean(expected), rel=1e-6)
    said = capsys.readouterr().out
    names = [name.rstrip(",\n") for name in said.split() if "step_" in name]
    assert [pathlib.Path(name).name for name in names] == [
        f"step_{step}.safetensors" for step in expected
    ]


def test_the_oldest_comes_first_for_a_decay(scored, tmp_path):
    out = tmp_path / "out.safetensors"
    options = ["--best", "3", "--metric", "acc", "--decay", "linear"]
    assert run(out, scored, *options) == 0
    weights = swa_jax.decay_weights("linear", 3)
    assert value(out) == pytest.approx(np.average([2, 10, 11], weights=weights))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("gone", r"step_10.safetensors: has no metrics, .* in \S*step_10.json"),
        ('{"loss": 1}', "step_10.json: has no metric 'acc'; it has loss"),
        ('{"acc": NaN}', "step_10.json: the metric 'acc' is NaN"),
        ('{"acc": "high"}', "step_10.json: no JSON object in which 'acc' is a number"),
        ('{"acc": true}', "step_10.json: no JSON object in which 'acc' is a number"),
        ("[1]", "step_10.json: no JSON object in which 'acc' is a number"),
        ("{", "step_10.json: no JSON object in which 'acc' is a number"),
    ],
)
def test_metrics_that_do_not_tell(scored, tmp_path, change, message, capsys):
    path = scored / "step_10.json"
    path.unlink() if change == "gone" else path.write_text(change)
    out = tmp_path / "out.safetensors"
    assert run(out, scored, "--best", 2, "--metric", "acc") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert re.search(message, said), said
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--best 2", "--best needs --metric as well"),
        ("--metric acc", "--metric needs --best as well"),
        ("--smallest", "--smallest needs --best as well"),
        ("--best 2 --metric acc --last 2", "--last and --best exclude each other"),
        ("--best 9 --metric acc", "--best 9: found 5 checkpoints with a number"),
        ("--best 0 --metric acc", "--best must be at least 1, got 0"),
        ("--weights 1 2 --decay linear", "--weights and --decay exclude each other"),
        ("--posthoc-sigma .1", "--posthoc-sigma needs --sigmas as well"),
        ("--sigmas .1", "--sigmas needs --posthoc-sigma as well"),
        ("--step 3", "--step needs --posthoc-sigma as well"),
        (
            "--posthoc-sigma .1 --sigmas .1 --last 3",
            "--last and --posthoc-sigma exclude each other",
        ),
        (
            "--posthoc-sigma .1 --sigmas .1 --weights 3",
            "--weights and --posthoc-sigma exclude each other",
        ),
        ("--posthoc-sigma .1 --sigmas .1 .2", "--sigmas has 2 numbers for 1 IN"),
        ("--posthoc-sigma .1 --sigmas .2", "all snapshots have sigma_rel=0.2"),
        ("--posthoc-sigma .9 --sigmas .2", "sigma_rel must be"),
    ],
)
def test_options_that_do_not_go_together(scored, tmp_path, options, message, capsys):
    assert run(tmp_path / "out", scored, *options.split()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "out").exists()


def test_posthoc_width_from_stored_averages(tmp_path, capsys):
    stored, rng = [], np.random.default_rng(0)
    for sigma in (0.05, 0.1):
        for step in (100, 200, 300, 400):
            number = rng.normal()
            path = tmp_path / f"ema_{sigma}" / f"at_{step}.safetensors"
            save(path, number)
            params = {"w": np.full(2, number, np.float32)}
            stored.append(swa_jax.Snapshot(step, sigma, params))
    folders = [tmp_path / "ema_0.05", tmp_path / "ema_0.1"]
    options = ["--posthoc-sigma", "0.075", "--sigmas", "0.05", "0.1"]
    for until in (None, 300):
        out = tmp_path / f"out_{until}.safetensors"
        more = () if until is None else ("--step", until)
        assert run(out, *folders, *options, *more) == 0
        stored.sort()
        expected = swa_jax.posthoc_ema(stored, sigma_rel=0.075, step=until or 400)
        assert bits(safetensors.numpy.load_file(out)) == bits(expected)
    assert capsys.readouterr().err == ""
    assert run(tmp_path / "late", *folders, *options, "--step", 500) == 0
    assert "warning: posthoc_ema: the latest snapshot is of" in capsys.readouterr().err


def tree(seed: int) -> dict:
    shared = np.full(3, seed, np.float32)
    return {"embed": shared, "head": shared, "own": np.full(2, seed, np.float32)}


def test_best_of_an_orbax_manager(tmp_path, capsys):
    root = tmp_path / "run"
    # Only so it stores metrics.
    options = ocp.CheckpointManagerOptions(best_fn=lambda metrics: metrics["acc"])
    with ocp.CheckpointManager(root, options=options) as manager:
        for step, accuracy in ACCURACIES.items():
            args = ocp.args.StandardSave(tree(step))
            manager.save(step, args=args, metrics={"acc": accuracy})
        manager.wait_until_finished()
    (root / "13.orbax-checkpoint-tmp-1").mkdir()  # of a write that was killed
    out = tmp_path / "out"
    assert run(out, root, "--best", 3, "--metric", "acc") == 0
    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.restore(out)
    # Also under two names: scripts that add in place count what is shared twice.
    for leaf in found.values():
        np.testing.assert_allclose(leaf, (2 + 10 + 11) / 3, rtol=1e-6)
    assert run(tmp_path / "no", root, "--best", 3, "--metric", "loss") == 2
    said = capsys.readouterr().err
    assert "metrics/metrics: has no metric 'loss'; it has acc" in said


def test_trees_of_orbax_in_a_directory(tmp_path):
    for step in (8, 9, 10):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / "run" / f"weights.{step}", tree(step))
    out = tmp_path / "out"
    assert run(out, tmp_path / "run", "--last", 2) == 0
    with ocp.StandardCheckpointer() as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore(out)["own"], [9.5, 9.5])


def test_directories_with_their_metrics(tmp_path):
    for step, accuracy in ACCURACIES.items():
        folder = tmp_path / "run" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        save(folder / "model.safetensors", step)
        (folder / "metrics.json").write_text(json.dumps({"acc": accuracy}))
    out = tmp_path / "out.safetensors"
    assert run(out, tmp_path / "run", "--best", 2, "--metric", "acc") == 0
    assert value(out) == 6.5


# What is left behind.

SLOW = """
import sys, time
from swa_jax import __main__ as command
import orbax.checkpoint as ocp
def slow(self, path, tree):
    path.mkdir()
    (path / "half").write_text("")
    print("writing", flush=True)
    time.sleep(60)
ocp.Checkpointer.save = slow
exec(compile(open(command.__file__).read(), command.__file__, "exec"))
"""


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_write_of_orbax(tmp_path, number, capsys):
    paths = []
    for i in (1, 2):
        paths.append(tmp_path / str(i))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(paths[-1], tree(i))
    before, out = sorted(tmp_path.iterdir()), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "average", out, *paths],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    # Another command for the same output waits for nobody, and spoils nothing.
    assert run(out, *paths) == 2
    assert "another process is writing it" in capsys.readouterr().err
    process.send_signal(number)
    process.communicate()
    assert process.returncode
    if number == signal.SIGKILL:
        assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / ".out.part"])
    else:
        assert sorted(tmp_path.iterdir()) == before
    # The next run for this output takes away what was left.
    assert run(out, *paths) == 0
    assert sorted(tmp_path.iterdir()) == sorted([*before, out])
    with ocp.StandardCheckpointer() as checkpointer:
        np.testing.assert_array_equal(checkpointer.restore(out)["own"], [1.5, 1.5])
