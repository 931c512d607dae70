"""Dense prediction, one head on several backbones: images/s of training and inference in turns, and memory.

A training turn is forward, the loss (of segmentation at full resolution, with the auxiliary head's; of detection with ``OBJECTS``
objects an image) and backward; the optimizer is left out. An inference turn is forward and the class of every pixel, or the 100 best objects
with their masks, whatever their score. Memory is of one more turn: what autograd keeps between forward and backward, and the peak with the
gradients, both without the weights. Of yet another turn on a CPU: the share of its time that the core of deformable attention takes.

    python -m benchmarks.dense_speed --threads 2 --markdown docs/benchmarks/dense-cpu.md
    python -m benchmarks.dense_speed --head mask_rcnn --classes 80 --size 800 1280 --batch 1 --threads 2 --markdown docs/benchmarks/detection-cpu.md
    python -m benchmarks.dense_speed dat_atto --vs pvt_v2_b0 --size 64 --batch 2 --classes 5 --channels 32 --rounds 1
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dattrain.bench import common
from dattrain.bench.attention import pick_device, to_dtype
from dattrain.bench.model import peak as cuda_peak
from dattrain.cli.arguments import positive
from dattrain.cli.bench_output import add_output_arguments, emit
from dattrain.config.sections import DETECTORS
from dattrain.config.values import as_pair
from dattrain.models.dense import create_backbone, create_detector, create_segmenter
from dattrain.models.dense.create_detector import outs
from dattrain.models.flops import flops, parameters

AUX_WEIGHT = 0.4
OBJECTS = 7
"""Of an image: COCO's mean."""
MASK = 112
"""Sides of the mask of an object, as the loader gives it."""
Turn = Callable[[], object]


def build(name: str, args: argparse.Namespace) -> nn.Module:
    """The head on this backbone, weights drawn from seed 0."""
    torch.manual_seed(0)
    if args.head in DETECTORS:
        backbone = create_backbone(name, drop_path_rate=args.drop_path, outs=outs(args.head))
        return create_detector(
            backbone, args.head, args.classes, norm=args.norm, channels=args.channels, score_threshold=0.0
        )
    backbone = create_backbone(name, drop_path_rate=args.drop_path)
    return create_segmenter(backbone, args.head, args.classes, norm=args.norm, channels=args.channels)


