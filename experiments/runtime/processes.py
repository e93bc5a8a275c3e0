"""Jobs of several processes: joining one, leaving it together, and who may write."""

import contextlib
import dataclasses
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.runtime.checks import check
from experiments.runtime.errors import (
    COMMON_ERRORS,
    DevicesError,
    StorageError,
    explanation,
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How this process finds the others of its job, if there are any."""

    distributed: bool = False
    """Join the cluster that JAX finds in the environment: TPU pod, Slurm, others."""

    coordinator_address: str | None = None
    """HOST:PORT of process 0, where the environment does not tell."""

    num_processes: int | None = None
    """Number of processes in the job, with --coordinator-address."""

    process_id: int | None = None
    """Number of this process, from 0, with --coordinator-address."""

    def __post_init__(self) -> None:
        """Reject what names half a cluster, or two."""
        address, number = self.coordinator_address, self.process_id
        if address is None or self.num_processes is None or number is None:
            given = address, self.num_processes, number
            check(
                given == (None, None, None),
                "coordinator_address, num_processes and process_id are"
                f" {', '.join(map(str, given))}; give all three, or none of them.",
            )
            return
        check(
            0 <= number < self.num_processes,
            f"process_id is {number} with num_processes={self.num_processes};"
            " processes are numbered from 0 to one less than that.",
        )
        check(
            not self.distributed,
            "distributed is set along with coordinator_address; give only one of the"
            " two.",
        )


ONE_PROCESS = Cluster()


@contextlib.contextmanager
def job(cluster: Cluster) -> Iterator[None]:
    """Connect to the other processes, before the body uses any device.

    A process that fails for a reason of its own says so and ends on the spot. If it
    unwound as usual, it would wait five minutes at its exit for the others, which wait
    for it in the middle of a step. Those notice the broken connection, at the latest
    after JAX's heartbeat of 100 seconds, and end likewise.

    Raises:
        DevicesError: `--distributed` found no cluster to join.
    """
    _join(cluster)
    try:
        yield
    except COMMON_ERRORS:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if jax.process_count() == 1:
            raise
        _leave(error)


def _leave(error: BaseException) -> NoReturn:
    """End this process, and with it the job, without waiting for anybody."""
    interrupted = isinstance(error, KeyboardInterrupt)
    text = explanation(error)
    try:
        if interrupted:
            print("interrupted", file=sys.stderr)
        elif text is not None:
            print(f"error: {text}", file=sys.stderr)
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # also where nobody reads what is printed
        os._exit(128 + signal.SIGINT if interrupted else 1)


def _join(cluster: Cluster) -> None:
    if cluster.coordinator_address is not None:
        jax.distributed.initialize(
            cluster.coordinator_address, cluster.num_processes, cluster.process_id
        )
    elif cluster.distributed:
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise DevicesError(
                "distributed is set, but JAX recognises no cluster in the environment"
                f" ({error}) Give --coordinator-address, --num-processes and"
                " --process-id instead, or leave --distributed out."
            ) from error


def check_same(settings: dict[str, Any]) -> None:
    """Make sure that all processes of the job were started with the same settings.

    Otherwise they would train one network at two rates, or wait for each other's
    batches for ever.

    Args:
        settings: This process's, in JSON's types, without those that each process may
            have for itself.

    Raises:
        DevicesError: Settings differ; raised in all processes.
    """
    if jax.process_count() == 1:
        return
    expected = from_main(lambda: settings)
    names = sorted(expected)  # the same in all processes, whatever their versions
    differs = [settings.get(name) != expected[name] for name in names]
    differs.append(not settings.keys() <= expected.keys())
    anywhere = np.any(multihost_utils.process_allgather(np.array(differs)), axis=0)
    found = [name for name, bad in zip(names, anywhere, strict=False) if bad]
    if anywhere[-1]:
        found.append("settings that process 0 does not know")
    if found:
        raise DevicesError(
            f"the job's processes were started with different settings: they differ in"
            f" {', '.join(found)}. Give all of them the same command line; only"
            " --process-id, --workdir and --data-dir may be each one's own."
        )


def is_main() -> bool:
    """Whether this process prints and writes files: one of each job does."""
    return jax.process_index() == 0


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let the main process run the body alone, then the others.

    They find what it prepared on a shared disk; on a disk of their own they prepare it
    themselves.
    """
    if jax.process_count() == 1:
        yield
        return
    name = "main_first"
    if not is_main():
        multihost_utils.sync_global_devices(name)
    try:
        yield
    finally:  # whether or not it failed: the others wait
        if is_main():
            multihost_utils.sync_global_devices(name)


def from_main(read: Callable[[], Any]) -> Any:
    """What `read` returns in the main process, in all of them.

    Args:
        read: Returns something that JSON can hold. Called in the main process alone.
            A StorageError that it raises is raised in all.
    """
    if jax.process_count() == 1:
        return read()

    def attempt() -> dict[str, Any]:
        try:
            return {"found": read()}
        except StorageError as error:
            return {"error": str(error)}

    text = json.dumps(attempt()).encode() if is_main() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.zeros(size, np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    whole = bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer)))
    found = json.loads(whole)
    if "error" in found:
        raise StorageError(found["error"])
    return found["found"]
