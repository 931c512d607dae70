"""Where the host would wait for a CUDA device, counted on a machine without one.

``fake_cuda`` runs code on fake CUDA tensors, which have a device and a shape and nothing else: it finds copies from memory that
is not pinned, copies that block, and reads of values. What needs the values themselves cannot run so; ``on_the_cpu`` counts the
reads of code that really runs, on CPU tensors, with DeepSpeed's calls of ``synchronize``. Both count by place::

    with fake_cuda() as waits:
        model = faked(zoo.create("dat_pp_tiny"))
        model(torch.empty(2, 3, 224, 224, device="cuda"))
    assert not waits.found, waits.report()

Not seen: operators that wait inside, beyond those in ``DATA_DEPENDENT``, and how long a wait lasts.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
READ = frozenset({"_local_scalar_dense", "is_nonzero", "equal"})
DATA_DEPENDENT = frozenset({"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"})
M = TypeVar("M", bound=nn.Module)


class HostWaits(TorchDispatchMode):
    """Counts waits within the block. ``device`` is the type of the tensors that a wait would be for."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.found: Counter[str] = Counter()
        """``what path:line source`` of every wait: how often."""
        self._pinned: dict[int, Any] = {}  # storages, held so that no other gets their address

    @property
    def total(self) -> int:
        """All waits."""
        return self.found.total()

    def clear(self) -> None:
        """Forget what was found."""
        self.found.clear()

    def report(self) -> str:
        """A line per place, the most frequent first."""
        return "\n".join(f"{count:4d} x {place}" for place, count in self.found.most_common())

    def add(self, what: str) -> None:
        """Count a wait at the place of the caller that is nearest and the project's, or DeepSpeed's."""
        self.found[f"{what} {_place()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(t.device.type == self.device for t in tensors)
        if name in READ and on_device:
            self.add("read")
        if name in DATA_DEPENDENT and on_device:
            self.add(name)
        if name in ("index", "index_put_", "index_put") and on_device:
            for index in args[1]:
                if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                    self.add("index by a mask")
        if self.device == "cpu":
            return func(*args, **kwargs)
        if name == "_pin_memory":
            return self._pin(tensors[0].clone())
        if name == "is_pinned":
            return self._is_pinned(tensors[0])
        if name == "_to_copy" and kwargs.get("device") is not None:
            self._copied(tensors[0], torch.device(kwargs["device"]).type, kwargs.get("non_blocking", False))
        if name == "copy_":
            asynchronous = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
            self._copied(tensors[1], tensors[0].device.type, asynchronous)
        pinned = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        return self._pin(out) if pinned else out

    def _copied(self, source: Tensor, target: str, asynchronous: bool) -> None:
        here = source.device.type
        if here == target or self.device not in (here, target):
            return
        if not asynchronous:
            self.add(f"copy {here} to {target}")
        elif here == "cpu" and not self._is_pinned(source):
            self.add(f"copy {here} to {target} of memory that is not pinned")

    def _pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned


@contextmanager
def fake_cuda() -> Iterator[HostWaits]:
    """Tensors made in the block are fake, and waits for those on ``cuda`` are counted. Backward cannot run without a driver."""
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        # cuDNN's sampling kernel has no shape function; the native one launches as much.
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        waits = stack.enter_context(HostWaits("cuda"))
        # Without a device torch refuses before it asks anybody.
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda t: waits._pin(t.clone())))
        yield waits


@contextmanager
def on_the_cpu() -> Iterator[HostWaits]:
    """Reads of CPU tensors are counted, and every call of ``synchronize`` of the device that DeepSpeed works with."""
    from deepspeed.accelerator import get_accelerator

    with HostWaits("cpu") as waits, ExitStack() as stack:
        plain = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            waits.add("read")  # on a CPU it passes by the dispatcher
            return plain(tensor)

        stack.enter_context(mock.patch.object(Tensor, "tolist", tolist))
        for owner in (get_accelerator(), torch.cuda):
            stopped = mock.patch.object(owner, "synchronize", lambda *a, **k: waits.add("SYNCHRONIZE"))
            stack.enter_context(stopped)
        yield waits


def faked(model: M, device: str = "cuda") -> M:
    """``model`` with fake weights on ``device``; in ``fake_cuda``. The real ones are lost."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))  # type: ignore[no-untyped-call]
        return model
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        file = frame.filename
        if "/deepspeed/" in file and "site-packages" in file:
            return f"{file[file.rindex('/deepspeed/') + 1 :]}:{frame.lineno} {frame.line}"
        if file.startswith(str(ROOT / "dattrain")):
            return f"{Path(file).relative_to(ROOT)}:{frame.lineno} {frame.line}"
    return "elsewhere"