def segmentation(
    model: nn.Module, args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> dict[str, Turn]:
    """One turn of training and one of inference, on fixed random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 3, *args.size, generator=generator).to(device)
    maps = torch.randint(args.classes, (args.batch, *args.size), generator=generator).to(device)

    def training() -> None:
        model.train().zero_grad(set_to_none=True)
        with autocast(device, dtype):
            out = model(images)
        total = images.new_zeros(())
        for weight, each in zip((1.0, AUX_WEIGHT), out if isinstance(out, tuple) else (out,)):
            full = F.interpolate(each.float(), maps.shape[1:], mode="bilinear", align_corners=False)
            total = total + weight * F.cross_entropy(full, maps)
        total.backward()

    @torch.inference_mode()
    def inference() -> torch.Tensor:
        with autocast(device, dtype):
            logits = model.eval()(images)
        return F.interpolate(logits.float(), args.size, mode="bilinear", align_corners=False).argmax(1)

    return {"training": training, "inference": inference}


def detection(
    model: nn.Module, args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> dict[str, Turn]:
    """One turn of training and one of inference, on fixed random images and objects."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 3, *args.size, generator=generator).to(device)
    height, width = args.size
    targets = []
    for _ in range(args.batch):
        corners = torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([width, height]) * 0.7
        sides = (0.1 + 0.2 * torch.rand(OBJECTS, 2, generator=generator)) * torch.tensor([width, height])
        targets.append(
            {
                "boxes": torch.cat([corners, corners + sides], 1).to(device),
                "labels": torch.randint(args.classes, (OBJECTS,), generator=generator).to(device),
                "masks": torch.full((OBJECTS, MASK, MASK), 255, dtype=torch.uint8, device=device),
            }
        )
    sizes = [(height, width)] * args.batch

    def training() -> None:
        model.train().zero_grad(set_to_none=True)
        with autocast(device, dtype):
            found = model(images, sizes, targets)
        torch.stack(list(found.values())).sum().backward()

    @torch.inference_mode()
    def inference() -> object:
        with autocast(device, dtype):
            return model.eval()(images, sizes)

    return {"training": training, "inference": inference}


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """On, where ``dtype`` is not fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def kept_bytes(turn: Turn, model: nn.Module) -> int:
    """Bytes of the storages that autograd keeps for backward in a training turn, each counted once; weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no later one has its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        turn()
    return sum(storage.nbytes() for storage in kept.values())


def cpu_peak(turn: Turn) -> int:
    """The most bytes that the allocator handed out at once in a turn, over what stood before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        turn()
    assert profiler.profiler is not None
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def core_share(turn: Turn) -> float:
    """Of a turn's time on a CPU, what the core of deformable attention takes: bias, softmax and products, forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        turn()
    events = profiler.key_averages()
    core: float = sum(
        each.cpu_time_total
        for each in events
        if each.key in ("dattrain::deform_attention", "dattrain::deform_attention_backward")
    )
    total: float = sum(each.self_cpu_time_total for each in events)
    return core / total


def details(
    direction: str, turn: Turn, model: nn.Module, device: torch.device
) -> dict[str, float | str | None]:
    """Columns of the report: MB of one turn's whole batch, and the core's share of its time."""
    model.zero_grad(set_to_none=True)
    highest = 1e9 * cuda_peak(turn, device) if device.type == "cuda" else cpu_peak(turn)
    found: dict[str, float | str | None] = {"MB peak": highest / 1e6}
    if direction == "training":
        model.zero_grad(set_to_none=True)
        found["MB kept"] = kept_bytes(turn, model) / 1e6
    if device.type == "cpu":
        model.zero_grad(set_to_none=True)
        found["core's share %"] = round(100 * core_share(turn), 1)
    return found


def measure(names: Sequence[str], baseline: str, args: argparse.Namespace) -> common.BenchReport:
    """All cases; ratios are to ``baseline``."""
    device = pick_device(args.device)
    models = {name: build(name, args).to(device) for name in dict.fromkeys([baseline, *names])}
    turns = detection if args.head in DETECTORS else segmentation
    height, width = args.size
    facts: dict[str, dict[str, float | str | None]] = {
        name: {
            "parameters M": round(parameters(model) / 1e6, 2),
            "GFLOPs": round(flops(model, args.size) / 1e9, 1),
        }
        for name, model in models.items()
    }
    measurements: list[common.Measurement] = []
    for direction in args.directions:
        for dtype in args.dtypes:
            steps = {
                name: turns(model, args, to_dtype(dtype), device)[direction] for name, model in models.items()
            }
            measurements += common.compare(
                f"{height} x {width} px B{args.batch} {dtype} {direction}",
                steps,
                baseline=baseline,
                rounds=args.rounds,
                warmup=1,
                items=args.batch,
                extra={
                    name: {**facts[name], **details(direction, step, models[name], device)}
                    for name, step in steps.items()
                },
                synchronize=torch.cuda.synchronize if device.type == "cuda" else None,
            )
    return common.BenchReport(
        f"{args.head}, {args.classes} classes: {', '.join(names)} against {baseline}",
        measurements,
        item="image",
        notes=[
            "GFLOPs are of inference. MB are of one turn's batch without the weights: at its peak (in training with the gradients), and kept by "
            f"autograd between forward and backward. Norms of heads that have any: {args.norm}."
        ],
        command=shlex.join(["python", "-m", "benchmarks.dense_speed", *sys.argv[1:]]),
        machine=common.describe_machine(str(device)),
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbones", nargs="*", metavar="NAME", help="ours or timm's (default: dat_tiny)")
    parser.add_argument("--vs", default="swin_tiny_patch4_window7_224", metavar="NAME", help="the baseline")
    parser.add_argument("--head", choices=("upernet", "semantic_fpn", *DETECTORS), default="upernet")
    parser.add_argument("--norm", choices=("batch", "group", "sync"), default="batch")
    parser.add_argument("--channels", type=positive, help="of the head (default: the paper's)")
    parser.add_argument("--classes", type=positive, default=150)
    parser.add_argument(
        "--size", type=positive, nargs="+", default=[512], metavar="PX", help="a side, or height and width"
    )
    parser.add_argument("--batch", type=positive, default=2, metavar="B")
    parser.add_argument("--drop-path", type=float, default=0.2, metavar="P")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16", "fp16"), default=["fp32"])
    parser.add_argument(
        "--directions", nargs="+", choices=("training", "inference"), default=["training", "inference"]
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    add_output_arguments(parser)
    args = parser.parse_args()
    args.size = as_pair(args.size if len(args.size) > 1 else args.size[0])
    if args.threads:
        torch.set_num_threads(args.threads)
    emit(measure(args.backbones or ["dat_tiny"], args.vs, args), args)


if __name__ == "__main__":
    main()
