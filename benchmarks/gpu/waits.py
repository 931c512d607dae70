"""Stage ``waits``: where the host waits for the device in an update, counted by place.

On CUDA torch warns of every call of its own that waits (``torch.cuda.set_sync_debug_mode``), but for explicit
``synchronize()``s, which are counted by standing in for them.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.job import Job
from benchmarks.gpu.updates import TINY
from dattrain.bench import step
from dattrain.bench.attention import pick_device
from dattrain.bench.contender import open_contender
from dattrain.runtime import environment

AGREED = (
    "dattrain/engine/step.py",
    "dattrain/engine/step_status.py",
    "is_invalid_grad_norm",
    "mask_nan_or_inf_with_val_inplace",
    "dattrain/bench/",
)
"""Where an update's numbers are fetched and agreed on; and the bench, which reads them as the trainer does."""
MESSAGE = "synchronizing CUDA operation"


def run(job: Job) -> None:
    """One update of DAT-T with ZeRO-2 in bf16, two micro-batches, after a few that warm up."""
    device = pick_device(job.device)
    words = TINY if job.dry else ("train.micro_batch=64",)
    config = step.read([*words], 2)
    with environment.process_group(environment.resolve({}), device):
        contender = open_contender("recipe", config, device, [])
        assert contender is not None  # a micro-batch this small fits
        for _ in range(1 if job.dry else 4):
            contender()
        with counted(device) as places:
            contender()
        contender.close()
    others = {place: count for place, count in places.items() if not any(part in place for part in AGREED)}
    job.figure("host waits of an update", sum(places.values()))
    job.figure("host waits inside an update that agree on nothing", sum(others.values()))
    for place, count in places.most_common():
        job.figure(place, count, "times")


@contextmanager
def counted(device: torch.device) -> Iterator[Counter[str]]:
    """The places that waited for ``device`` inside the block, each with its count, filled in as they happen."""
    places: Counter[str] = Counter()

    def note(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        if MESSAGE in str(message):
            places[place(traceback.extract_stack())] += 1
        else:
            print(f"{filename}:{lineno}: {category.__name__}: {message}", flush=True)

    def standing_in(call: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            places[place(traceback.extract_stack())] += 1
            return call(*args, **kwargs)

        return stand_in

    explicit: list[Any] = [torch.cuda, torch.cuda.Event, torch.cuda.Stream]
    if device.type == "cpu":
        from deepspeed.accelerator import get_accelerator

        explicit = [get_accelerator()]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]  # it does not care where to
        for owner in explicit:
            kept = owner.synchronize
            owner.synchronize = standing_in(kept)
            stack.callback(setattr, owner, "synchronize", kept)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        yield places


def place(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost frame of ours or of DeepSpeed's in a stack, oldest first: file, line and function."""
    for frame in reversed(stack):
        for name, root in _roots().items():
            if Path(frame.filename).is_relative_to(root):
                return (
                    f"{name}/{Path(frame.filename).relative_to(root).as_posix()}:{frame.lineno} {frame.name}"
                )
    ours = {__file__, warnings.__file__}
    frame = next((f for f in reversed(stack) if f.filename not in ours), stack[-1])
    return f"{frame.filename}:{frame.lineno} {frame.name}"


@lru_cache
def _roots() -> dict[str, Path]:
    found = {name: find_spec(name) for name in ("dattrain", "deepspeed")}
    return {name: Path(spec.origin).parent for name, spec in found.items() if spec and spec.origin}
