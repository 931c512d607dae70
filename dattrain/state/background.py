"""One task at a time on another thread, the host memory that it reads from, and the copy that fills it (staging)."""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dattrain.state import partition


class BackgroundTask:
    """Runs one callable at a time on a daemon thread. Its failure is kept until ``wait`` raises it, never lost."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def failed(self) -> bool:
        """Whether a task has failed, and ``wait`` has not raised that yet."""
        return self._failure is not None

    def start(self, task: Callable[[], None]) -> None:
        """Run ``task`` on the thread. Waits for the one before, and raises that one's failure instead of starting."""
        self.wait()

        def run() -> None:
            try:
                task()
            except BaseException as e:
                self._failure = e

        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the task; raise its failure, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


class HostBuffer:
    """Bytes in host memory, kept from one save to the next: page-aligned (for unbuffered writes), pinned beside CUDA."""

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._unpin: Callable[[], object] = lambda: None

    def take(self, size: int) -> Tensor:
        """The first ``size`` bytes, uint8, 1-D.

        What an earlier ``take`` returned is overwritten by writing here, and where that was smaller it is no longer pinned:
        no copy to it may be under way.
        """
        if self._bytes.numel() < size:
            # Let the old one go before its successor comes.
            self._unpin()
            self._bytes = torch.empty(0, dtype=torch.uint8)
            area = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                area.madvise(mmap.MADV_HUGEPAGE)  # fewer faults in the first copy, fewer pages to pin
            self._bytes = torch.frombuffer(area, dtype=torch.uint8)
            if self._pinned:
                # A child's copy of the page table would make the next write move pages away from under the device.
                area.madvise(mmap.MADV_DONTFORK)
                address = pin(self._bytes)
                self._unpin = weakref.finalize(self, unpin, address)
                self._unpin.atexit = False  # CUDA may have ended before
        return self._bytes[:size]


def pin(host: Tensor) -> int:
    """Page-lock the memory of ``host``; returns the address, for ``unpin``.

    No more than it has: torch's allocator of pinned memory rounds up to a power of two and gives nothing back.

    Raises:
        torch.cuda.CudaError: the driver refuses.
    """
    address = host.data_ptr()
    torch.cuda.check_error(_cudart().cudaHostRegister(address, host.numel(), 0))
    return address


def unpin(address: int) -> None:
    """Undo ``pin``; the memory must still be there."""
    torch.cuda.check_error(_cudart().cudaHostUnregister(address))


def _cudart() -> Any:
    runtime: Any = torch.cuda.cudart
    return runtime()


@dataclass(frozen=True)
class Copy:
    """``numel`` fp32 elements of the flattened ``source`` from ``first`` on, to the host buffer's byte ``at``."""

    source: Tensor
    first: int
    numel: int
    at: int

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.at + 4 * self.numel


class StagingCopy:
    """Copies of live state into ``host`` beside the pass that only reads that state.

    Made where the state is as it shall be saved, ``run`` on another thread (on CUDA by a stream of its own, so that neither
    kernels nor the host wait), and ``wait`` called by whoever is about to change the state.
    """

    def __init__(self, host: Tensor, copies: Sequence[Copy]) -> None:
        self._host, self._copies = host, copies
        self._issued = threading.Event()
        self._stream: Any = None
        if torch.cuda.is_available():
            cuda: Any = torch.cuda
            self._stream, self._done = cuda.Stream(), cuda.Event()
            self._stream.wait_stream(torch.cuda.current_stream())

    @torch.no_grad()
    def run(self) -> None:
        """Copy; returns when all is in host memory."""
        try:
            if self._stream is not None:
                # A thread begins at device 0, and leaving the stream goes back to where it began: there CUDA would make a
                # context, of half a gigabyte for each rank of the node.
                torch.cuda.set_device(self._stream.device)
            with torch.cuda.stream(self._stream):  # without a stream this does nothing
                self._issue()
                if self._stream is not None:
                    self._done.record()
        finally:
            self._issued.set()
        if self._stream is not None:
            self._stream.synchronize()

    def _issue(self) -> None:
        for copy in self._copies:
            target = self._host[copy.at : copy.end].view(torch.float32)
            target.copy_(partition.read(copy.source, copy.first, copy.numel), non_blocking=True)

    def wait(self) -> None:
        """Order what this thread does next to the sources after the copy: the host waits for it, on CUDA the stream alone."""
        self._issued.wait()
        if self._stream is not None:
            torch.cuda.current_stream().wait_event(self._done)


def image_of(data: Tensor) -> memoryview:
    """The memory of a 1-D uint8 host tensor."""
    return data.numpy().data.cast("B")
