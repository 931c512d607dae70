"""A recipe's updates on several numbers of GPUs, by the model of ``scaling``, and which settings should change on the way."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dattrain.config.derive import divisors, micro_batch
from dattrain.config.schema import Config
from dattrain.config.values import as_pair
from dattrain.engine.micro_batch import BESIDE, MOST
from dattrain.engine.precision import REDUCE_BUCKET, WEIGHTS
from dattrain.errors import ConfigError
from dattrain.models import flops
from dattrain.planning.scaling import Constants, Layer, Layout, Rate, Work, buckets, update
from dattrain.tasks.create import create_task

BUCKETS = (1_000_000, 2_000_000, REDUCE_BUCKET, 10_000_000, 20_000_000, 50_000_000, 200_000_000)
"""Elements of a reduction bucket that are compared."""
RECOMPUTED = {"none": 1.0, "selective": 1.0, "block": 4 / 3, "stage": 4 / 3}
"""Work by ``train.activation_checkpointing``: a second forward pass beside forward and a backward of twice that; what
``selective`` computes again is counted as nothing."""
WORTH = 0.01
"""Share of an update that a change must save to be named."""


def largest_micro_batch(figures: dict[str, Any]) -> int:
    """Images that a device holds at a time, by a plan's memory of one micro-batch, which grows with its images."""
    memory = figures["bytes_per_device"]
    left = figures["device_gb"] * 1e9 - BESIDE - (memory["total"] - memory["activations_peak"])
    taken: int = figures["micro_batch"]
    return max(taken, min(MOST["cuda"], int(left / (memory["activations_peak"] / taken))))


def _compare(
    work: Work, layout: Layout, rate: Rate, constants: Constants, name: str, values: Sequence[int]
) -> dict[int, float]:
    """Seconds of an update by values of one field of the layout."""
    changed: dict[int, dict[str, Any]] = {value: {name: value} for value in values}
    return {
        value: update(work, replace(layout, **change), rate, constants).seconds
        for value, change in changed.items()
    }


def work_of(config: Config) -> Work:
    """The recipe's work, counted on the meta device."""
    task = create_task(config)
    size = as_pair(task.input_size(config.model.img_size))
    with torch.device("meta"):
        model = task.build(config.model.img_size)
    by_name = flops.by_module(model, size, config.model.in_chans)
    total = float(sum(by_name.values()))
    layers = tuple(
        Layer(tuple(p.numel() for p in module.parameters(recurse=False)), by_name.get(name, 0) / total)
        for name, module in model.named_modules()
        if name in by_name or next(module.parameters(recurse=False), None) is not None
    )
    return Work(
        global_batch=config.train.global_batch,
        layers=layers,
        flops=total,
        operations=operations(model, size, config.model.in_chans),
        element_bytes=WEIGHTS[config.train.precision].itemsize,
        recomputed=RECOMPUTED[config.train.activation_checkpointing],
        averaged=config.train.ema_decay > 0,
    )


def operations(model: nn.Module, size: tuple[int, int], in_chans: int = 3) -> int:
    """Calls of forward and backward that write something, views left out; on the meta device, ``model`` is left alone."""
    network = deepcopy(model).to("meta").train()
    run = getattr(network, "forward_dummy", network)
    count = _Count()
    with count:
        outputs = run(torch.empty(2, in_chans, *size, device="meta"))
        found = [x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, Tensor)]
        torch.stack([x.sum() for x in found if x.requires_grad]).sum().backward()
    return count.number


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.number += not views
        return func(*args, **(kwargs or {}))


