"""What a step needs of a device, found without one: the model runs on fake tensors, which have sizes and nothing else.

``activations`` follows every storage that forward and backward make and drop; ``states`` is arithmetic on what DeepSpeed
keeps per parameter (0.19.8, as ``dattrain.engine.zero`` sets it up). Not here: what the CUDA context, NCCL's buffers and the
allocator's gaps take, some 1 to 2 GB a device.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dattrain.config.derive import with_micro_batch
from dattrain.config.schema import Config
from dattrain.engine import activation_checkpointing
from dattrain.engine.precision import GRADIENTS, REDUCE_BUCKET, STAGE_0_BUCKET, WEIGHTS
from dattrain.models.blocks import recompute
from dattrain.tasks.create import create_task


@dataclass(frozen=True)
class Activations:
    """Bytes per device for one micro-batch; gradients of weights left out."""

    kept: int
    """Held from forward for backward, inputs included."""
    peak: int
    """At the worst moment of forward or backward."""


@dataclass(frozen=True)
class States:
    """Bytes per device that live as long as the run."""

    weights: int
    gradients: int
    optimizer: int
    """Both moments, and the fp32 master copy where there is one."""
    ema: int
    buffers: int
    """Standing buffers of DeepSpeed's."""
    working: int
    """More during backward: buckets, and the weights that stage 3 gathers."""

    @property
    def standing(self) -> int:
        """What is there between two steps."""
        return self.weights + self.gradients + self.optimizer + self.ema + self.buffers

    @property
    def total(self) -> int:
        """The most, activations left out."""
        return self.standing + self.working


def states(
    parameters: int,
    *,
    world: int,
    stage: int,
    precision: str,
    ema: bool = False,
    device: str = "cuda",
    offload: bool = False,
) -> States:
    """Bytes per device of weights, gradients, optimizer state, average and buffers.

    Args:
        parameters: number of trainable parameters.
        world: devices over which stages 1 to 3 partition.
        offload: whether the optimizer's state is in host memory.
    """
    p, share = parameters, -(-parameters // world)
    size, accumulated = WEIGHTS[precision].itemsize, GRADIENTS[precision].itemsize
    average = 4 * (p if stage == 0 else share) * ema
    if stage == 0:
        # Gradients are reduced through a flat copy.
        flat = size * min(p, STAGE_0_BUCKET) if world > 1 else 0
        return States(size * p, size * p, 8 * p, average, 0, flat)
    weights = size * (p if stage < 3 else share)
    gradients = accumulated * share
    bucket = size * REDUCE_BUCKET
    # With contiguous_gradients; two of them take turns where communication overlaps.
    buckets = bucket * (2 if device == "cuda" else 1)
    if stage == 1:
        # Gradients are not partitioned until the last micro-batch; bf16's are accumulated beside them in fp32.
        if precision == "bf16-pure":
            gradients += 4 * p
        buffers, working = 0, size * p + buckets
    elif stage == 2:
        buffers, working = 0, buckets
    else:
        # It keeps what backward will want again within stage3_max_reuse_distance (1e9 elements): the whole model.
        buffers, working = bucket, size * p if world > 1 else 0
    return States(weights, gradients, 0 if offload else 12 * share, average, buffers, working)


def activations(
    model: nn.Module,
    config: Config,
    *,
    micro_batch: int,
    img_size: int | tuple[int, int] | None = None,
    device: str = "cuda",
) -> Activations:
    """Follow one micro-batch (``Task.example``) through the task's loss and backward on fake tensors; ``model`` is left alone.

    Of a detector all heads' outputs are followed (``Detector.forward_dummy``), and what choosing anchors and regions takes is left out.

    On ``cuda`` what forward keeps is that of CUDA's kernels and autocast rules; backward cannot run on fake CUDA tensors
    without a driver, so its working memory is that of the CPU's.
    """
    size = img_size or config.model.img_size
    cpu = _follow(model, config, micro_batch, size, "cpu", backward=True)
    if device == "cpu":
        return cpu
    cuda = _follow(model, config, micro_batch, size, "cuda", backward=False)
    return Activations(cuda.kept, max(cuda.peak, cuda.kept + cpu.peak - cpu.kept))


def _follow(
    model: nn.Module,
    config: Config,
    micro_batch: int,
    size: int | tuple[int, int],
    device: str,
    *,
    backward: bool,
) -> Activations:
    from torch._subclasses.fake_tensor import FakeTensorMode

    precision = config.train.precision
    dtype = WEIGHTS[precision]
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    meta_model = copy.deepcopy(model, memo).to("meta").train()
    keep_statistics_local(meta_model)
    activation_checkpointing.apply(meta_model, config.train.activation_checkpointing)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        # cuDNN's sampling kernel has no shape function; the native one keeps the same.
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_overwrite_parameters())
        meta_model._apply(
            lambda t: torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype, device=device)
        )
        if config.train.channels_last:
            meta_model.to(memory_format=torch.channels_last)
        ledger = stack.enter_context(Ledger([*meta_model.parameters(), *meta_model.buffers()]))
        task = create_task(with_micro_batch(config, micro_batch))
        batch = task.example(micro_batch, size, torch.device(device), dtype=dtype)

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _autocast(device) if precision == "bf16" else nullcontext():
                return network(*args, **kwargs)

        # A detector's losses choose anchors and regions by values, which fake tensors do not have.
        network = getattr(meta_model, "forward_dummy", meta_model)
        if network is meta_model:
            loss = task.loss(forward, batch, noise=None, dtype=dtype).value
        else:
            kind = torch.channels_last if config.train.channels_last else torch.contiguous_format
            loss = _loss_of(forward(batch.images.to(dtype, memory_format=kind)))
        kept = ledger.current
        if not backward:
            return Activations(kept, ledger.peak)
        # Gradients are counted with the states: they are dropped as they come, as DeepSpeed takes them.
        for parameter in meta_model.parameters():
            parameter.register_post_accumulate_grad_hook(drop)
        loss.backward()
        return Activations(kept, ledger.peak)


