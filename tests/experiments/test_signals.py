import os
import signal

import jax
import pytest

from experiments.runtime import signals
from experiments.runtime.signals import stop_on_signal


@pytest.fixture(autouse=True)
def interruptible():
    """Where pytest runs in the background of a shell, Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_asks_to_stop_and_the_old_handler_comes_back(signum):
    before = signal.getsignal(signum)
    with stop_on_signal() as stopper:
        assert not stopper.poll()
        os.kill(os.getpid(), signum)
        assert stopper.poll()
        assert stopper.signum == signum
    assert signal.getsignal(signum) == before


def test_second_ctrl_c_ends_at_once(capfd):
    with stop_on_signal() as stopper:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopper.poll()
        assert "Ctrl-C again ends at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ignored_ctrl_c_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_on_signal() as stopper:
        os.kill(os.getpid(), signal.SIGINT)
        assert not stopper.poll()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_several_processes_agree_by_counting_steps_of_the_whole_job(monkeypatch):
    seen = []

    def reached(step):
        seen.append(step)
        return step == 3

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        signals.multihost_utils, "reached_preemption_sync_point", reached
    )
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as stopper:
        assert signal.getsignal(signal.SIGTERM) == before  # JAX listens itself
        assert [stopper.poll() for _ in range(3)] == [False, False, True]
    assert seen == [1, 2, 3]
