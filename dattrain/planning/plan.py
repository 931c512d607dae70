"""What a run needs (memory, time, reading, saving), as numbers. The memory of a device is in ``memory``. Needs no GPU."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

from dattrain.config.derive import SAMPLES, derive, with_micro_batch
from dattrain.config.schema import Config
from dattrain.config.values import as_pair
from dattrain.data.factory import assign_class_numbers
from dattrain.data.source.dataset import ShardDataset, open_dataset
from dattrain.data.source.listing import is_remote
from dattrain.data.source.sample import Dataset
from dattrain.engine import memory, micro_batch
from dattrain.engine.micro_batch import BESIDE, by_memory, largest_size
from dattrain.errors import ConfigError, UserError
from dattrain.models import flops
from dattrain.observe.metrics import read as read_metrics
from dattrain.planning.decoding import decoding
from dattrain.submit import cluster, cpu_time
from dattrain.tasks.create import create_task

IMAGE_BYTES = 110_000
"""Mean size of an ImageNet JPEG (some 140 GB for 1.28 million), where the shards are not at hand."""


@dataclass(frozen=True)
class Resources:
    """What a run is to have. Messages name the options of ``dattrain plan``."""

    nodes: int = 1
    gpus_per_node: int | None = None
    """Devices of a node, or CPU tasks; None takes the profile's, else 8."""
    cpu_cores: int | None = None
    """Cores of a CPU task, where there are no devices: for a bound on the time."""
    cluster: str | None = None
    """A profile, for its devices, ``signal_delay_s`` and time limit."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Whose kernels keep what for backward."""
    device_gb: float = 80.0
    """Memory of a device, in 10^9 bytes."""
    images_per_second: float | None = None
    """Rate of all devices together, measured or expected."""
    samples: int | None = None
    """Training images, where neither shards nor labels tell."""
    write_mb_per_s: float = 500.0
    """What one rank writes to the run folder's file system."""


def plan(config: Config, resources: Resources, measured: float | None = None) -> dict[str, Any]:
    """All numbers of a plan: bytes, seconds and counts by name, and ``problems`` in words.

    Args:
        config: the recipe.
        resources: what it is to run on.
        measured: images per second of all devices together, as measured, where ``resources`` expects none.

    Raises:
        ConfigError: the batch does not divide over the devices; the profile is wrong.
        UserError: nothing tells how many training images there are.
    """
    profile = cluster.load(resources.cluster) if resources.cluster else None
    per_node = resources.gpus_per_node or (profile.tasks if profile else 8)
    if resources.nodes < 1 or per_node < 1:
        raise ConfigError(f"--nodes {resources.nodes} of {per_node} device(s): at least 1 of each")
    world = resources.nodes * per_node
    samples, samples_from, image_bytes, bytes_from = _data(config, resources.samples)
    per_epoch = samples or config.train.global_batch  # unknown where nothing hangs on it
    derived = derive(config, world=world, samples_per_epoch=per_epoch)
    asked = config.train.micro_batch
    if asked == "auto":
        budget = resources.device_gb * 1e9 - (BESIDE if resources.device == "cuda" else 0)
        config = with_micro_batch(
            config, by_memory(config, world, device=resources.device, budget=budget)[-1]
        )
        derived = derive(config, world=world, samples_per_epoch=per_epoch)
    task, largest = create_task(config), largest_size(config)
    with torch.device("meta"):
        parameters = flops.parameters(task.build(config.model.img_size))
        model = task.build(largest)
    forward = task.flops(config.model.img_size)
    kept = {}
    for mode in ("none", "selective", "block", "stage"):
        changed = config.model_copy(
            update={"train": config.train.model_copy(update={"activation_checkpointing": mode})}
        )
        try:
            kept[mode] = memory.activations(
                model, changed, micro_batch=derived.micro_batch, img_size=largest, device=resources.device
            )
        except UserError:  # a network that cannot recompute in this way, nor was asked to
            if mode == config.train.activation_checkpointing:
                raise
    ema = config.train.ema_decay > 0
    states = {
        stage: memory.states(
            parameters, world=world, stage=stage, precision=config.train.precision, ema=ema, device=resources.device,
            offload=config.zero.offload.optimizer is not None,
        )
        for stage in (0, 1, 2, 3)
    }  # fmt: skip
    own, act = states[config.zero.stage], kept[config.train.activation_checkpointing]
    saved = memory.checkpoint_bytes(parameters, ema=ema)
    save_s = saved / world / (resources.write_mb_per_s * 1e6)
    rate = resources.images_per_second or measured
    step_s = config.train.global_batch / rate if rate else None
    steps = derived.last_step
    total = own.total + act.peak
    delay = profile.signal_delay_s if profile else None
    bound = None
    if resources.cpu_cores is not None:
        bound = cpu_time.bound(config, samples=per_epoch, tasks=world, cores=resources.cpu_cores)
    problems = []
    if total > resources.device_gb * 1e9:
        problems.append(
            f"a device needs {total / 1e9:.1f} GB and has {resources.device_gb:g}: lower train.micro_batch, or use train.activation_checkpointing"
        )
    if delay is not None and save_s + (step_s or 0.0) > delay:
        problems.append(
            f"a step and a save take {save_s + (step_s or 0.0):.0f} s, but signal_delay_s of {resources.cluster} is {delay}: raise it"
        )
    return {
        "parameters": parameters,
        "flops_per_image": forward,
        "world": world,
        "micro_batch": derived.micro_batch,
        "micro_batch_asked": asked,
        "accumulation": derived.accumulation,
        "samples_per_epoch": samples,
        "samples_from": samples_from,
        "steps": steps,
        "bytes_per_device": {
            "weights": own.weights, "gradients": own.gradients, "optimizer": own.optimizer, "ema": own.ema,
            "buffers": own.buffers + own.working, "activations_kept": act.kept, "activations_peak": act.peak, "total": total,
        },
        "states_by_stage": {str(stage): s.total for stage, s in states.items()},
        "activations_by_mode": {mode: {"kept": a.kept, "peak": a.peak} for mode, a in kept.items()},
        "img_size": micro_batch.shown(config, config.model.img_size),
        "activations_img_size": micro_batch.shown(config, largest),
        "checkpoint_bytes": saved,
        "save_s": save_s,
        "write_mb_per_s": resources.write_mb_per_s,
        "signal_delay_s": delay,
        "images_per_s": rate,
        "images_per_s_from": "given" if resources.images_per_second else "measured" if measured else None,
        "step_s": step_s,
        "image_bytes": image_bytes,
        "image_bytes_from": bytes_from,
        "read_bytes_per_s": rate * image_bytes if rate else None,
        "decoding": _decoding(config, rate, resources.nodes, world),
        "hours": steps * config.train.global_batch / rate / 3600 if rate else None,
        "cpu_time": None if bound is None else {**asdict(bound), "cores": resources.cpu_cores, "words": bound.words},
        "device_gb": resources.device_gb,
        "problems": problems,
    }  # fmt: skip


