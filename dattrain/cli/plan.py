"""``dattrain plan``: what a run needs (memory, time, reading, saving) before anything is queued. Needs no GPU."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dattrain.cli import plan_scaling
from dattrain.cli.arguments import positive_number

if TYPE_CHECKING:
    from dattrain.config.schema import Config
    from dattrain.submit.plan import Stage


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument(
        "config",
        metavar="CONFIG|CHAIN|RUN",
        help="a recipe, a chain of them, or a run folder, whose measured speed is used",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="in a chain: stage.key=value")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (1)")
    parser.add_argument(
        "--gpus-per-node", type=int, metavar="G", help="devices of a node (the profile's); 0: CPUs alone"
    )
    parser.add_argument(
        "--cluster",
        default="generic",
        metavar="NAME",
        help="profile, for its devices, signal_delay_s and time limit (generic, as submit has it)",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        help="whose kernels keep what (cuda, where the profile has devices)",
    )
    parser.add_argument(
        "--device-gb",
        type=positive_number,
        default=80.0,
        metavar="GB",
        help="memory of a device, in 10^9 bytes (80)",
    )
    parser.add_argument(
        "--images-per-second",
        type=positive_number,
        metavar="X",
        help="of the whole job, measured or expected",
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="training images, where neither shards nor labels tell"
    )
    parser.add_argument(
        "--write-mb-per-s", type=positive_number, default=500.0, metavar="X",
        help="what one rank writes to the run folder's file system (an assumption: 500)",
    )  # fmt: skip
    plan_scaling.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="as JSON, in bytes, seconds and counts")


def run(args: argparse.Namespace) -> int:
    """Exit code 0; 1 where a device is too small, or a save does not fit before the signal's end.

    What ``dattrain submit`` would refuse is refused in the same words, behind the figures where there are any.

    Raises:
        ConfigError: as ``submit.checks.check``, or ``planning.plan.plan``.
        UserError: as these.
    """
    from dattrain.errors import UserError
    from dattrain.submit import checks
    from dattrain.submit.plan import SubmitRequest
    from dattrain.submit.plan import plan as stages_of

    scaling = plan_scaling.asked(args)
    request = SubmitRequest(
        args.config,
        tuple(args.overrides),
        cluster=args.cluster,
        nodes=str(args.nodes),
        gpus_per_node=args.gpus_per_node,
        images_per_second=args.images_per_second,
    )
    planned = stages_of(request)
    refusal: UserError | None = None
    try:
        # Images that are counted on the command line need not be there yet.
        checks.check(planned, request, needs_data=args.samples is None)
    except UserError as error:
        refusal = error
    trained = [stage for stage in planned.stages if stage.action == "train"]
    try:
        found = [(stage.name, stage.loaded[0].config, _figures(stage, args, scaling)) for stage in trained]
    except UserError:
        if refusal is not None:
            raise refusal from None
        raise
    if args.json:
        alone = found[0][2] if planned.chain is None else {name: figures for name, _, figures in found}
        print(json.dumps(alone, indent=2))
    else:
        print("\n\n".join(render(config, figures) for _, config, figures in found), flush=True)
        for name, _, figures in found:
            if scaling is not None:
                print(
                    f"\n{name}: {plan_scaling.render(figures['scaling'], scaling['constants'])}", flush=True
                )
    if refusal is not None:
        raise refusal
    return 1 if any(figures["problems"] for _, _, figures in found) else 0


def _figures(stage: Stage, args: argparse.Namespace, scaling: dict[str, Any] | None) -> dict[str, Any]:
    from dattrain.errors import ConfigError
    from dattrain.planning.plan import Resources, measured_rate, plan
    from dattrain.planning.scaling_table import largest_micro_batch, table
    from dattrain.submit import checks

    profile, folder = stage.profile, stage.runs[0]
    resources = Resources(
        nodes=stage.nodes[1],
        gpus_per_node=profile.tasks,
        cpu_cores=None if profile.gpus_per_node else checks.cpu_cores(profile),
        cluster=args.cluster,
        device=args.device or ("cuda" if profile.gpus_per_node else "cpu"),
        device_gb=args.device_gb,
        images_per_second=args.images_per_second,
        samples=args.samples,
        write_mb_per_s=args.write_mb_per_s,
    )
    measured = measured_rate(folder) if Path(args.config).is_dir() else None
    config = stage.loaded[0].config
    figures = plan(config, resources, measured=measured)
    if scaling is not None:
        if resources.device != "cuda":
            raise ConfigError("--scaling is a model of GPUs: it needs a profile with gpus_per_node")
        figures["scaling"] = table(
            config,
            per_node=profile.tasks,
            fits=largest_micro_batch(figures),
            image_bytes=figures["image_bytes"],
            steps=figures["steps"],
            **scaling,
        )
    return figures


def render(config: Config, p: dict[str, Any]) -> str:
    """The plan in words."""
    b = p["bytes_per_device"]
    t = config.train
    asked = p["micro_batch_asked"]
    bound = "" if asked == p["micro_batch"] else f" (train.micro_batch={asked})"
    decoder = f" with {config.task.head}" if config.task.kind != "classification" else ""
    images = (
        f"{p['samples_per_epoch']:,} images an epoch ({p['samples_from']})"
        if p["samples_per_epoch"]
        else f"the set is not at hand, and {p['samples_from']} needs no count of its images"
    )
    lines = [
        f"{config.name}: {config.model.name}{decoder} at {p['img_size']}, {p['parameters'] / 1e6:.3f} M parameters, "
        f"{p['flops_per_image'] / 1e9:.3f} GFLOPs an image forward (about three times that to train)",
        f"batch {t.global_batch} = {p['world']} devices x {p['micro_batch']} x {p['accumulation']} accumulated{bound}; "
        f"{images}; {p['steps']:,} steps",
        "",
        f"memory of a device, in GB (ZeRO-{config.zero.stage}, {t.precision}, activation checkpointing {t.activation_checkpointing}, at {p['activations_img_size']} px)",
    ]
    for name, key in (
        ("weights", "weights"), ("gradients", "gradients"), ("optimizer state", "optimizer"), ("EMA", "ema"),
        ("buckets, gathered weights", "buffers"), ("activations at their peak", "activations_peak"), ("together", "total"),
    ):  # fmt: skip
        lines.append(f"  {name:<28}{b[key] / 1e9:9.2f}")
    lines += [
        f"  of {p['device_gb']:g}; the CUDA context, NCCL and the allocator's gaps come on top (1 to 2)",
        "  activations by train.activation_checkpointing:  "
        + "   ".join(f"{mode} {a['peak'] / 1e9:.2f}" for mode, a in p["activations_by_mode"].items()),
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
            *_decoding(p["decoding"]),
            f"step {p['step_s']:.3g} s; {p['hours']:,.2f} hours, {p['hours'] * p['world']:,.1f} device hours, evaluation left out",
        ]
    elif p["cpu_time"]:
        lines.append(
            f"on {p['world']} CPU task(s) of {p['cpu_time']['cores']} core(s): at least {p['cpu_time']['words']}, at most "
            f"{p['cpu_time']['images_per_s']:,.3g} images/s (a bound, not a measurement)"
        )
    else:
        lines.append(
            f"reading {p['image_bytes'] / 1e3:.0f} kB an image ({p['image_bytes_from']}); hours: unknown without "
            "--images-per-second, or a run folder instead of the recipe"
        )
    return "\n".join([*lines, *(f"PROBLEM: {problem}" for problem in p["problems"])])


def _decoding(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    return [
        f"decoding: {found['cores_per_node']:.1f} cores a node beside those of the ranks, at {found['images_per_s_of_core']:.0f} images/s a core "
        "(one AMD EPYC's: an assumption, docs/benchmarks/images-per-node.md); "
        f"data.workers of at least {found['workers']} a rank, set is {found['workers_set']}"
    ]