def table(
    config: Config,
    worlds: Sequence[int],
    *,
    per_node: int,
    constants: Constants,
    rates: Sequence[tuple[int, float]] = (),
    fits: int,
    image_bytes: float = 0.0,
    steps: int | None = None,
) -> dict[str, Any]:
    """An update on each number of devices, as the recipe divides it and with the one setting changed that helps most.

    Args:
        worlds: numbers of devices.
        per_node: devices of a node.
        rates: images/s of one device by micro-batch, as measured; none takes ``Rate.assumed``.
        fits: images that a device's memory holds at a time (``largest_micro_batch``).
        image_bytes: mean of a sample.
        steps: updates of the run, for its hours.

    Raises:
        ConfigError: the batch does not divide over some number of devices; the recipe offloads, which the model does not know.
    """
    if config.zero.offload.optimizer is not None or config.zero.offload.param is not None:
        raise ConfigError(
            "--scaling does not know what zero.offload costs: leave it out to estimate without it"
        )
    worlds = sorted(set(worlds))
    stage, train = config.zero.stage, config.train
    work = work_of(config)
    ways = {"as it is": (train.compile, train.cuda_graphs), "train.compile=block": ("block", False)}
    ways["train.cuda_graphs=true"] = ("block", True)
    assumed = {
        name: Rate.assumed(work, constants, compile=compile, cuda_graphs=graphs)
        for name, (compile, graphs) in ways.items()
    }
    rate = Rate.measured(rates) if rates else assumed["as it is"]
    bucket = int(config.zero.extra.get("reduce_bucket_size", REDUCE_BUCKET))
    group = config.augment.group if config.data.reader == "webdataset" else 1
    asked = fits if train.micro_batch == "auto" else train.micro_batch
    bounded = config.model_copy(update={"train": train.model_copy(update={"micro_batch": asked})})
    stages = [s for s in (0, 1, 2, 3) if s or train.precision in ("fp32", "bf16")]
    # CUDA graphs are for stage 2 alone. Stage 3 is shown and not advised: what its hooks take of the host is not known.
    allowed = [2] if train.cuda_graphs else [s for s in stages if s < 3]
    alone = Layout(1, per_node, micro_batch(bounded, 1), stage, bucket)
    single = work.global_batch / update(work, alone, rate, constants).seconds
    rows = []
    for world in worlds:
        layout = Layout(world, per_node, micro_batch(bounded, world), stage, bucket)
        found = update(work, layout, rate, constants)
        nodes = -(-world // per_node)
        images = work.global_batch / found.seconds
        sizes = [m for m in divisors(work.global_batch // world) if m <= fits and m % group == 0]
        seconds = {
            "micro_batch": _compare(work, layout, rate, constants, "micro_batch", sizes),
            "stage": _compare(work, layout, rate, constants, "stage", stages),
            "bucket": _compare(work, layout, rate, constants, "bucket", BUCKETS if stage else ()),
        }
        better = {}
        for name, times in seconds.items():
            free = {value: s for value, s in times.items() if name != "stage" or value in allowed}
            best = min(free, key=lambda value: free[value], default=None)
            if best is not None and found.seconds - free[best] >= WORTH * found.seconds:
                better[name] = {"value": best, "saves": 1 - free[best] / found.seconds}
        rows.append(
            {
                "world": world, "nodes": nodes, "micro_batch": layout.micro_batch,
                "accumulation": work.global_batch // (world * layout.micro_batch),
                "seconds": found.seconds, "compute_s": found.compute, "reduction_s": found.reduction,
                "weights_s": found.weights, "optimizer_s": found.optimizer, "agreement_s": found.agreement,
                "communication_s": found.moved, "sent_bytes": found.sent,
                "images_per_s": images, "efficiency": images / (world * single),
                "compute_efficiency": work.global_batch / found.compute / (world * single),
                "hours": None if steps is None else steps * found.seconds / 3600,
                "node_images_per_s": images / nodes, "node_bytes_per_s": images / nodes * image_bytes,
                "node_cores": images / nodes / constants.images_per_core_s,
                "seconds_by": seconds, "better": better,
            }
        )  # fmt: skip
    short = [world for world in worlds if work.global_batch // world < rate.points[0][0]]
    return {
        "rows": rows, "least_micro_batch": rate.points[0][0], "too_small_from": short[0] if short else None, "per_node": per_node, "stage": stage, "bucket": bucket, "single_images_per_s": single,
        "single_micro_batch": alone.micro_batch, "rate": rate.source, "rate_points": rate.points,
        "least_s": {} if rates else {name: each.points[0][1] for name, each in assumed.items()},
        "largest_micro_batch": fits, "reductions": len(list(buckets(work.layers, bucket))),
        "gradient_bytes": work.elements * work.element_bytes, "operations": work.operations,
    }  # fmt: skip
