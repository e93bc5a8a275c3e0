"""Runs that are killed, stopped, finished or diverge; and what they leave."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments.config.named import EXPERIMENTS
from experiments.config.schema import override
from experiments.data.dataset import Examples
from experiments.data.splits import MemorySplit
from experiments.jobs import main as compare
from experiments.jobs import run as runs
from experiments.jobs.main import train_and_evaluate
from experiments.runtime.errors import StoppedError, StorageError
from experiments.runtime.metrics import read_log
from experiments.runtime.signals import Stopper
from experiments.runtime.store import Store
from experiments.training.protocols import SideBySide
from tests.helpers import quiet, rows_of, run_job, told


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
def whole(tiny_fine_tune_model, tmp_path_factory):
    """An uninterrupted fine-tuning job: 5 arms, one seed."""
    config = override(
        tiny_fine_tune_model,
        seeds=1,
        workdir=tmp_path_factory.mktemp("whole") / "run",
        checkpoint_every=4,
        log_every=1,
    )
    train_and_evaluate(config, quiet())
    return config


@pytest.mark.slow
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
    rows = {row["label"]: row for row in rows_of(whole.workdir)}
    assert rows["SWA, 3 more epochs"]["loss"] != rows["SGD, 4 epochs"]["loss"]


@pytest.mark.slow
def test_children_start_from_the_converged_weights(whole, monkeypatch):
    starts = {}

    def recording(compiled, seed, hooks, *, start, resume):
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


@pytest.mark.slow
def test_finished_job_shows_its_results_again(whole, monkeypatch):
    def no_data(*args):
        raise AssertionError("a finished job needs no data")

    monkeypatch.setattr(compare, "load_splits", no_data)
    before = (whole.workdir / "results.json").read_bytes()
    console = quiet()
    train_and_evaluate(whole, console)
    shown = told(console)
    assert "holds a finished job. To start anew, delete it" in shown
    assert (whole.workdir / "results.json").read_bytes() == before


@pytest.mark.slow
def test_changed_settings_are_an_error_and_lose_nothing(whole):
    before = final_arrays(whole.workdir)
    with pytest.raises(StorageError, match=r"swa_lr was 0\.05, now 0\.1"):
        train_and_evaluate(override(whole, swa_lr=0.1), quiet())
    assert final_arrays(whole.workdir) == before


@pytest.mark.slow
def test_seeds_are_added_to_finished_ones(tiny, monkeypatch):
    one = override(tiny, seeds=1)
    train_and_evaluate(one, quiet())
    before = rows_of(one.workdir)
    trained = []
    real = runs.train

    def recording(compiled, seed, *args, **kwargs):
        trained.append((compiled.arm.name, seed))
        return real(compiled, seed, *args, **kwargs)

    monkeypatch.setattr(runs, "train", recording)
    train_and_evaluate(tiny, quiet())
    assert trained == [("sgd", 1), ("swa1", 1), ("swa3", 1)]
    for old, new in zip(before, rows_of(one.workdir), strict=True):
        assert new["loss"][:1] == old["loss"]
        assert len(new["loss"]) == 2


class StopAfter(Stopper):
    """Asks to stop after a number of steps."""

    def __init__(self, steps):
        super().__init__()
        self._left = steps

    def poll(self):
        self._left -= 1
        return self._left == 0


def lines(workdir):
    """Every complete line of the log, repetitions too."""
    path = workdir / "metrics.jsonl"
    complete = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in complete.splitlines()]


def steps_of(events):
    return [(e["arm"], e["step"]) for e in events if e["event"] == "step"]


def newest_checkpoints(workdir):
    """Step of the newest complete checkpoint of each run that is not finished.

    Read from the names alone: opening a store tidies up.
    """
    found = {}
    for directory in (workdir / "runs").glob("*"):
        saved = (p.name for p in (directory / "checkpoints").glob("*"))
        steps = [int(name) for name in saved if name.isdigit()]
        if steps and not (directory / "finished.json").exists():
            found[directory.name] = max(steps)
    return found


def assert_resumed(events, expected, why=""):
    """That a life of a job went on from the checkpoints found before it, and no other.

    Otherwise it would train the run again from its start: to the same numbers.
    """
    resumed = [e for e in events if e["event"] == "resumed"]
    found = {f"{e['arm']}-seed{e['seed']}": e["step"] for e in resumed}
    assert found == expected, why
    assert len(resumed) == len(found), why
    for event in resumed:
        again = [step for arm, step in steps_of(events) if arm == event["arm"]]
        assert again[:1] in ([], [event["step"] + 1]), why


@pytest.mark.slow
def test_stopped_job_resumes_bit_for_bit(whole, tmp_path, monkeypatch):
    config = override(whole, workdir=tmp_path / "run")
    before = 0
    expected: dict[str, int] = {}
    # Mid-epoch in the first epoch; at an epoch's end; at a checkpoint, in the
    # averaging; mid-epoch; at the last step of a run; in the control.
    for run, step, steps in [
        ("converged", 2, 2),
        ("converged", 6, 4),
        ("swa", 4, 6 + 4),
        ("swa", 5, 1),
        ("swa", 9, 4),
        ("control", 4, 4),
    ]:
        with monkeypatch.context() as patch:
            stopper = contextlib.nullcontext(StopAfter(steps))
            patch.setattr(compare, "stop_on_signal", lambda stopper=stopper: stopper)
            stopped = rf"stopped at step {step} of \d+ in run {run}-seed0; saved"
            with pytest.raises(StoppedError, match=stopped):
                train_and_evaluate(config, quiet())
        assert_resumed(lines(config.workdir)[before:], expected)
        before, expected = len(lines(config.workdir)), {f"{run}-seed0": step}
        assert newest_checkpoints(config.workdir) == expected
    train_and_evaluate(config, quiet())
    assert_resumed(lines(config.workdir)[before:], expected)
    steps = steps_of(lines(config.workdir))
    assert len(steps) == len(set(steps))  # none is done twice
    assert_same_job(config.workdir, whole.workdir)


def assert_same_job(workdir, expected, why=""):
    assert final_arrays(workdir) == final_arrays(expected), why
    assert rows_of(workdir) == rows_of(expected), why
    assert logged(workdir) == logged(expected), why


# A job as a process, whose steps take a while, so that a slow machine can hit them.
PROGRAM = """
import pickle, signal, sys, time
import experiments.__main__ as main
import experiments.jobs.main as jobs
from experiments.runtime.signals import Stopper

