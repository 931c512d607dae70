"""``dattrain bench model``: images/s of whole models, training and inference, in turns against timm's by name."""

from __future__ import annotations

import argparse

from dattrain.bench.defaults import BASELINE, TABLE
from dattrain.cli.arguments import positive
from dattrain.cli.bench_output import add_output_arguments, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, conditions, outputs."""
    parser.add_argument("models", nargs="*", metavar="MODEL", help="ours or timm's (default: dat_tiny)")
    parser.add_argument("--vs", metavar="NAME", help=f"the baseline, ours or timm's (default: {BASELINE})")
    parser.add_argument(
        "--straightforward", action="store_true", help="add ours with the straightforward attention core"
    )
    parser.add_argument(
        "--table", action="store_true",
        help="the throughput table, each model at its own resolution and alone with the baseline at 224: "
        + ", ".join(f"{model} {px}" for model, px, _ in TABLE),
    )  # fmt: skip
    parser.add_argument(
        "--most-seconds", type=float, default=120.0, metavar="S",
        help="with --table: a model whose first turn takes longer is a row that says so (120)",
    )  # fmt: skip
    parser.add_argument("--img-size", type=int, nargs="+", default=[224], metavar="PX")
    parser.add_argument("--batch", type=positive, metavar="B", help="images (8 on a CPU, 128 on CUDA)")
    parser.add_argument(
        "--dtypes", "--dtype", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32", "bf16"]
    )
    parser.add_argument(
        "--train", action="store_true", help="training only (default: training and inference)"
    )
    parser.add_argument("--infer", action="store_true", help="inference only")
    parser.add_argument(
        "--drop-path", type=float, default=0.2, metavar="P", help="stochastic depth while training (.2)"
    )
    parser.add_argument(
        "--compile", action="store_true", help="every model under torch.compile too, in columns of its own"
    )
    parser.add_argument(
        "--channels-last", action="store_true", help="images and convolutions in channels-last memory"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=positive, help="CPU threads (default: torch's choice)")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 0."""
    import torch

    from dattrain.bench import model, model_table
    from dattrain.bench.attention import pick_device

    if args.threads:
        torch.set_num_threads(args.threads)
    settings = model.Settings(
        baseline=args.vs or BASELINE,
        straightforward=args.straightforward,
        sizes=args.img_size,
        batch=args.batch,
        dtypes=args.dtypes,
        directions=[d for d, only in (("training", args.train), ("inference", args.infer)) if only],
        drop_path=args.drop_path,
        compile=args.compile,
        channels_last=args.channels_last,
        device=pick_device(args.device),
        rounds=args.rounds,
    )
    if args.table:
        report = model_table.bench(args.models, settings, most_seconds=args.most_seconds)
    else:
        report = model.bench(args.models or ["dat_tiny"], settings)
    emit(report, args)
    return 0
