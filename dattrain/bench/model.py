"""``dattrain bench model``: images/s of whole models, training and inference, in turns against timm's by name.

A training turn is forward, cross-entropy and backward; the optimizer costs the same for the same number of parameters and
is left out. bf16 is autocast over fp32 weights, as in training.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dattrain.bench import common
from dattrain.bench.attention import pick_device, straightforward, to_dtype
from dattrain.errors import UserError

if TYPE_CHECKING:
    import torch

TABLE = (
    "deit_small_patch16_224",
    "deit_base_patch16_224",
    "vit_base_patch16_224",
    "regnety_040",
    "regnety_080",
    "regnety_160",
    "efficientnet_b3",
    "efficientnet_b4",
    "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7_224",
    "swin_base_patch4_window7_224",
    "dat_tiny",
    "dat_small",
    "dat_base",
)
"""What ``--table`` measures: the models that the papers compare with, and ours."""
PLAIN = "+straightforward"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Models, conditions, outputs."""
    parser.add_argument("models", nargs="*", metavar="MODEL", help="ours or timm's (default: dat_tiny)")
    parser.add_argument(
        "--vs", metavar="NAME", help="the baseline, ours or timm's (default: swin_tiny_patch4_window7_224)"
    )
    parser.add_argument(
        "--straightforward", action="store_true", help="add ours with the straightforward attention core"
    )
    parser.add_argument("--table", action="store_true", help=f"the throughput table: {', '.join(TABLE)}")
    parser.add_argument("--img-size", type=int, nargs="+", default=[224], metavar="PX")
    parser.add_argument("--batch", type=int, metavar="B", help="images (8 on a CPU, 128 on CUDA)")
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
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    parser.add_argument(
        "--channels-last", action="store_true", help="images and convolutions in channels-last memory"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's choice)")
    common.add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print, write; 0."""
    import torch

    device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    batch = args.batch or (128 if device.type == "cuda" else 8)
    baseline = args.vs or "swin_tiny_patch4_window7_224"
    names = list(dict.fromkeys([baseline, *(TABLE if args.table else ()), *(args.models or ["dat_tiny"])]))
    if args.straightforward:
        names += [name + PLAIN for name in names if is_ours(name)]
    directions = [d for d, only in (("training", args.train), ("inference", args.infer)) if only] or [
        "training",
        "inference",
    ]
    notes: list[str] = []
    measurements: list[common.Measurement] = []
    for size in args.img_size:
        for direction in directions:
            for dtype in args.dtypes:
                train = direction == "training"
                # Each case is a graph of its own, and torch keeps a few per function: what came after them would run
                # uncompiled.
                torch._dynamo.reset()
                models = {name: build(name, size, args.drop_path if train else 0.0, device) for name in names}
                extra: dict[str, dict[str, float | str | None]] = {}
                steps: dict[str, Callable[[], object]] = {}
                for name, model in models.items():
                    if args.channels_last:
                        model.to(memory_format=torch.channels_last)
                    one = step(model, size, batch, to_dtype(dtype), train, device, name, args.channels_last)
                    parameters = sum(p.numel() for p in model.parameters()) / 1e6
                    extra[name] = {"parameters M": round(parameters, 2)}
                    if args.compile:
                        one = compiled(
                            model,
                            one,
                            name,
                            notes,
                            size,
                            batch,
                            to_dtype(dtype),
                            train,
                            device,
                            args.channels_last,
                        )
                    if device.type == "cuda":
                        extra[name]["GB peak"] = peak(one, device)
                    steps[name] = one
                measurements += common.compare(
                    f"{size} px B{batch} {dtype} {direction}",
                    steps,
                    baseline=baseline,
                    rounds=args.rounds,
                    warmup=1,
                    items=batch,
                    extra=extra,
                    synchronize=torch.cuda.synchronize if device.type == "cuda" else None,
                )
    title = (
        f"{', '.join(args.models or ['dat_tiny'])} against {baseline}"
        if not args.table
        else "Throughput table"
    )
    report = common.Report(
        title + (" (torch.compile)" if args.compile else ""),
        measurements,
        item="image",
        notes=list(dict.fromkeys(notes)),
        machine=common.describe_machine(str(device)),
    )
    common.emit(report, args)
    return 0


def peak(call: Callable[[], object], device: torch.device) -> float:
    """GB of device memory that a second turn allocates at most, over what stands after the first: without the weights."""
    import torch

    call()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9


def is_ours(name: str) -> bool:
    """Whether ``dattrain.models`` builds it."""
    from dattrain.models.zoo import VARIANTS

    return name.removesuffix(PLAIN) in VARIANTS


def build(name: str, img_size: int, drop_path: float, device: torch.device) -> torch.nn.Module:
    """One of ours, or timm's, for 1000 classes at this image size.

    Raises:
        UserError: if there is no such model, or it cannot be built for this size.
    """
    import timm
    import torch

    from dattrain.models.zoo import create

    torch.manual_seed(0)
    if is_ours(name):
        return create(
            name.removesuffix(PLAIN), num_classes=1000, img_size=img_size, drop_path_rate=drop_path
        ).to(device)
    if not timm.is_model(name):
        from difflib import get_close_matches

        near = get_close_matches(name, timm.list_models(), 1)
        raise UserError(
            f"model {name!r} is neither ours nor timm's" + (f"; did you mean {near[0]!r}?" if near else "")
        )
    arguments: dict[str, Any] = {"drop_path_rate": drop_path}
    if img_size != 224:
        if name.startswith("swin"):
            arguments |= {"img_size": img_size, "window_size": img_size // 32}
        elif name.startswith(("vit", "deit")):
            arguments |= {"img_size": img_size}
    try:
        return timm.create_model(name, **arguments).to(device)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise UserError(f"timm cannot build {name} for {img_size} pixels: {error}") from error


def step(
    model: torch.nn.Module,
    size: int,
    batch: int,
    dtype: torch.dtype,
    train: bool,
    device: torch.device,
    name: str,
    channels_last: bool,
) -> Callable[[], object]:
    """One turn of this model on fixed random images."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator).to(device)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), generator=generator).to(device)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    plain = name.endswith(PLAIN)

    def training() -> None:
        model.train()
        model.zero_grad(set_to_none=True)
        with straightforward_core(plain), autocast:
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()

    @torch.inference_mode()
    def inference() -> object:
        model.eval()
        with straightforward_core(plain), autocast:
            return model(images)

    return training if train else inference


@contextmanager
def straightforward_core(active: bool) -> Iterator[None]:
    """Our models with the core of ``benchmarks/straightforward.py`` instead of the package's, inside the block."""
    if not active:
        yield
        return
    from dattrain import ops

    plain = straightforward()
    if plain is None:
        raise UserError("--straightforward needs benchmarks/straightforward.py: run from a source tree")
    kept = ops.deform_attention
    ops.deform_attention = plain.deform_attention
    try:
        yield
    finally:
        ops.deform_attention = kept


def compiled(
    model: torch.nn.Module,
    eager: Callable[[], object],
    name: str,
    notes: list[str],
    size: int,
    batch: int,
    dtype: torch.dtype,
    train: bool,
    device: torch.device,
    channels_last: bool,
) -> Callable[[], object]:
    """The turn with the model under torch.compile, run once; the eager one and a line in ``notes`` if that fails."""
    import torch

    one = step(torch.compile(model, dynamic=False), size, batch, dtype, train, device, name, channels_last)  # type: ignore[arg-type]
    try:
        one()
    except Exception as error:
        notes.append(
            f"{name}: torch.compile failed, measured eager: {type(error).__name__}: {str(error).splitlines()[0]}"
        )
        return eager
    return one
