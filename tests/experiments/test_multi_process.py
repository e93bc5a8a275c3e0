"""Real processes on this machine, two forced CPU devices each."""

import contextlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import time

import pytest

from experiments.data.splits import load_splits

pytestmark = pytest.mark.processes

TINY = [
    *("-m", "experiments", "digits"),
    *("--seeds", "1"),
    *("--train-examples", "20"),
    *("--epochs", "2"),
    *("--swa-epochs", "1"),
    *("--batch-size", "8"),
    *("--eval-batch-size", "256"),
    *("--widths", "4", "4"),
    *("--strides", "2", "2"),
    "--no-width-plot",
]
TIMEOUT = 240  # seconds; a job takes about 20 on an idle machine


def free_port(low=20_000, high=30_000):
    for port in random.SystemRandom().sample(range(low, high), 100):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"no free port from {low} to {high}")


class Job:
    """Processes that run side by side, each with its own environment."""

    def __init__(self):
        self._processes = []

    def start(self, args, devices, **environment):
        flags = f"--xla_force_host_platform_device_count={devices}"
        process = subprocess.Popen(
            [sys.executable, *args],
            env={**os.environ, "XLA_FLAGS": flags, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._processes.append(process)

    def wait(self, timeout=TIMEOUT):
        """Exit statuses and what each printed to its two streams."""
        outputs = [p.communicate(timeout=timeout) for p in self._processes]
        return [p.returncode for p in self._processes], outputs

    def running(self):
        """Whether none has ended yet."""
        return all(process.poll() is None for process in self._processes)

    def terminate(self, number):
        """Send SIGTERM to one of them."""
        self._processes[number].terminate()

    def stop(self):
        for process in self._processes:
            process.kill()
            process.communicate()


@pytest.fixture
def job():
    job = Job()
    yield job
    job.stop()


def cluster_flags(process, port):
    return [
        *("--coordinator-address", f"127.0.0.1:{port}"),
        *("--num-processes", "2"),
        *("--process-id", str(process)),
    ]


@pytest.fixture(scope="module")
def prepared(data_dir, tiny_model):
    load_splits(tiny_model.data, ("train", "test"))
    return ["--data-dir", str(data_dir)]


@pytest.fixture(scope="module")
def one_process(prepared, tmp_path_factory):
    """The same run in one process that has all four devices."""
    workdir = tmp_path_factory.mktemp("one_process")
    job = Job()
    job.start([*TINY, *prepared, "--parallel", "jit", "--workdir", str(workdir)], 4)
    statuses, outputs = job.wait()
    assert statuses == [0], outputs
    return results(workdir)


def results(workdir):
    return json.loads((workdir / "results.json").read_text())["rows"]


def start_by_flags(job, args, workdirs):
    port = free_port()
    for process, workdir in enumerate(workdirs):
        job.start([*args, "--workdir", workdir, *cluster_flags(process, port)], 2)


def start_under_slurm(job, args, workdirs):
    """What `srun -n 2` sets; JAX takes the job's number for its port."""
    first = 65_536 - 4096
    number = free_port(first, 65_536) - first
    for process, workdir in enumerate(workdirs):
        job.start(
            [*args, "--workdir", workdir, "--distributed"],
            2,
            SLURM_JOB_ID=str(number),
            SLURM_STEP_NODELIST="localhost",
            SLURM_STEP_NUM_NODES="1",
            SLURM_NTASKS="2",
            SLURM_PROCID=str(process),
            SLURM_LOCALID=str(process),
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "strategy"), [(start_by_flags, "jit"), (start_under_slurm, "pmap")]
)
def test_two_processes_train_the_same_network(
    job, prepared, one_process, tmp_path, start, strategy
):
    workdirs = [tmp_path / "0", tmp_path / "1"]
    start(job, [*TINY, *prepared, "--parallel", strategy], list(map(str, workdirs)))
    statuses, outputs = job.wait()
    assert statuses == [0, 0], outputs
    for found, expected in zip(results(workdirs[0]), one_process, strict=True):
        assert found["label"] == expected["label"]
        # 6 steps: the weights agree to 12 float32 eps (see test_parallel), and the
        # mean loss of a network this small moves at most ten times as far. With a
        # batch's halves mixed up it would differ in the second digit.
        assert found["loss"] == pytest.approx(expected["loss"], rel=0, abs=1.5e-5)
        assert found["accuracy"] == pytest.approx(expected["accuracy"], abs=1.5 / 601)
    # Only the first process writes and prints; gloo's own notes are none of ours.
    assert not workdirs[1].exists()
    (shown, _), (other, _) = outputs
    assert "SWA, last 1 epoch" in shown
    assert [line for line in other.splitlines() if "[Gloo]" not in line] == []


ONE_FAILS = """
import sys
from jax.experimental import multihost_utils
from experiments.runtime import errors, processes
with processes.job(processes.Cluster(False, sys.argv[1], 2, int(sys.argv[2]))):
    multihost_utils.sync_global_devices("start")
    if not processes.is_main():
        raise {error}
    multihost_utils.sync_global_devices("step")
"""


@pytest.mark.parametrize(
    ("error", "shown", "traceback"),
    [
        ("OSError('the disk is gone')", "OSError: the disk is gone", True),
        ("errors.DataUnavailableError('run pip')", "error: run pip\n", False),
    ],
)
def test_one_failing_process_ends_the_job(job, error, shown, traceback):
    """Without waiting five minutes for each other."""
    port = free_port()
    program = ONE_FAILS.format(error=error)
    for process in range(2):
        job.start(["-c", program, f"127.0.0.1:{port}", str(process)], 2)
    statuses, outputs = job.wait(timeout=120)
    assert statuses[1] == 1
    assert statuses[0] != 0
    assert shown in outputs[1][1]
    assert ("Traceback" in outputs[1][1]) == traceback


def test_processes_with_different_settings_do_not_start(job, prepared, tmp_path):
    """They would train one network at two rates, or wait for each other for ever."""
    args = [*TINY, *prepared, "--parallel", "jit"]
    own = [[], ["--batch-size", "16", "--learning-rate", "0.3"]]
    port = free_port()
    for process in range(2):
        workdir = ["--workdir", str(tmp_path / str(process))]
        job.start([*args, *workdir, *own[process], *cluster_flags(process, port)], 2)
    statuses, outputs = job.wait(timeout=120)
    assert statuses == [1, 1], outputs
    message = outputs[0][1]
    assert "error: the job's processes were started with different settings" in message
    assert "they differ in batch_size, learning_rate. Give all of them" in message
    assert "Traceback" not in message + outputs[1][1]
    assert list(tmp_path.iterdir()) == []


def test_distributed_without_a_cluster_is_an_error(job):
    job.start([*TINY, "--parallel", "jit", "--distributed"], 2)
    (status,), ((_, message),) = job.wait()
    assert status == 1
    assert message.startswith("error: distributed is set, but JAX recognises no clust")
    assert "Give --coordinator-address" in message


@pytest.mark.slow
def test_sigterm_to_one_process_saves_the_job_and_all_go_on(job, prepared, tmp_path):
    args = [*TINY, *prepared, "--epochs", "60", "--parallel", "jit", "--log-every", "1"]
    workdir = tmp_path / "run"
    workdirs = [str(workdir), str(tmp_path / "other")]
    start_by_flags(job, args, workdirs)
    log = workdir / "metrics.jsonl"
    while not (log.exists() and '"step"' in log.read_text()):
        assert job.running(), job.wait()
        time.sleep(0.01)
    job.terminate(1)
    statuses, outputs = job.wait()
    assert statuses == [143, 143], outputs
    pattern = r"stopped at step (\d+) of 180 in run sgd-seed0"
    (stopped,) = re.findall(pattern, outputs[0][1])

    again = Job()
    try:
        start_by_flags(again, args, workdirs)
        statuses, outputs = again.wait()
    finally:
        again.stop()
    assert statuses == [0, 0], outputs
    events = [json.loads(line) for line in log.read_text().splitlines()]
    (resumed,) = (event for event in events if event["event"] == "resumed")
    assert resumed["step"] == int(stopped)
    steps = [e["step"] for e in events if e["event"] == "step" and e["arm"] == "sgd"]
    assert steps == list(range(1, 181))  # none twice, none missing
    assert results(workdir)[0]["loss"][0] > 0
