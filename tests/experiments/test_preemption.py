import os
import signal

import jax

from experiments import preemption
from experiments.preemption import stop_on_sigterm


def test_sigterm_asks_to_stop_and_the_old_handler_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stopper:
        assert not stopper.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopper.requested()
    assert signal.getsignal(signal.SIGTERM) == before


def test_several_processes_agree_by_counting_steps_of_the_whole_job(monkeypatch):
    seen = []

    def reached(step):
        seen.append(step)
        return step == 3

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        preemption.multihost_utils, "reached_preemption_sync_point", reached
    )
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stopper:
        assert signal.getsignal(signal.SIGTERM) == before  # JAX listens itself
        assert [stopper.requested() for _ in range(3)] == [False, False, True]
    assert seen == [1, 2, 3]
