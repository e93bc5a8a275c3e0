"""Runs that are killed, stopped, finished or diverge; and what they leave."""

import dataclasses
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import rich.console

from experiments import compare, runs
from experiments.checkpoints import Store
from experiments.compare import train_and_evaluate
from experiments.errors import StoppedError, StorageError
from experiments.metrics import read_log
from experiments.preemption import Stopper
from experiments.train import Hooks


def quiet():
    return rich.console.Console(file=io.StringIO(), width=120)


def scores(workdir):
    return json.loads((workdir / "results.json").read_text())["rows"]


def logged(workdir):
    """All events but the speed, and those that tell of the interruption itself."""
    events = read_log(workdir / "metrics.jsonl").events
    return sorted(
        json.dumps({k: v for k, v in e.items() if k != "examples_per_second"})
        for e in events
        if e["event"] != "resumed"
    )


def final_arrays(workdir):
    """Every array of every run's final checkpoint, by run and path, and its sum."""
    found = {}
    for directory in sorted((workdir / "runs").iterdir()):
        with Store(directory / "checkpoints", keep=2) as store:
            step = store.latest()
            record = store._opened.restore(step)["record"]
        found[directory.name] = step, record["crc32"]
    return found


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """An uninterrupted fine-tuning job: 5 arms, one seed."""
    config = dataclasses.replace(
        tiny_model,
        protocol="fine_tune",
        control_lr=0.01,
        seeds=1,
        workdir=tmp_path_factory.mktemp("whole") / "run",
        checkpoint_every=5,
        log_every=2,
    )
    train_and_evaluate(config, quiet())
    return config


def test_runs_of_a_fine_tuning_job(whole):
    # 3 steps an epoch: the baseline has 4 epochs, its children 3 more.
    steps = {name: step for name, (step, _) in final_arrays(whole.workdir).items()}
    assert steps == {
        "converged-seed0": 12,
        "swa-seed0": 9,
        "control-seed0": 9,
        "sgd5-seed0": 15,
        "sgd7-seed0": 21,
    }
    rows = {row["label"]: row for row in scores(whole.workdir)}
    assert rows["SWA, 3 more epochs"]["loss"] != rows["SGD, 4 epochs"]["loss"]


def test_children_start_from_the_converged_weights(whole, monkeypatch):
    starts = {}

    def recording(config, compiled, seed, split, hooks, *, start, resume):
        starts[compiled.arm.name] = start
        raise FloatingPointError("far enough")

    monkeypatch.setattr(runs, "train", recording)
    for arm in ("swa", "control"):
        directory = whole.workdir / "runs" / f"{arm}-seed0"
        moved = directory.rename(directory.with_name(f"{arm}-moved"))
        try:
            with pytest.raises(FloatingPointError):
                train_and_evaluate(whole, quiet())
        finally:
            subprocess.run(["rm", "-rf", str(directory)], check=True)
            moved.rename(directory)
    with Store(whole.workdir / "runs/converged-seed0/checkpoints", 2) as store:
        expected = store._opened.restore(12)["state"]["params/Dense_0/kernel"]
    for start in starts.values():
        kernel = start.params["Dense_0"]["kernel"]
        np.testing.assert_array_equal(kernel, expected)


def test_finished_job_shows_its_results_again(whole, monkeypatch):
    def no_data(*args):
        raise AssertionError("a finished job needs no data")

    monkeypatch.setattr(compare.data, "load_splits", no_data)
    before = (whole.workdir / "results.json").read_bytes()
    console = quiet()
    train_and_evaluate(whole, console)
    shown = console.file.getvalue()
    assert "holds a finished job" in shown
    assert "SWA, 3 more epochs" in shown
    assert (whole.workdir / "results.json").read_bytes() == before


def test_changed_settings_are_an_error_and_lose_nothing(whole):
    before = final_arrays(whole.workdir)
    with pytest.raises(StorageError, match=r"swa_lr was 0\.05, now 0\.1"):
        train_and_evaluate(dataclasses.replace(whole, swa_lr=0.1), quiet())
    assert final_arrays(whole.workdir) == before


def test_seeds_are_added_to_finished_ones(tiny, monkeypatch):
    one = dataclasses.replace(tiny, seeds=1)
    train_and_evaluate(one, quiet())
    before = scores(one.workdir)
    trained = []
    real = runs.train

    def recording(config, compiled, seed, *args, **kwargs):
        trained.append((compiled.arm.name, seed))
        return real(config, compiled, seed, *args, **kwargs)

    monkeypatch.setattr(runs, "train", recording)
    train_and_evaluate(tiny, quiet())
    assert trained == [("sgd", 1), ("swa1", 1), ("swa3", 1)]
    for old, new in zip(before, scores(one.workdir), strict=True):
        assert new["loss"][:1] == old["loss"]
        assert len(new["loss"]) == 2


class StopAt(Stopper):
    """Asks to stop after a number of steps of the whole job."""

    def __init__(self, step):
        super().__init__()
        self._left = step

    def requested(self):
        self._left -= 1
        return self._left == 0


