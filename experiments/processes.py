"""Jobs of several processes: joining one, and who may write."""

import contextlib
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from experiments.configs import Cluster
from experiments.parallel import DevicesError


def join(cluster: Cluster) -> None:
    """Connect to the job's other processes, before anything else uses a device.

    Raises:
        DevicesError: `--distributed` found no cluster to join.
    """
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
                f" ({error}). Give --coordinator-address, --num-processes and"
                " --process-id instead, or leave --distributed out."
            ) from error


def is_main() -> bool:
    """Whether this process prints and writes files; in every job, one does."""
    return jax.process_index() == 0


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let the main process run the body alone, the others after it.

    What it prepares on a shared disk, they then find; on a disk of their own they
    prepare it themselves.
    """
    name = "main_first"
    if not is_main():
        multihost_utils.sync_global_devices(name)
    try:
        yield
    finally:  # whether or not it failed: the others wait
        if is_main():
            multihost_utils.sync_global_devices(name)
