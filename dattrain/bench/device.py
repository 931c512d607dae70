"""Timing on a CUDA device: what the kernels take, not what Python takes to launch them."""

from __future__ import annotations

from collections.abc import Callable

import torch


class DeviceClock:
    """A clock for ``common.compare`` that stands still but for the calls it was given.

    A call is captured as a CUDA graph where it can be, and each replay lies between two events. Before it a buffer twice as large
    as the L2 cache is overwritten, outside of the events: in training nobody leaves a kernel's inputs in the cache.
    """

    def __init__(self, device: torch.device) -> None:

        self._device = device
        self._seconds = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def timed(self, call: Callable[[], object], name: str, notes: list[str]) -> Callable[[], object]:
        """``call`` between events, as a graph; launched anew each time, with a line in ``notes``, where it cannot be captured."""
        try:
            run = self._captured(call)
        except RuntimeError as error:
            torch.cuda.synchronize(self._device)
            notes.append(f"{name}: timed without a CUDA graph: {str(error).splitlines()[0]}")
            run = call

        def turn() -> None:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            begin.record()
            run()
            end.record()
            self._marks.append((begin, end))

        return turn

    def __call__(self) -> float:
        """Seconds that all calls so far took; waits for the device."""
        torch.cuda.synchronize(self._device)
        self._seconds += sum(begin.elapsed_time(end) for begin, end in self._marks) / 1e3
        self._marks.clear()
        return self._seconds

    def _captured(self, call: Callable[[], object]) -> Callable[[], object]:

        # What a first call does once (compiling, choosing algorithms) must not be captured.
        current, side = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The same stream: gradients of leaves belong to the one on which a leaf was first used.
        with torch.cuda.graph(graph, stream=side):
            call()
        return graph.replay