def _decoding(config: Config, rate: float | None, nodes: int, world: int) -> dict[str, Any] | None:
    """Cores and workers for ``rate``; None where it is not known, or the rate of a core is not."""
    if rate is None or config.task.kind != "classification" or config.data.decoder != "cpu":
        return None
    size, randaugment = as_pair(config.model.img_size), config.augment.randaugment is not None
    found = decoding(rate, size, nodes=nodes, world=world, randaugment=randaugment)
    return {**asdict(found), "workers_set": config.data.workers}


def measured_rate(run: Path) -> float | None:
    """Median images/s of a run's last rows."""
    rates = [row["images_per_s"] for row in read_metrics(run)[-200:] if row.get("images_per_s")]
    return median(rates) if rates else None


def _data(config: Config, given: int | None) -> tuple[int | None, str, float, str]:
    """Samples per epoch (None where a schedule in updates does not ask for them) and mean bytes of a sample, each with where it is from.

    Raises:
        UserError: nothing tells how many samples there are; classes that do not fit the head.
    """
    if given is not None:
        return given, "given", IMAGE_BYTES, "ImageNet's mean"
    if config.data.train is not None and not is_remote(config.data.train):
        try:
            dataset = open_dataset(config.data.train)
        except UserError:
            # Planned where the shards are not; then the label set tells, or nothing need.
            if config.data.labels is None and config.schedule.updates is None:
                raise
        else:
            try:
                assign_class_numbers(config, "train", dataset, None)
                samples, size = _count(dataset)
            finally:
                dataset.close()
            return samples, "the data", size, "the data"
    if config.data.labels is not None:
        return (
            SAMPLES[config.data.labels],
            f"data.labels={config.data.labels}",
            IMAGE_BYTES,
            "ImageNet's mean",
        )
    if config.schedule.updates is not None:
        return None, f"schedule.updates={config.schedule.updates}", IMAGE_BYTES, "ImageNet's mean"
    raise UserError(
        "neither data.train (local shards) nor data.labels tells how many images there are: give --samples N"
    )


def _count(dataset: Dataset) -> tuple[int, float]:
    """Samples and mean bytes of a sample of local shards or an image folder."""
    samples = int(dataset.counts.sum())
    if isinstance(dataset, ShardDataset):
        return samples, float(dataset.shards.sizes.sum()) / samples
    chosen = range(0, samples, max(1, samples // 64))
    return samples, sum(len(dataset.read(0, n).data) for n in chosen) / len(chosen)
