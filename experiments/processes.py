"""Jobs of several processes: joining one, leaving it together, and who may write."""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.errors import StoppedError, StorageError
from experiments.parallel import DevicesError
from experiments.settings import Cluster


@contextlib.contextmanager
def job(cluster: Cluster) -> Iterator[None]:
    """Connect to the other processes, before the body uses any device.

    A process that fails for a reason of its own ends on the spot, with its traceback.
    If it unwound as usual, it would wait five minutes at its exit for the others, which
    wait for it in the middle of a step. Those notice the broken connection, at the
    latest after JAX's heartbeat of 100 seconds, and end likewise.

    Raises:
        DevicesError: `--distributed` found no cluster to join.
    """
    _join(cluster)
    try:
        yield
    except (DevicesError, FloatingPointError, StorageError, StoppedError):
        raise  # every process finds these, at the same step
    except (Exception, KeyboardInterrupt):
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


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
    """
    if jax.process_count() == 1:
        return read()
    text = json.dumps(read()).encode() if is_main() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    buffer = np.zeros(size, np.uint8)
    buffer[: len(text)] = np.frombuffer(text, np.uint8)
    return json.loads(bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer))))
