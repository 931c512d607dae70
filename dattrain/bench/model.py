"""Images/s of whole models, training and inference, in turns against timm's by name.

A training turn is forward, cross-entropy and backward; the optimizer costs the same for the same number of parameters and
is left out. bf16 is autocast over fp32 weights, as in training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeAlias

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
COMPILED = "torch.compile: images/s"
COMPILED_RATIO = "torch.compile: ratio (quartiles)"
COMPILED_PEAK = "torch.compile: GB peak"
Turn: TypeAlias = Callable[[], object]
Columns: TypeAlias = dict[str, float | str | None]


@dataclass(frozen=True)
class Settings:
    """What all contenders of a bench have in common."""

    baseline: str
    """The model that ratios are relative to."""
    straightforward: bool
    """Add ours with the straightforward attention core."""
    sizes: Sequence[int]
    """Sides of the images, in pixels."""
    batch: int | None
    """Images; None takes 128 on CUDA, else 8."""
    dtypes: Sequence[str]
    """Of ``defaults.DTYPES``."""
    directions: Sequence[str]
    """``training``, ``inference``; both where empty."""
    drop_path: float
    """Stochastic depth while training."""
    compile: bool
    """Every model under ``torch.compile`` too, in columns of its own."""
    channels_last: bool
    """Images and convolutions in channels-last memory."""
    device: torch.device
    rounds: int
    """Turns of each contender."""

    @property
    def images(self) -> int:
        """Of a turn."""
        return self.batch or (128 if self.device.type == "cuda" else 8)

    @property
    def cases(self) -> list[tuple[str, str]]:
        """Directions and dtypes."""
        return [(d, t) for d in self.directions or ("training", "inference") for t in self.dtypes]

    @property
    def synchronize(self) -> Callable[[], object] | None:
        """What a clock waits for."""
        return torch.cuda.synchronize if self.device.type == "cuda" else None


def bench(models: Sequence[str], settings: Settings) -> common.BenchReport:
    """Time every case of ``models``, ours or timm's names.

    Raises:
        UserError: no such model, or one that cannot be built for a size.
    """
    baseline = settings.baseline
    names = list(dict.fromkeys([baseline, *models]))
    if settings.straightforward:
        names += [name + PLAIN for name in names if is_ours(name)]
    notes: list[str] = []
    measurements: list[common.Measurement] = []
    for size in settings.sizes:
        for direction, dtype in settings.cases:
            # Each case is a graph of its own, and torch keeps a few per function: what came after them would run
            # uncompiled.
            torch._dynamo.reset()
            contenders = {
                name: contender(
                    name, settings, size=size, dtype=dtype, train=direction == "training", notes=notes
                )
                for name in names
            }
            measurements += compare(f"{size} px B{settings.images} {dtype} {direction}", contenders, settings)
    return common.BenchReport(
        f"{', '.join(models)} against {baseline}",
        measurements,
        item="image",
        notes=list(dict.fromkeys(notes)),
        machine=common.describe_machine(str(settings.device)),
    )


class Contender(NamedTuple):
    """A model of a case."""

    turn: Turn
    columns: Columns
    """Further ones of its row."""
    compiled: tuple[Turn, Columns] | None = None
    """Both under ``torch.compile``, if that was asked for and succeeds."""


def compare(case: str, contenders: Mapping[str, Contender], settings: Settings) -> list[common.Measurement]:
    """Time contenders in turns; then their compiled turns, whose figures are columns of the same rows."""

    def measure(turns: Mapping[str, Turn], columns: Mapping[str, Columns]) -> list[common.Measurement]:
        return common.compare(
            case, turns, baseline=settings.baseline, rounds=settings.rounds, warmup=1, items=settings.images,
            extra=columns, synchronize=settings.synchronize,
        )  # fmt: skip

    rows = measure(
        {name: one.turn for name, one in contenders.items()},
        {name: one.columns for name, one in contenders.items()},
    )
    compiled = {name: one.compiled for name, one in contenders.items() if one.compiled is not None}
    if settings.baseline not in compiled:
        return rows
    columns: dict[str, Columns] = {
        m.name: {
            COMPILED: m.throughput,
            COMPILED_RATIO: None if m.name == m.baseline else m.shown_ratio,
            **m.extra,
        }
        for m in measure(
            {name: turn for name, (turn, _) in compiled.items()},
            {name: extra for name, (_, extra) in compiled.items()},
        )
    }
    return [replace(row, extra={**row.extra, **columns.get(row.name, {})}) for row in rows]


def contender(
    name: str, settings: Settings, *, size: int, dtype: str, train: bool, notes: list[str]
) -> Contender:
    """This model's turns. What ``torch.compile`` refuses is told in ``notes``.

    Raises:
        UserError: as ``build``.
    """
    device = settings.device
    model = build(name, size, settings.drop_path if train else 0.0, device)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last)
    turn = functools.partial(
        step, size=size, batch=settings.images, dtype=to_dtype(dtype), train=train, device=device, channels_last=settings.channels_last
    )  # fmt: skip
    one = turn(model, name)
    columns: Columns = {"parameters M": round(sum(p.numel() for p in model.parameters()) / 1e6, 2)}
    if device.type == "cuda":
        columns["GB peak"] = peak(one, device)
    fast = compiled(turn, model, name, notes) if settings.compile else None
    if fast is None:
        return Contender(one, columns)
    return Contender(
        one, columns, (fast, {COMPILED_PEAK: peak(fast, device)} if device.type == "cuda" else {})
    )


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
    try:
        one = turn(torch.compile(model, dynamic=False), name)
        one()
    except Exception as error:
        notes.append(f"{name}: torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0]}")
        return None
    return one