config, splits, seconds = pickle.load(open(sys.argv[1], "rb"))
if splits is not None:
    jobs.load_splits = lambda *args: splits
poll = Stopper.poll

def slowly(stopper):
    time.sleep(seconds)
    return poll(stopper)

Stopper.poll = slowly
main._parse = lambda *args: config
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main.main(["digits"]))
"""


def start(config, splits=None, seconds=0.05):
    path = config.workdir.parent / "job.pickle"
    path.write_bytes(pickle.dumps((config, splits, seconds)))
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, reached):
    """Wait for progress, not for time: a slow machine is interrupted alike."""
    deadline = time.monotonic() + 240
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def small_job(tiny_model):
    """MixUp and shifts, BatchNorm, SGD; averages epochs 2 to 6, and in other ways."""
    config = override(
        tiny_model,
        mixup_alpha=0.3,
        max_shift=1,
        averages=("ema:0.9", "lawa:2", "swag:2"),
        early_stopping=True,
    )
    return config, None


def text_job(tiny_model):
    """A Transformer with dropout, trained by AdamW."""
    tokens = np.random.default_rng(0).integers(0, 256, (20, 9), dtype=np.uint8)
    rows = Examples(tokens[:, :-1], tokens[:, 1:].astype(np.int32))
    split = MemorySplit(rows)
    config = EXPERIMENTS["shakespeare"].config
    protocol = dataclasses.asdict(config.protocol)
    del protocol["control_lr"]
    config = dataclasses.replace(config, protocol=SideBySide(**protocol))
    config = override(
        config,
        context=8,
        layers=1,
        heads=2,
        width=8,
        dropout=0.2,
        batch_size=8,
        eval_batch_size=16,
        width_plot=False,
    )
    assert config.optimizer.optimizer == "adamw"
    return config, {"train": split, "test": split}


@pytest.mark.slow
def test_stopped_early_is_the_epoch_that_validates_best(tiny):
    # It learns wrong labels by heart in the end.
    config = override(
        tiny, early_stopping=True, epochs=12, train_examples=60, label_noise=0.6
    )
    rows = run_job(config)
    stopped = next(row for row in rows if row["label"] == "SGD, stopped early")
    events = lines(config.workdir)
    for seed in range(2):
        of = [e for e in events if e.get("seed") == seed and e.get("arm") == "sgd"]
        validation = [e["accuracy"] for e in of if e["event"] == "validation"]
        assert len(validation) == 12
        assert validation.index(max(validation)) < 11  # or this shows nothing
        path = config.directory.run("sgd", seed).finished
        kept = json.loads(path.read_text())["scores"]["SGD, stopped early"]
        best = validation.index(max(validation))  # the first of the best
        assert (kept["epoch"], kept["validation"]) == (best + 1, validation[best])
        assert stopped["accuracy"][seed] == kept["accuracy"]
        if seed == 0:  # the only one whose every epoch is tested
            tests = [e["accuracy"] for e in of if e["event"] == "test"]
            assert kept["accuracy"] == tests[best]


@pytest.fixture(params=[small_job, text_job], scope="module")
def side_by_side(request, tiny_model, tmp_path_factory):
    """An uninterrupted job of two arms of 18 steps, and the splits it trained on."""
    config, splits = request.param(tiny_model)
    config = override(
        config,
        seeds=1,
        epochs=6,
        swa_epochs=(5,),
        workdir=tmp_path_factory.mktemp("side_by_side") / "run",
        checkpoint_every=2,
        log_every=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        if splits is not None:
            patch.setattr(compare, "load_splits", lambda *_: splits)
        train_and_evaluate(config, quiet())
    return config, splits


def kill_and_finish(whole, config, splits, moments, why):
    """SIGKILL a job at `moments`: (arm, step) and a delay in seconds after it."""
    order = {each: i for i, each in enumerate(steps_of(lines(whole.workdir)))}
    before = 0
    expected: dict[str, int] = {}
    resumed: set[str] = set()
    for moment, delay in moments:

        def reached(moment=moment, before=before):
            new = steps_of(lines(config.workdir)[before:])  # progress of this life
            return new and order[new[-1]] >= order[moment]

        with start(config, splits) as process:
            wait_for(process, reached)
            time.sleep(delay)
            process.kill()
            process.communicate()
        events = lines(config.workdir)
        assert_resumed(events[before:], expected, why)
        before, expected = len(events), newest_checkpoints(config.workdir)
        resumed |= expected.keys()
        last = dict(steps_of(events))  # of each arm
        for run, step in expected.items():
            # The newest but one was complete before the newest was begun.
            done = last[run.removesuffix("-seed0")]
            assert step >= done - 2 * config.saving.checkpoint_every, why
    with start(config, splits) as process:
        _, problems = process.communicate(timeout=240)
    assert process.returncode == 0, (problems, why)
    assert_resumed(lines(config.workdir)[before:], expected, why)
    assert_same_job(config.workdir, whole.workdir, why)
    return resumed


@pytest.mark.processes
@pytest.mark.slow
def test_killed_job_resumes_bit_for_bit(whole, tmp_path):
    """SIGKILL at random moments of a job whose arms start from one another."""
    rng = random.Random(0)
    steps = steps_of(lines(whole.workdir))
    chosen = sorted(rng.sample(range(len(steps) - 2), 2))
    moments = [(steps[i], rng.uniform(0, 0.1)) for i in chosen]
    config = override(whole, workdir=tmp_path / "run")
    kill_and_finish(whole, config, None, moments, f"{moments}")


@pytest.mark.processes
@pytest.mark.slow
def test_killed_average_resumes_bit_for_bit(side_by_side, tmp_path):
    """Once averaging has begun, at step 6, with randomness in every step."""
    whole, splits = side_by_side
    rng = random.Random(0)
    # From step 9 on, the checkpoint after step 6 is complete.
    moments = [(("swa5", rng.randrange(9, 15)), rng.uniform(0, 0.1))]
    config = override(whole, workdir=tmp_path / "run")
    why = f"{moments}"
    resumed = kill_and_finish(whole, config, splits, moments, why)
    assert resumed == {"swa5-seed0"}, why


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_signal_saves_first(whole, tmp_path, monkeypatch, signum, status):
    config = override(whole, workdir=tmp_path / "run", checkpoint_every=10**6)
    with start(config) as process:
        wait_for(process, lambda: steps_of(lines(config.workdir)))
        process.send_signal(signum)
        _, problems = process.communicate(timeout=240)
    assert process.returncode == status, problems
    assert "The same command goes on from there" in problems
    assert "Traceback" not in problems
    (stopped,) = re.findall(r"stopped at step (\d+) of 12 in run conv", problems)
    assert newest_checkpoints(config.workdir) == {"converged-seed0": int(stopped)}
    before = len(lines(config.workdir))
    stopper = contextlib.nullcontext(StopAfter(1))
    monkeypatch.setattr(compare, "stop_on_signal", lambda: stopper)
    with pytest.raises(StoppedError, match=f"at step {int(stopped) + 1} of 12"):
        train_and_evaluate(config, quiet())
    expected = {"converged-seed0": int(stopped)}
    assert_resumed(lines(config.workdir)[before:], expected)


@pytest.mark.slow
@pytest.mark.processes
def test_second_ctrl_c_ends_the_process_at_once(whole, tmp_path):
    config = override(whole, workdir=tmp_path / "run", log_every=1)
    with start(config, seconds=600) as process:
        # By then the handler is there: a signal before it would end all at once.
        wait_for(process, (config.workdir / "runs").exists)
        process.send_signal(signal.SIGINT)
        while "Ctrl-C again" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, problems = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted; the same command goes on" in problems
    assert "Traceback" not in problems


@pytest.mark.slow
def test_damaged_scores_are_an_error_with_a_cure(whole, tmp_path):
    config = override(whole, workdir=tmp_path / "run")
    shutil.copytree(whole.workdir, config.workdir)
    path = config.workdir / "runs/swa-seed0/finished.json"
    good = path.read_text()
    for bad in (good[:20], "[]", "{}", '{"scores": {"SWA": {"speed": 1}}}'):
        path.write_text(bad)
        message = r"swa-seed0/finished\.json is damaged .*Delete it; the same command"
        with pytest.raises(StorageError, match=message):
            train_and_evaluate(config, quiet())
    path.unlink()
    with Store(path.with_name("checkpoints"), keep=2) as store:
        saved = store._opened.restore(store.latest())["record"]["extra"]["seconds"]
    train_and_evaluate(config, quiet())
    found, before = json.loads(path.read_text()), json.loads(good)
    # Those before the last checkpoint, and those of the restart.
    assert found["seconds"] > saved > 0
    assert before.pop("seconds") > saved
    assert {name: found[name] for name in before} == before


def spoilt_loss(state, metrics):
    return state, metrics._replace(loss=np.float32(np.nan))


def spoilt_weights(state, metrics):
    """As an update may leave them whose own loss was still finite."""
    spoilt = jax.tree.map(lambda p: p * np.nan, state.params)
    return state._replace(params=spoilt), metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "step", "spoil", "message", "last_good"),
    [
        ("sgd", 5, spoilt_loss, r"loss is nan at step 5 \(epoch 2 of 4, arm sgd, ", 4),
        # Just before an average is read, and its BatchNorm statistics recomputed.
        ("swa3", 12, spoilt_weights, r"a weight is not finite at step 12 \(.*swa3", 10),
    ],
    ids=["loss", "weights"],
)
def test_divergence_names_the_last_good_checkpoint(
    tiny, monkeypatch, arm, step, spoil, message, last_good
):
    config = override(tiny, seeds=1, checkpoint_every=2, swa_epochs=(3,))
    real = runs.train

    def diverging(compiled, seed, hooks, **kwargs):
        honest = compiled.step
        numbers = itertools.count(1)

        def spoiling(state, batch):
            state, metrics = honest(state, batch)
            return spoil(state, metrics) if next(numbers) == step else (state, metrics)

        if compiled.arm.name == arm:
            compiled = dataclasses.replace(compiled, step=spoiling)
        return real(compiled, seed, hooks, **kwargs)

    monkeypatch.setattr(runs, "train", diverging)
    checkpoints = config.workdir / f"runs/{arm}-seed0/checkpoints"
    with pytest.raises(
        FloatingPointError,
        match=rf"{message}.*learning rate 0\.0\d+\); lower .*"
        rf" last good checkpoint is step {last_good}, in {checkpoints}",
    ):
        train_and_evaluate(config, quiet())
    with Store(checkpoints, 2) as store:
        assert store.latest() == last_good


def test_paths(tiny):
    found = tiny.directory.run("swa", 3).directory
    assert found == pathlib.Path(tiny.workdir) / "runs" / "swa-seed3"
