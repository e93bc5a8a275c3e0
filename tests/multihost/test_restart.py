"""Training on two hosts survives being killed: the average ends as if nothing happened.

Two real processes with two CPU devices each, see ``worker.py``. One run goes straight
through. Another is killed three times at different moments, both processes at once and
with SIGKILL, and started again each time. What its first crash left on the disk is also
continued by one process with four devices, and by one with two.

Starting processes is what takes the time, so all of this happens once, in the fixture
``runs``; the tests then look at what the runs left behind.
"""

import contextlib
import fcntl
import json
import pathlib
import shutil
import signal
import time
from typing import Any, NamedTuple

import numpy as np
import pytest

from . import worker
from .hosts import Hosts
from .worker import GRADIENTS, SAMPLED, STEPS, Crash

pytestmark = pytest.mark.processes

#: Seconds for all runs together; on two idle cores they take about 30.
TIMEOUT = 240
CRASHES: tuple[Crash, ...] = ("between saves", "during a save", "after a save")

#: Weights, momenta and gradients are below 1 in size. A step rounds each a handful of
#: times, say 8, by at most half of float32's spacing below 1. Of a change of the
#: gradient, momentum passes on lr / (1 - momentum) = 1 times as much to the weights.
#: Measured: 1.2e-7, four such roundings.
ROUNDING = 8 * STEPS * 2.0**-25


def run_everything(root: pathlib.Path) -> None:
    """All runs, each in a directory of its name; as many at once as do not depend."""
    deadline = time.monotonic() + TIMEOUT
    with contextlib.ExitStack() as stack:

        def start(name: str, checkpoints: str, **how: Any) -> Hosts:
            (root / checkpoints).mkdir(exist_ok=True)
            hosts = Hosts(root / name, checkpoints=root / checkpoints, **how)
            stack.callback(hosts.kill)  # before there is anything to leave behind
            hosts.start()
            return hosts

        running = [start("straight", "straight_saves")]
        for crash in CRASHES:
            hosts = start(crash, "killed_saves", crash=crash)
            hosts.kill_where_they_wait(deadline)
            if crash == "between saves":
                for name, devices in (("four_devices", 4), ("two_devices", 2)):
                    saves = f"{name}_saves"
                    shutil.copytree(root / "killed_saves", root / saves)
                    running.append(start(name, saves, processes=1, devices=devices))
        running.append(start("killed", "killed_saves"))
        for hosts in running:
            hosts.finish(deadline)


class Result(NamedTuple):
    """What one process of a run ended with."""

    arrays: dict[str, np.ndarray]
    resumed_from: int
    average_shards: dict[str, list[list[int]]]
    params_shards: dict[str, list[list[int]]]

    def of(self, what: str, gradients: str = "") -> dict[str, np.ndarray]:
        """The arrays of state, average or history, of both networks or of one."""
        return {
            path: x
            for path, x in self.arrays.items()
            if path.startswith(what) and gradients in path
        }


