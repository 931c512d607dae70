from __future__ import annotations

import ctypes
import threading
from contextlib import contextmanager

import pytest
import torch

from dattrain.state.background import BackgroundTask, Copy, HostBuffer, StagingCopy, image_of
from dattrain.state.format.rank_file import PAGE
from dattrain.state.partition import _shares, read, write


def test_a_failure_is_raised_once_and_never_lost():
    task = BackgroundTask("t")

    def fail():
        raise OSError("disk")

    task.start(fail)
    task._thread.join()
    assert task.failed
    with pytest.raises(OSError):
        task.wait()
    task.wait()
    assert not task.failed
    task.start(fail)
    with pytest.raises(OSError):
        task.start(lambda: pytest.fail("must not start"))
    task.start(lambda: None)
    task.wait()


def test_one_in_flight():
    task, gate, order = BackgroundTask("t"), threading.Event(), []
    task.start(lambda: (gate.wait(5), order.append(1)))
    threading.Timer(0.05, gate.set).start()
    task.start(lambda: order.append(2))
    task.wait()
    assert order == [1, 2]


def test_host_buffer_is_reused_and_page_aligned():
    buffer = HostBuffer(pinned=False)
    a = buffer.take(10_000)
    a.fill_(7)
    assert a.data_ptr() % PAGE == 0
    assert buffer.take(5_000).data_ptr() == a.data_ptr()
    assert buffer.take(20_000).numel() == 20_000
    assert len(image_of(buffer.take(123))) == 123


class Runtime:
    """CUDA's, as far as pinning goes: what is pinned, by address."""

    def __init__(self):
        self.pinned = {}

    def cudaHostRegister(self, address, size, flags):
        assert address not in self.pinned
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address):
        ctypes.string_at(address, 1)  # still mapped
        del self.pinned[address]
        return 0


def test_a_pinned_buffer_pins_what_was_asked_for_and_gives_it_back(monkeypatch):
    runtime, checked = Runtime(), []
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", checked.append)
    buffer = HostBuffer(pinned=True)
    first = buffer.take(5 << 20)
    first.fill_(7)
    assert runtime.pinned == {first.data_ptr(): 5 << 20}  # not a power of two
    assert buffer.take(1000).data_ptr() == first.data_ptr() and len(runtime.pinned) == 1
    second = buffer.take(9 << 20)
    assert runtime.pinned == {second.data_ptr(): 9 << 20}
    assert first[-1] == 7  # whoever has it still reads it
    del buffer
    assert runtime.pinned == {} and checked == [0] * 4


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_side_copy_holds_what_was_there_before_the_wait(device):
    state = torch.arange(1 << 22, dtype=torch.float32, device=device)
    buffer = HostBuffer(pinned=device == "cuda")  # memory is pinned for as long as this lives
    host = buffer.take(4 * (state.numel() - 3) + 8)
    assert host.is_pinned() == (device == "cuda")
    expected = state[3:].cpu().clone()
    copy, task = StagingCopy(host, [Copy(state, 3, state.numel() - 3, at=8)]), BackgroundTask("t")
    task.start(copy.run)
    copy.wait()
    state.zero_()
    task.wait()
    assert torch.equal(host[8:].view(torch.float32), expected)


def test_a_side_copy_touches_no_device_but_its_own(monkeypatch):
    """Each thread begins at device 0; whatever it enters or leaves there makes a context on that device."""
    current, touched = threading.local(), set()

    class Stream:
        device = torch.device("cuda", 3)

        def wait_stream(self, other): ...

        def synchronize(self): ...

    class Event:
        def record(self):
            touched.add(getattr(current, "index", 0))

    @contextmanager
    def stream(entered):
        before = getattr(current, "index", 0)
        touched.update((before, entered.device.index))
        yield
        touched.add(before)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: setattr(current, "index", d.index))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    host = torch.zeros(8, dtype=torch.uint8)
    task = BackgroundTask("t")
    task.start(StagingCopy(host, [Copy(torch.ones(2), 0, 2, at=0)]).run)
    task.wait()
    assert touched == {3}
    assert host.view(torch.float32).tolist() == [1, 1]


def test_a_side_copy_that_fails_holds_nobody_up():
    copy, task = (
        StagingCopy(torch.empty(4, dtype=torch.uint8), [Copy(torch.ones(3), 0, 3, at=0)]),
        BackgroundTask("t"),
    )
    task.start(copy.run)
    copy.wait()
    with pytest.raises(RuntimeError):
        task.wait()


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_of_replicated_tensors_cover_each_once(world):
    sizes = [5, 0, 17, 1, 40]
    cover = [[0] * s for s in sizes]
    loads = []
    for rank in range(world):
        shares = _shares(sizes, rank, world)
        loads.append(sum(hi - lo for lo, hi in shares))
        for row, (lo, hi) in zip(cover, shares):
            for i in range(lo, hi):
                row[i] += 1
    assert all(c == 1 for row in cover for c in row)
    assert max(loads) - min(loads) <= 1


def test_channels_last_weights_are_read_and_written_in_logical_order():
    weight = (
        torch.arange(2 * 3 * 2 * 2, dtype=torch.float32)
        .reshape(2, 3, 2, 2)
        .to(memory_format=torch.channels_last)
    )
    expected = weight.clone()
    assert read(weight, 5, 4).tolist() == [5, 6, 7, 8]
    write(weight, 5, torch.tensor([50.0, 60.0]))
    expected[0, 1, 0, 1], expected[0, 1, 1, 0] = 50.0, 60.0
    assert torch.equal(weight, expected) and weight.is_contiguous(memory_format=torch.channels_last)
