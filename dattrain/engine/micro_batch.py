"""How many samples a device takes at a time: the number that the recipe bounds, or with ``auto`` what its memory holds.

The batch is the recipe's, the micro-batch the machine's: accumulating changes no number but by rounding, so a run may resume
with another one.
"""

from __future__ import annotations

import gc
import logging
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from dattrain.config.derive import divisors, micro_batch, with_micro_batch
from dattrain.config.schema import Config
from dattrain.config.values import Size, as_pair
from dattrain.engine import activation_checkpointing, memory
from dattrain.engine.precision import WEIGHTS
from dattrain.errors import UserError
from dattrain.runtime import collectives, host_memory
from dattrain.tasks.base import Task
from dattrain.tasks.create import create_task

MOST = {"cpu": 64, "cuda": 512}
"""What ``auto`` takes at most: from there on a device is busy, and more would only take memory and delay the start."""
BESIDE = 2_000_000_000
"""Bytes on a GPU that the memory model leaves out: the CUDA context, NCCL's buffers, the allocator's gaps (``memory``)."""
HOST_SHARE = 0.5
"""Of the host's memory that is free: the data workers and the file cache want theirs."""

log = logging.getLogger(__name__)


def settle(config: Config, world: int, device: torch.device, local_world: int) -> Config:
    """The recipe with the micro-batch that every rank takes, which a line tells where it is not the recipe's. Collective.

    Args:
        local_world: ranks that share the host.

    Raises:
        ConfigError: as ``config.derive.micro_batch``.
        UserError: not even the smallest one fits the device.
    """
    train = config.train
    share = f"{train.global_batch // world} samples a device ({train.global_batch} over {world})"
    if train.micro_batch != "auto":
        size = micro_batch(config, world)
        if size != train.micro_batch:
            log.info(
                "train.micro_batch=%d is an upper bound: %d is the largest number up to it that divides %s",
                train.micro_batch, size, share,
            )  # fmt: skip
        return with_micro_batch(config, size)
    micro_batch(config, world)  # refuses what does not divide
    if device.type == "cuda":
        torch.cuda.empty_cache()
        budget = torch.cuda.mem_get_info(device)[0] - BESIDE
    else:
        budget = int(HOST_SHARE * host_memory.available() / local_world)
    fits = by_memory(config, world, device=device.type, budget=min(collectives.all_gather(budget)))
    while device.type == "cuda" and not all(collectives.all_gather(_trial(config, fits[-1], world, device))):
        if len(fits) == 1:
            smaller = "model.img_size"
            if config.task.kind != "classification":
                smaller = "geometry.long_side" if config.geometry.crop is None else "geometry.crop"
            raise UserError(
                f"train.micro_batch=auto: not even {fits[0]} sample(s) of {config.model.name} at {shown(config, largest_size(config))} fit "
                f"{device}; use train.activation_checkpointing, a smaller {smaller}, or a device with more memory"
            )
        log.info("train.micro_batch=auto: a trial step of %d did not fit", fits[-1])
        fits.pop()
    checked = ", as a trial step confirmed" if device.type == "cuda" else ""
    log.info(
        "train.micro_batch=auto: %d at a time of %s, by the %.1f GB that are free%s",
        fits[-1], share, budget / 1e9, checked,
    )  # fmt: skip
    return with_micro_batch(config, fits[-1])


def by_memory(config: Config, world: int, *, device: str, budget: float) -> list[int]:
    """Micro-batches, ascending, that divide a rank's share and fit ``budget`` bytes by ``memory``'s model; the smallest one always.

    Activations grow linearly with the samples: two sizes tell all.
    """
    size = largest_size(config)
    with torch.device("meta"):
        model = create_task(config).build(size)
    two, four = (
        memory.activations(model, config, micro_batch=count, img_size=size, device=device).peak
        for count in (2, 4)
    )
    each = max(1, (four - two) // 2)
    fixed = max(0, two - 2 * each) + _states(model, config, world, device).total
    group = config.augment.group if config.data.reader == "webdataset" else 1
    sizes = [d for d in divisors(config.train.global_batch // world) if d % group == 0 and d <= MOST[device]]
    sizes = sizes or [micro_batch(config, world)]
    return [sizes[0], *(count for count in sizes[1:] if fixed + each * count <= budget)]


def largest_size(config: Config) -> Size:
    """The largest image size of the run."""
    sizes = [config.model.img_size, *(phase.img_size for phase in config.train.progressive)]
    return max(sizes, key=lambda size: math.prod(as_pair(size)))


def shown(config: Config, img_size: Size) -> Size:
    """Pixels of a training step's images (``Task.input_size``), for people: a side, or height and width."""
    height, width = as_pair(create_task(config).input_size(img_size))
    return height if height == width else (height, width)


def _states(model: nn.Module, config: Config, world: int, device: str) -> memory.States:
    return memory.states(
        sum(p.numel() for p in model.parameters()),
        world=world,
        stage=config.zero.stage,
        precision=config.train.precision,
        ema=config.train.ema_decay > 0,
        device=device,
        offload=config.zero.offload.optimizer is not None,
    )


def _trial(config: Config, count: int, world: int, device: torch.device) -> bool:
    """Whether one forward and backward pass fits beside what DeepSpeed will hold. Nothing of it stays on the device."""
    fits = True
    try:
        config = with_micro_batch(config, count)
        _pass(create_task(config), config, count, world, device)
    except torch.OutOfMemoryError:
        fits = False
    # Only now: while it is handled, the error holds the frames, and these the tensors.
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return fits


def _pass(task: Task, config: Config, count: int, world: int, device: torch.device) -> None:
    train, size = config.train, largest_size(config)
    dtype = WEIGHTS[train.precision]
    model = task.build(size).to(device, dtype).train()
    if train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    memory.keep_statistics_local(model)  # a rank without memory would leave the others waiting
    activation_checkpointing.apply(model, train.activation_checkpointing)
    states = _states(model, config, world, device.type)
    # Weights are the model's own; gradients are dropped as they come, as DeepSpeed takes them.
    beside = torch.empty(max(0, states.total - states.weights), dtype=torch.uint8, device=device)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(memory.drop)
    batch = task.example(count, size, device, dtype=dtype)

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, torch.bfloat16) if train.precision == "bf16" else nullcontext():
            return model(*args, **kwargs)

    task.loss(forward, batch, noise=None, dtype=dtype).value.backward()
    torch.cuda.synchronize(device)
    del beside
