"""``dattrain plan``: what a run needs (memory, time, reading, saving) before anything is queued. Needs no GPU."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dattrain.config.schema import Config
    from dattrain.data.source.sample import Dataset

SAMPLES = {
    "imagenet-1k": 1_281_167,
    "imagenet-12k": 12_129_687,
    "imagenet-22k": 14_197_122,
    "imagenet-22k-winter21": 13_151_276,
    "imagenet-21k-p": 11_060_223,
}
"""Training images of the label sets, as their makers state them."""
IMAGE_BYTES = 110_000
"""Mean size of an ImageNet JPEG (some 140 GB for 1.28 million), where the shards are not at hand."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "config", metavar="CONFIG|RUN", help="a recipe, or a run folder, whose measured speed is used"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (1)")
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="devices of a node (the profile's, else 8)"
    )
    parser.add_argument(
        "--cluster", metavar="NAME", help="profile, for its devices, signal_delay_s and time limit"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="whose kernels keep what (cuda)"
    )
    parser.add_argument(
        "--device-gb", type=float, default=80.0, metavar="GB", help="memory of a device, in 10^9 bytes (80)"
    )
    parser.add_argument(
        "--images-per-second", type=float, metavar="X", help="of the whole job, measured or expected"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="training images, where neither shards nor labels tell"
    )
    parser.add_argument(
        "--write-mb-per-s", type=float, default=500.0, metavar="X",
        help="what one rank writes to the run folder's file system (an assumption: 500)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="as JSON, in bytes, seconds and counts")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where a device is too small, or a save does not fit before the signal's end.

    Raises:
        ConfigError: as ``plan``; the recipe is wrong, or a fine-tune that starts from nowhere.
        UserError: one that starts from what is not there.
    """
    import json
    from pathlib import Path

    from dattrain.config.derive import check_source
    from dattrain.config.load import load
    from dattrain.submit.history import newest_checkpoint

    folder = Path(args.config)
    path = folder / "config.yaml" if (folder / "config.yaml").is_file() else folder
    config = load(path, args.overrides).config
    if newest_checkpoint(folder) is None:
        check_source(config)
    found = plan(config, args, measured=_measured(folder) if folder.is_dir() else None)
    print(json.dumps(found, indent=2) if args.json else render(config, found))
    return 1 if found["problems"] else 0


def plan(config: Config, args: argparse.Namespace, measured: float | None = None) -> dict[str, Any]:
    """All figures of a plan.

    Raises:
        ConfigError: the batch does not divide over the devices; the profile is wrong.
    """
    from dattrain.config.derive import derive
    from dattrain.engine.session import build_model
    from dattrain.errors import ConfigError
    from dattrain.models import flops
    from dattrain.planning import memory
    from dattrain.submit import cluster

    profile = cluster.load(args.cluster) if args.cluster else None
    per_node = args.gpus_per_node or (profile.tasks if profile else 8)
    if args.nodes < 1 or per_node < 1:
        raise ConfigError(f"--nodes {args.nodes} of --gpus-per-node {per_node}: at least 1 of each")
    world = args.nodes * per_node
    samples, samples_from, image_bytes, bytes_from = _data(config, args.samples)
    derived = derive(config, world=world, samples_per_epoch=samples)
    sizes = [config.model.img_size, *(p.img_size for p in config.train.progressive)]
    largest = max(sizes, key=lambda s: s * s if isinstance(s, int) else s[0] * s[1])
    model = build_model(config, config.model.img_size)
    parameters = flops.parameters(model)
    forward = flops.flops(model, config.model.img_size, config.model.in_chans)
    if largest != config.model.img_size:
        model = build_model(config, largest)
    kept = {}
    for mode in ("none", "selective", "block", "stage"):
        changed = config.model_copy(update={"train": config.train.model_copy(update={"remat": mode})})
        kept[mode] = memory.activations(
            model, changed, micro_batch=config.train.micro_batch, img_size=largest, device=args.device
        )
    ema = config.train.ema_decay > 0
    states = {
        stage: memory.states(
            parameters, world=world, stage=stage, precision=config.train.precision, ema=ema, device=args.device,
            offload=config.zero.offload.optimizer is not None,
        )
        for stage in (0, 1, 2, 3)
    }  # fmt: skip
    mine, act = states[config.zero.stage], kept[config.train.remat]
    saved = memory.checkpoint_bytes(parameters, ema=ema)
    save_s = saved / world / (args.write_mb_per_s * 1e6)
    rate = args.images_per_second or measured
    step_s = config.train.global_batch / rate if rate else None
    steps = derived.last_step
    total = mine.total + act.peak
    delay = profile.signal_delay_s if profile else None
    problems = []
    if total > args.device_gb * 1e9:
        problems.append(
            f"a device needs {total / 1e9:.1f} GB and has {args.device_gb:g}: lower train.micro_batch, or use train.remat"
        )
    if delay is not None and save_s + (step_s or 0.0) > delay:
        problems.append(
            f"a step and a save take {save_s + (step_s or 0.0):.0f} s, but signal_delay_s of {args.cluster} is {delay}: raise it"
        )
    return {
        "parameters": parameters,
        "flops_per_image": forward,
        "world": world,
        "micro_batch": config.train.micro_batch,
        "accumulation": derived.accumulation,
        "samples_per_epoch": samples,
        "samples_from": samples_from,
        "steps": steps,
        "bytes_per_device": {
            "weights": mine.weights, "gradients": mine.gradients, "optimizer": mine.optimizer, "ema": mine.ema,
            "buffers": mine.buffers + mine.working, "activations_kept": act.kept, "activations_peak": act.peak, "total": total,
        },
        "states_by_stage": {str(stage): s.total for stage, s in states.items()},
        "activations_by_remat": {mode: {"kept": a.kept, "peak": a.peak} for mode, a in kept.items()},
        "activations_img_size": largest,
        "checkpoint_bytes": saved,
        "save_s": save_s,
        "write_mb_per_s": args.write_mb_per_s,
        "signal_delay_s": delay,
        "images_per_s": rate,
        "images_per_s_from": "given" if args.images_per_second else "measured" if measured else None,
        "step_s": step_s,
        "image_bytes": image_bytes,
        "image_bytes_from": bytes_from,
        "read_bytes_per_s": rate * image_bytes if rate else None,
        "hours": steps * config.train.global_batch / rate / 3600 if rate else None,
        "device_gb": args.device_gb,
        "problems": problems,
    }  # fmt: skip


def _measured(run: Any) -> float | None:
    """Median images/s of a run's last rows."""
    from statistics import median

    from dattrain.observe.metrics import read

    rates = [row["images_per_s"] for row in read(run)[-200:] if row.get("images_per_s")]
    return median(rates) if rates else None


def _data(config: Config, given: int | None) -> tuple[int, str, float, str]:
    """Samples per epoch and mean bytes of a sample, each with where it is from.

    Raises:
        UserError: nothing tells how many samples there are; classes that do not fit the head.
    """
    from dattrain.data.factory import number
    from dattrain.data.source.dataset import open_dataset
    from dattrain.data.source.listing import is_remote
    from dattrain.errors import UserError

    if given is not None:
        return given, "given", IMAGE_BYTES, "ImageNet's mean"
    if config.data.train is not None and not is_remote(config.data.train):
        try:
            dataset = open_dataset(config.data.train)
        except UserError:
            # Planned where the shards are not; then the label set tells.
            if config.data.labels is None:
                raise
        else:
            try:
                number(config, "train", dataset, None)
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
    raise UserError(
        "neither data.train (local shards) nor data.labels tells how many images there are: give --samples N"
    )


def _count(dataset: Dataset) -> tuple[int, float]:
    """Samples and mean bytes of a sample of local shards or an image folder."""
    from dattrain.data.source.dataset import ShardDataset

    samples = int(dataset.counts.sum())
    if isinstance(dataset, ShardDataset):
        return samples, float(dataset.shards.sizes.sum()) / samples
    chosen = range(0, samples, max(1, samples // 64))
    return samples, sum(len(dataset.read(0, n).data) for n in chosen) / len(chosen)


def render(config: Config, p: dict[str, Any]) -> str:
    """The plan in words."""
    b = p["bytes_per_device"]
    t = config.train
    lines = [
        f"{config.name}: {config.model.name} at {config.model.img_size}, {p['parameters'] / 1e6:.3f} M parameters, "
        f"{p['flops_per_image'] / 1e9:.3f} GFLOPs an image forward (about three times that to train)",
        f"batch {t.global_batch} = {p['world']} devices x {p['micro_batch']} x {p['accumulation']} accumulated; "
        f"{p['samples_per_epoch']:,} images an epoch ({p['samples_from']}); {p['steps']:,} steps",
        "",
        f"memory of a device, in GB (ZeRO-{config.zero.stage}, {t.precision}, remat {t.remat}, at {p['activations_img_size']} px)",
    ]
    for name, key in (
        ("weights", "weights"), ("gradients", "gradients"), ("optimizer state", "optimizer"), ("EMA", "ema"),
        ("buckets, gathered weights", "buffers"), ("activations at their peak", "activations_peak"), ("together", "total"),
    ):  # fmt: skip
        lines.append(f"  {name:<28}{b[key] / 1e9:9.2f}")
    lines += [
        f"  of {p['device_gb']:g}; the CUDA context, NCCL and the allocator's gaps come on top (1 to 2)",
        "  activations by train.remat:  "
        + "   ".join(f"{mode} {a['peak'] / 1e9:.2f}" for mode, a in p["activations_by_remat"].items()),
        "  the rest by zero.stage:      "
        + "   ".join(f"{stage}: {total / 1e9:.2f}" for stage, total in p["states_by_stage"].items()),
        "",
        f"checkpoint {p['checkpoint_bytes'] / 1e9:.2f} GB; a save takes {p['save_s']:.1f} s at {p['write_mb_per_s']:g} MB/s a rank"
        + (f", of signal_delay_s={p['signal_delay_s']}" if p["signal_delay_s"] is not None else ""),
    ]
    if p["images_per_s"]:
        lines += [
            f"reading {p['read_bytes_per_s'] / 1e6:,.0f} MB/s at {p['images_per_s']:,.0f} images/s ({p['images_per_s_from']}), "
            f"{p['image_bytes'] / 1e3:.0f} kB an image ({p['image_bytes_from']})",
            f"step {p['step_s']:.3g} s; {p['hours']:,.2f} hours, {p['hours'] * p['world']:,.1f} device hours, evaluation left out",
        ]
    else:
        lines.append(
            f"reading {p['image_bytes'] / 1e3:.0f} kB an image ({p['image_bytes_from']}); hours: unknown without "
            "--images-per-second, or a run folder instead of the recipe"
        )
    return "\n".join([*lines, *(f"PROBLEM: {problem}" for problem in p["problems"])])