def _loss_of(outputs: Any) -> Tensor:
    """A loss of all that a detector's heads give, which keeps an fp32 copy of it, as focal loss and cross-entropy do."""
    tensors = [x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
    return torch.stack([recompute(_cross_entropy, x.float()) for x in tensors]).sum()


def _cross_entropy(logits: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits), reduction="none").sum()


def keep_statistics_local(model: nn.Module) -> None:
    """Turn BatchNorm over all ranks into one over the device's own samples, in place: to measure, where not all ranks take part."""
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = _LocalBatchNorm  # type: ignore[assignment]


class _LocalBatchNorm(nn.BatchNorm2d):
    """Of any number of values: one alone is refused by torch's, and over all ranks there would be more."""

    def forward(self, x: Tensor) -> Tensor:
        args = self.weight, self.bias, self.running_mean, self.running_var, True, 0.1, self.eps, False
        return torch.batch_norm(x, *args)


def drop(parameter: Tensor) -> None:
    """Forget a gradient: what DeepSpeed does with each once it has taken it."""
    parameter.grad = None


@contextmanager
def _autocast(device: str) -> Iterator[None]:
    """``torch.autocast`` to bfloat16, which switches itself off where there is no such device."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


@contextmanager
def _overwrite_parameters() -> Iterator[None]:
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


class Ledger(TorchDispatchMode):
    """Bytes of all storages that operations have made within the block and that are still alive.

    Args:
        known: tensors whose storages do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = 0
        self.peak = 0
        self._seen: set[int] = {t.untyped_storage()._cdata for t in known}
        self._known = list(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._pin_memory.default:  # the host's memory, which fake tensors cannot have
            return args[0]
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        identity, size = storage._cdata, storage.nbytes()
        if identity in self._seen:
            return
        self._seen.add(identity)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, identity, size)

    def _remove(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.current -= size


def checkpoint_bytes(parameters: int, *, ema: bool) -> int:
    """Size of a checkpoint: fp32 weights and both moments, and the average."""
    return parameters * (16 if ema else 12)