# Mid-epoch in the first epoch; at an epoch's end; in the averaging; at a checkpoint;
# at the last step of a run; in the control.
@pytest.mark.parametrize("step", [2, 6, 17, 12 + 5, 12 + 9, 12 + 9 + 4])
def test_stopped_job_resumes_bit_for_bit(whole, tmp_path, step, monkeypatch):
    config = dataclasses.replace(whole, workdir=tmp_path / "run")
    original = compare.stop_on_sigterm

    class Once:
        def __init__(self):
            self.stopper = StopAt(step)

        def __enter__(self):
            return self.stopper

        def __exit__(self, *exception):
            return None

    monkeypatch.setattr(compare, "stop_on_sigterm", Once)
    with pytest.raises(
        StoppedError, match=r"stopped at step \d+ of \d+ in run .*saved"
    ):
        train_and_evaluate(config, quiet())
    monkeypatch.setattr(compare, "stop_on_sigterm", original)
    train_and_evaluate(config, quiet())
    assert final_arrays(config.workdir) == final_arrays(whole.workdir)
    assert scores(config.workdir) == scores(whole.workdir)
    assert logged(config.workdir) == logged(whole.workdir)


def command(config, **environment):
    """The job as a real process."""
    script = (
        "import pickle, sys, rich.console, experiments.__main__ as m;"
        "config = pickle.load(open(sys.argv[1], 'rb'));"
        "m.tyro.extras.overridable_config_cli = lambda *a, **k: config;"
        "sys.exit(m.main([]))"
    )
    path = config.workdir.parent / "config.pickle"
    import pickle

    path.write_bytes(pickle.dumps(config))
    return subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def steps_logged(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"event": "step"') if path.exists() else 0


def test_killed_job_resumes_bit_for_bit(whole, tmp_path):
    """SIGKILL at random moments, until the job gets through."""
    config = dataclasses.replace(whole, workdir=tmp_path / "run")
    total = steps_logged(whole.workdir)
    kills = [random.randrange(1, total) for _ in range(3)]
    for moment in sorted(kills):
        with command(config) as process:
            # Waits for progress, not for time: a slow machine is killed alike.
            while process.poll() is None and steps_logged(config.workdir) < moment:
                time.sleep(0.005)
            process.kill()
            process.communicate()
    with command(config) as process:
        _, problems = process.communicate(timeout=240)
    assert process.returncode == 0, problems
    assert final_arrays(config.workdir) == final_arrays(whole.workdir)
    assert scores(config.workdir) == scores(whole.workdir), kills
    assert logged(config.workdir) == logged(whole.workdir), kills


def test_sigterm_saves_and_ends_with_143(whole, tmp_path):
    config = dataclasses.replace(
        whole, workdir=tmp_path / "run", checkpoint_every=10**6
    )
    with command(config) as process:
        while process.poll() is None and not steps_logged(config.workdir):
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        _, problems = process.communicate(timeout=240)
    if process.returncode == 0:
        pytest.skip("the job was faster than the signal")
    assert process.returncode == 143, problems
    assert "The same command goes on from there" in problems
    assert "Traceback" not in problems
    saved = [p for p in (config.workdir / "runs").glob("*/checkpoints/*") if p.is_dir()]
    assert saved


def test_divergence_names_the_last_good_checkpoint(tiny, monkeypatch):
    config = dataclasses.replace(tiny, seeds=1, checkpoint_every=2)
    real = runs.train

    def diverging(config, compiled, seed, split, hooks, **kwargs):
        step = compiled.step
        calls = iter(range(1, 1000))

        def poisoned(state, batch):
            state, metrics = step(state, batch)
            if next(calls) == 5:
                metrics = metrics._replace(loss=np.float32(np.nan))
            return state, metrics

        compiled = dataclasses.replace(compiled, step=poisoned)
        return real(config, compiled, seed, split, hooks, **kwargs)

    monkeypatch.setattr(runs, "train", diverging)
    with pytest.raises(
        FloatingPointError,
        match=r"loss is nan at step 5 \(epoch 2 of 4, arm sgd, learning rate 0\.0\d+\)"
        r".* last good checkpoint is step 4, in .*sgd-seed0/checkpoints",
    ):
        train_and_evaluate(config, quiet())
    with Store(config.workdir / "runs/sgd-seed0/checkpoints", 2) as store:
        assert store.latest() == 4


def test_weights_that_are_not_finite_are_not_saved(tiny, split):
    from experiments import plans
    from experiments.train import compile_arm, train

    arm = compile_arm(tiny, plans.make_arms(tiny)[0], split)

    def poisoned(state, batch):
        state, metrics = arm.step(state, batch)
        params = {**state.params, "Dense_0": {"kernel": np.float32(np.inf)}}
        return state._replace(params=params), metrics

    class Saving(Hooks):
        def saves_after(self, step):
            return step == 1

        def on_snapshot(self, snapshot):
            raise AssertionError("saved")

    with pytest.raises(FloatingPointError, match="a weight is not finite at step 1"):
        train(tiny, dataclasses.replace(arm, step=poisoned), 0, split, Saving())


def test_paths(tiny):
    found = runs.run_directory(tiny, "swa", 3)
    assert found == pathlib.Path(tiny.workdir) / "runs" / "swa-seed3"
