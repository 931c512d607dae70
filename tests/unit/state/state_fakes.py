"""Checkpoints made without an engine, to test whatever knows folders only."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from dattrain.state.background import HostBuffer, image_of
from dattrain.state.format import checkpoint, rank_file
from dattrain.state.format.manifest import Manifest, Parameter, rank_file_name
from dattrain.state.format.rank_file import Piece

SHAPES = {"stem.weight": (40, 3, 7, 7), "stem.bias": (40,), "head.weight": (1000, 300), "head.bias": (11,)}


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors of every state."""
    g = torch.Generator().manual_seed(seed)
    states = ("param", "exp_avg", "exp_avg_sq", "ema")
    return {f"{s}/{n}": torch.randn(shape, generator=g) for s in states for n, shape in SHAPES.items()}


def write_shard(path: Path, tensors: dict[Piece, torch.Tensor]) -> rank_file.Digest:
    """A shard of flat tensors."""
    layout = rank_file.layout(tensors)
    host = HostBuffer(pinned=False).take(layout.size)
    image = image_of(host)
    image[: len(layout.header)] = layout.header
    for piece, at in zip(layout.pieces, layout.offsets):
        if piece.nbytes:
            host[at : at + piece.nbytes].copy_(tensors[piece].contiguous().reshape(-1).view(torch.uint8))
    return rank_file.write(path, image, len(layout.header))


def make(root: Path, step: int = 1, world: int = 2, seed: int = 0, **fields: object) -> Path:
    """A published checkpoint of ``world`` shards, every tensor cut in ``world`` uneven pieces; returns its folder."""
    tensors = values(seed)
    folder = checkpoint.temporary_folder(root, step, "test")
    folder.mkdir(parents=True)
    files = {}
    for rank in range(world):
        mine: dict[Piece, torch.Tensor] = {}
        for key, tensor in tensors.items():
            state, name = key.split("/")
            flat = tensor.reshape(-1)
            lo, hi = flat.numel() * rank // world, flat.numel() * (rank + 1) // world
            mine[Piece(state, name, lo, hi - lo)] = flat[lo:hi]
        if rank == 0:
            mine[Piece("buffer", "calls", 0, 1, "I64", ())] = torch.tensor(step)
            mine[Piece("buffer", "mask", 0, 3, "BOOL", (3,))] = torch.tensor([True, False, True])
        name = rank_file_name(rank)
        files[name] = write_shard(folder / name, mine)
    manifest = Manifest(
        step=step,
        samples_seen=step * 10,
        world=world,
        stage=3,
        precision="fp32",
        states=("param", "exp_avg", "exp_avg_sq", "ema"),
        parameters={n: Parameter(s, True, step) for n, s in SHAPES.items()},
        buffers=("calls", "mask"),
        files=files,
        meta={"step": step, "samples_seen": step * 10},
    )
    return checkpoint.publish(folder, dataclasses.replace(manifest, **fields))  # type: ignore[arg-type]
