"""Hosts on one machine: the processes of a run, started, watched and killed."""

import dataclasses
import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

import swa_jax

from . import worker
from .worker import Crash


@dataclasses.dataclass(frozen=True)
class Host:
    """One process and what it prints."""

    process: subprocess.Popen[bytes]
    log: pathlib.Path

    def printed(self) -> str:
        return self.log.read_text(errors="replace")


class Hosts:
    """All processes of one run, started by ``start``."""

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        checkpoints: pathlib.Path,
        processes: int = 2,
        devices: int = 2,  # of each process
        crash: Crash | None = None,
    ):
        self.directory = directory
        self.checkpoints = checkpoints
        self.hosts: list[Host] = []
        self._environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUMPY_RANK_PROMOTION": "raise",
            # Most of the time is compilation, and no speed is measured here.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} "
            "--xla_backend_optimization_level=0",
            "PYTHONPATH": os.pathsep.join(
                [str(pathlib.Path(swa_jax.__file__).parents[1]), *sys.path]
            ),
        }
        port = free_port()
        self._runs = [
            worker.Run(
                checkpoints=str(checkpoints),
                result=str(directory / f"{index}"),
                processes=processes,
                index=index,
                port=port,
                crash=crash,
            )
            for index in range(processes)
        ]

    def start(self) -> None:
        self.directory.mkdir()
        for run in self._runs:
            log = self.directory / f"{run.index}.log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, worker.__file__, json.dumps(vars(run))],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=self._environment,
                )
            self.hosts.append(Host(process, log))

    def kill(self) -> list[int]:
        """Ends all at once; returns how they ended."""
        for host in self.hosts:
            host.process.kill()
        return [host.process.wait() for host in self.hosts]

    def kill_where_they_wait(self, deadline: float) -> None:
        """Waits until all have come to where they shall die."""
        while not all(worker.WAITING in host.printed() for host in self.hosts):
            self._pause(deadline, expected={None})
        ends = self.kill()
        on_disk = [
            path.relative_to(self.checkpoints).parts
            for path in self.checkpoints.rglob("*")
            if path.is_file()
        ]
        crash = {"ends": ends, "on_disk": on_disk}
        (self.directory / "crash.json").write_text(json.dumps(crash))

    def finish(self, deadline: float) -> None:
        """Waits until all have ended well."""
        while any(host.process.poll() != 0 for host in self.hosts):
            self._pause(deadline, expected={None, 0})

    def _pause(self, deadline: float, *, expected: set[int | None]) -> None:
        """Waits a moment, unless all waiting is in vain."""
        ends = [host.process.poll() for host in self.hosts]
        if expected.issuperset(ends) and time.monotonic() < deadline:
            time.sleep(0.02)
            return
        logs = (f"--- {h.log}\n{h.printed()[-4000:]}" for h in self.hosts)
        pytest.fail(
            f"{self.directory}: processes ended with {ends} (None: still running, "
            "out of time)\n" + "\n".join(logs)
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
