"""Jobs of several processes: joining one, leaving it together, and who may write."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from experiments.configs import Cluster
from experiments.parallel import DevicesError


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
    except (DevicesError, FloatingPointError):
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
