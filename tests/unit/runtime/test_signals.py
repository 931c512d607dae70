import os
import signal

import pytest

from dattrain.runtime.signals import Preemption, StopRequest


@pytest.fixture
def preemption(tmp_path):
    found = Preemption(tmp_path).install()
    yield found
    found.restore()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_only_sets_a_flag(preemption, signum):
    assert preemption.request() is StopRequest.NONE
    os.kill(os.getpid(), signum)
    assert preemption.request() is StopRequest.PREEMPT and preemption.received == signum


def test_the_stop_file_stops_and_is_cleared(preemption, tmp_path):
    (tmp_path / "stop").touch()
    assert preemption.request() is StopRequest.STOP
    assert preemption.request(look_for_file=False) is StopRequest.NONE
    preemption.clear_stop_file()
    assert preemption.request() is StopRequest.NONE
    preemption.clear_stop_file()


def test_the_first_ctrl_c_stops_at_the_edge_and_the_second_at_once(preemption):
    os.kill(os.getpid(), signal.SIGINT)
    assert preemption.request() is StopRequest.STOP
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_before_are_restored(tmp_path):
    called = []
    before = signal.signal(signal.SIGUSR2, lambda signum, frame: called.append(signum))
    try:
        preemption = Preemption(tmp_path).install()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert not called
        preemption.restore()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert called == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_forked_worker_ignores_the_signal(preemption):
    if (pid := os.fork()) == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0 if preemption.received is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