class Runs:
    """What the runs left behind."""

    def __init__(self, root: pathlib.Path):
        self.root = root

    def result(self, name: str, process: int = 0) -> Result:
        path = self.root / name / f"{process}"
        facts = json.loads(path.with_suffix(".json").read_text())
        with np.load(path.with_suffix(".npz")) as arrays:
            return Result(dict(arrays), **facts)

    def resumed_from(self, name: str) -> int:
        """Of a process that did not live to tell a result."""
        _, _, rest = (self.root / name / "0.log").read_text().partition("resumed from ")
        return int(rest.split()[0])


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Runs:
    root = tmp_path_factory.getbasetemp()
    if worker_id != "master":  # pytest-xdist's workers share one set of runs
        root = root.parent
    root /= "multihost"
    with (root.parent / "multihost.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            root.mkdir()
            run_everything(root)
            (root / "complete").touch()
    if not (root / "complete").exists():
        pytest.fail("the runs failed in another of pytest's processes, see there")
    return Runs(root)


def assert_same_bits(
    result: dict[str, np.ndarray], straight: dict[str, np.ndarray]
) -> None:
    assert result.keys() == straight.keys() != set()
    differ = [k for k in straight if result[k].tobytes() != straight[k].tobytes()]
    assert differ == []


def assert_same_to_rounding(
    result: dict[str, np.ndarray], straight: dict[str, np.ndarray]
) -> None:
    assert result.keys() == straight.keys() != set()
    for path, x in straight.items():
        np.testing.assert_allclose(
            result[path], x, rtol=0, atol=ROUNDING, err_msg=path, strict=True
        )


# The run that nothing happens to.


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_average_is_the_mean_of_the_weights_at_sampled_steps(runs, gradients):
    result = runs.result("straight")
    assert result.resumed_from == 0
    history = result.of("history", gradients)
    assert len(history) == 2
    for path, weights in history.items():
        assert len(weights) == len(SAMPLED)
        average = result.arrays[path.replace("history", "average")]
        # Five updates of a mean below 1 in size, each with three roundings.
        atol = 3 * len(SAMPLED) * 2.0**-25
        expected = weights.mean(axis=0, dtype=np.float64)
        np.testing.assert_allclose(average, expected, rtol=0, atol=atol)
        # The mean is none of the weights: the tests below compare something.
        assert np.abs(weights - average[None]).max(axis=(1, 2)).min() > 1e-3


@pytest.mark.parametrize("name", ["straight", "killed", "four_devices", "two_devices"])
def test_counters(runs, name):
    result = runs.result(name)
    counters = {path: int(x) for path, x in result.of("state").items() if x.ndim == 0}
    assert counters.pop("state['step']") == STEPS
    assert len(counters) == 2 * len(GRADIENTS)
    for path, count in counters.items():
        expected = len(SAMPLED) if "num_averaged" in path else STEPS
        assert count == expected, path


@pytest.mark.parametrize(
    ("name", "processes", "parts"),
    [
        ("straight", 2, 4),
        ("killed", 2, 4),
        ("four_devices", 1, 4),
        ("two_devices", 1, 2),
    ],
)
def test_each_device_holds_its_part_of_the_average(runs, name, processes, parts):
    for process in range(processes):
        result = runs.result(name, process)
        shapes = {path: list(x.shape) for path, x in result.of("average").items()}
        assert len(shapes) == 2 * len(GRADIENTS)
        devices = parts // processes
        assert result.average_shards == {
            path.removeprefix("average"): [[rows // parts, columns]] * devices
            for path, (rows, columns) in shapes.items()
        }
        # The weights are whole, although the average that they enter is not.
        assert result.params_shards == {
            path.removeprefix("average"): [shape] * devices
            for path, shape in shapes.items()
        }


# Averages that a loop drives.


def mean_of(epochs: range) -> dict[str, np.ndarray]:
    trees = [worker.epoch_params(epoch) for epoch in epochs]
    return {name: np.mean([t[name] for t in trees], axis=0) for name in trees[0]}


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("layout", ["divided", "spread"])
def test_update_average_of_arrays_that_no_process_holds_alone(runs, layout, process):
    path = f"loops['update_average {layout}']"
    found = runs.result("straight", process).of(path)
    expected = mean_of(range(worker.EPOCHS))
    assert found[f"{path}['counters']"].tolist() == [worker.EPOCHS] * 2
    for name, mean in expected.items():
        # Weights of a normal distribution, five updates of three roundings each.
        np.testing.assert_allclose(
            found[f"{path}['read']['{name}']"], mean, rtol=0, atol=4 * 15 * 2.0**-24
        )


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("layout", ["divided", "spread"])
def test_published_method_runs_the_same_on_every_process(runs, layout, process):
    result = runs.result("straight", process)
    path = f"loops['SWA {layout}']"
    found = {k.removeprefix(path): x for k, x in result.of(path).items()}
    epochs = range(int(worker.SWA_START * worker.EPOCHS), worker.EPOCHS)
    assert found["['matched']"].tolist() == list(epochs) == [2, 3, 4]
    atol = 4 * 15 * 2.0**-24
    for name, mean in mean_of(epochs).items():
        np.testing.assert_allclose(
            found[f"['read']['{name}']"], mean, rtol=0, atol=atol
        )
    distances = [
        sum(
            np.square(mean - worker.epoch_params(epoch)[name]).sum()
            for name, mean in mean_of(range(epochs.start, epoch + 1)).items()
        )
        ** 0.5
        for epoch in epochs
    ]
    # The first is a distance of a model from itself; the others sum 256 squares.
    np.testing.assert_allclose(found["['distances']"], distances, rtol=1e-5, atol=1e-5)
    assert found["['learning_rate']"] == np.float32(0.01)
    features = np.concatenate([worker.make_batch(step)[0] for step in range(3)])
    # The statistic is read from a tenth of a batch's mean: 2**-24 of it, ten times.
    np.testing.assert_allclose(
        found["['statistics']"], features.mean(axis=0, dtype=float), atol=1e-6
    )


# The runs that were killed.


@pytest.mark.parametrize("crash", CRASHES)
def test_both_processes_were_killed_in_the_middle(runs, crash):
    facts = json.loads((runs.root / crash / "crash.json").read_text())
    assert facts["ends"] == [-signal.SIGKILL] * 2
    for process in range(2):
        assert not (runs.root / crash / f"{process}.npz").exists()
    # Before the last sampled step and after the first.
    assert SAMPLED[0] <= worker.CRASH_STEP[crash] < SAMPLED[-1]


def test_a_save_was_unfinished_at_the_crash_during_it(runs):
    facts = json.loads((runs.root / "during a save" / "crash.json").read_text())
    step = worker.CRASH_STEP["during a save"]
    directories = {directory for directory, *_ in facts["on_disk"]}
    assert f"{step - worker.SAVE_EVERY}" in directories
    assert f"{step}" not in directories
    assert any(name.startswith(f"{step}.") for name in directories)


def test_each_restart_goes_on_from_the_last_valid_save(runs):
    assert runs.resumed_from("between saves") == 0
    # Step 6 was just being saved in the background, or had just been.
    assert runs.resumed_from("during a save") in (4, 6)
    assert runs.resumed_from("four_devices") == runs.resumed_from("during a save")
    assert runs.resumed_from("two_devices") == runs.resumed_from("during a save")
    # Step 10 was written but not valid.
    assert runs.resumed_from("after a save") == 8
    # The save of step 10 was valid.
    assert runs.resumed_from("killed") == 10


@pytest.mark.parametrize("name", ["straight", "killed"])
def test_both_processes_end_with_the_same_bits(runs, name):
    first, second = (runs.result(name, process).arrays for process in range(2))
    assert_same_bits(first, second)


def test_restart_on_two_hosts_ends_with_the_same_bits(runs):
    straight, killed = runs.result("straight"), runs.result("killed")
    assert_same_bits(killed.of("average"), straight.of("average"))
    assert_same_bits(killed.of("state"), straight.of("state"))


def test_restart_on_one_host_with_as_many_devices_ends_with_the_same_bits(runs):
    # Where the sum over devices has one order. An all-reduce within a process has
    # another order than one between processes, and no average can undo that.
    straight, one_host = runs.result("straight"), runs.result("four_devices")
    for what in ("average", "state"):
        assert_same_bits(one_host.of(what, "gathered"), straight.of(what, "gathered"))
        assert_same_to_rounding(one_host.of(what), straight.of(what))


def test_restart_on_fewer_devices_ends_with_the_same_average_to_rounding(runs):
    straight, fewer = runs.result("straight"), runs.result("two_devices")
    for what in ("average", "state"):
        assert_same_to_rounding(fewer.of(what), straight.of(what))
