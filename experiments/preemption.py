"""Ending a job in good order when the machine is taken away: SIGTERM."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Stopper:
    """Remembers whether the job was asked to stop."""

    def __init__(self) -> None:
        self._asked = False
        self._steps = 0

    def ask(self, signum: int = 0, frame: FrameType | None = None) -> None:
        """Ask the job to stop after the present step; a signal handler."""
        self._asked = True

    def requested(self) -> bool:
        """Whether to stop after this step; all processes of a job hear the same.

        Called once after each step. A signal to one of several processes reaches all of
        them some steps later, at a step that none of them has passed.
        """
        self._steps += 1  # over all runs of the job
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._steps)
        return self._asked


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[Stopper]:
    """Let SIGTERM ask the job to stop, instead of ending it, within the body."""
    stopper = Stopper()
    if jax.process_count() > 1:  # JAX itself listens to SIGTERM then
        yield stopper
        return
    previous = signal.signal(signal.SIGTERM, stopper.ask)
    try:
        yield stopper
    finally:
        signal.signal(signal.SIGTERM, previous)
