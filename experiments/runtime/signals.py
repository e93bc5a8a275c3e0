"""Ending a job in good order when it is asked to: by SIGTERM, or by Ctrl-C."""

import contextlib
import os
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
        self.signum: int = signal.SIGTERM  # the signal that asked last

    def ask(self, signum: int = signal.SIGTERM, frame: FrameType | None = None) -> None:
        """Ask the job to stop after the present step; a signal handler."""
        self._asked, self.signum = True, signum
        if signum == signal.SIGINT:
            # An epoch's end may take a while to score: let the next one end all.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            # Not `print`: the signal may have come in the middle of another one.
            os.write(2, b"\nstopping after this step; Ctrl-C again ends at once\n")

    def poll(self) -> bool:
        """Count a step; return whether to stop after it, the same in all processes.

        A signal to one of several processes reaches all of
        them some steps later, at a step that none of them has passed.
        """
        self._steps += 1  # over all runs of the job
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._steps)
        return self._asked


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stopper]:
    """Let SIGTERM and SIGINT ask the job to stop, instead of ending it, in the body.

    In a job of several processes SIGTERM alone, and JAX listens to it itself.
    """
    stopper = Stopper()
    if jax.process_count() > 1:
        yield stopper
        return
    before = {
        signum: signal.signal(signum, stopper.ask)
        for signum in (signal.SIGTERM, signal.SIGINT)
        # A shell lets its background jobs ignore Ctrl-C.
        if signal.getsignal(signum) != signal.SIG_IGN
    }
    try:
        yield stopper
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
