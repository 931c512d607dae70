"""Images/s of whole models, training and inference, in turns against timm's by name.

A training turn is forward, cross-entropy and backward; the optimizer costs the same for the same number of parameters and
is left out. bf16 is autocast over fp32 weights, as in training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, TypeAlias

import timm
import torch
import torch.nn.functional as F

from dattrain import ops
from dattrain.bench import common
from dattrain.bench.attention import straightforward as straightforward_module
from dattrain.bench.attention import to_dtype
from dattrain.errors import UserError
from dattrain.models.zoo import VARIANTS, create

PLAIN = "+straightforward"
Turn: TypeAlias = Callable[[], object]
Columns: TypeAlias = dict[str, float | str | None]


def bench(
    models: Sequence[str],
    *,
    baseline: str,
    straightforward: bool,
    sizes: Sequence[int],
    batch: int | None,
    dtypes: Sequence[str],
    directions: Sequence[str],
    drop_path: float,
    compile: bool,
    channels_last: bool,
    device: torch.device,
    rounds: int,
) -> common.BenchReport:
    """Time every case.

    Args:
        models: names, ours or timm's.
        baseline: the model that ratios are relative to.
        straightforward: add ours with the straightforward attention core.
        sizes: sides of the images, in pixels.
        batch: images; None takes 128 on CUDA, else 8.
        dtypes: of ``defaults.DTYPES``.
        directions: ``training``, ``inference``; both where empty.
        drop_path: stochastic depth while training.
        compile: ``torch.compile`` every model.
        channels_last: images and convolutions in channels-last memory.
        device: where.
        rounds: turns of each contender.

    Raises:
        UserError: no such model, or one that cannot be built for a size.
    """
    batch = batch or (128 if device.type == "cuda" else 8)
    names = list(dict.fromkeys([baseline, *models]))
    if straightforward:
        names += [name + PLAIN for name in names if is_ours(name)]
    notes: list[str] = []
    measurements: list[common.Measurement] = []
    for size in sizes:
        for direction in directions or ("training", "inference"):
            for dtype in dtypes:
                train = direction == "training"
                # Each case is a graph of its own, and torch keeps a few per function: what came after them would run
                # uncompiled.
                torch._dynamo.reset()
                steps: dict[str, Turn] = {}
                extra: dict[str, Columns] = {}
                for name in names:
                    steps[name], extra[name] = contender(
                        name, size=size, batch=batch, dtype=dtype, train=train, drop_path=drop_path, compile=compile,
                        channels_last=channels_last, device=device, notes=notes,
                    )  # fmt: skip
                measurements += common.compare(
                    f"{size} px B{batch} {dtype} {direction}",
                    steps,
                    baseline=baseline,
                    rounds=rounds,
                    warmup=1,
                    items=batch,
                    extra=extra,
                    synchronize=torch.cuda.synchronize if device.type == "cuda" else None,
                )
    return common.BenchReport(
        f"{', '.join(models)} against {baseline}" + (" (torch.compile)" if compile else ""),
        measurements,
        item="image",
        notes=list(dict.fromkeys(notes)),
        machine=common.describe_machine(str(device)),
    )


def contender(
    name: str,
    *,
    size: int,
    batch: int,
    dtype: str,
    train: bool,
    drop_path: float,
    compile: bool,
    channels_last: bool,
    device: torch.device,
    notes: list[str],
) -> tuple[Turn, Columns]:
    """A turn of this model, and further columns of its row. What ``torch.compile`` refuses is told in ``notes``.

    Raises:
        UserError: as ``build``.
    """
    model = build(name, size, drop_path if train else 0.0, device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    turn = functools.partial(
        step, size=size, batch=batch, dtype=to_dtype(dtype), train=train, device=device, channels_last=channels_last
    )  # fmt: skip
    one = turn(model, name)
    columns: Columns = {"parameters M": round(sum(p.numel() for p in model.parameters()) / 1e6, 2)}
    if compile:
        one = compiled(turn, model, name, notes) or one
    if device.type == "cuda":
        columns["GB peak"] = peak(one, device)
    return one, columns


def peak(call: Callable[[], object], device: torch.device) -> float:
    """GB of device memory that a second turn allocates at most, over what stands after the first: without the weights."""
    call()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9


def is_ours(name: str) -> bool:
    """Whether ``dattrain.models`` builds it."""
    return name.removesuffix(PLAIN) in VARIANTS


def build(name: str, img_size: int, drop_path: float, device: torch.device) -> torch.nn.Module:
    """One of ours, or timm's, for 1000 classes at this image size.

    Raises:
        UserError: if there is no such model, or it cannot be built for this size.
    """
    torch.manual_seed(0)
    if is_ours(name):
        return create(
            name.removesuffix(PLAIN), num_classes=1000, img_size=img_size, drop_path_rate=drop_path
        ).to(device)
    if not timm.is_model(name):
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
    name: str,
    *,
    size: int,
    batch: int,
    dtype: torch.dtype,
    train: bool,
    device: torch.device,
    channels_last: bool,
) -> Callable[[], object]:
    """One turn of this model on fixed random images."""
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

    plain = straightforward_module()
    if plain is None:
        raise UserError("--straightforward needs benchmarks/straightforward.py: run from a source tree")
    kept = ops.deform_attention
    ops.deform_attention = plain.deform_attention
    try:
        yield
    finally:
        ops.deform_attention = kept


def compiled(
    turn: Callable[..., Callable[[], object]], model: torch.nn.Module, name: str, notes: list[str]
) -> Callable[[], object] | None:
    """The turn with the model under torch.compile, run once; None and a line in ``notes`` if that fails."""
    one = turn(torch.compile(model, dynamic=False), name)
    try:
        one()
    except Exception as error:
        notes.append(
            f"{name}: torch.compile failed, measured eager: {type(error).__name__}: {str(error).splitlines()[0]}"
        )
        return None
    return one
