"""What the formats share: a checkpoint as found, ours written without an engine, safetensors files streamed by tensors."""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dattrain.files import replacing
from dattrain.state.background import HostBuffer, image_of
from dattrain.state.format import checkpoint, rank_file
from dattrain.state.format.manifest import Manifest, Parameter, rank_file_name
from dattrain.state.format.rank_file import Digest, Piece
from dattrain.state.partition import MOMENTS


@dataclass
class Source:
    """Another program's checkpoint as found: what a manifest needs, and functions that read its tensors, one rank file's at a time."""

    stage: int
    step: int
    samples: int | None
    """Position in the data, None where it does not tell."""
    parameters: dict[str, Parameter]
    buffers: tuple[str, ...]
    engine: dict[str, Any]
    parts: list[Callable[[], dict[Piece, Tensor]]]
    groups: list[dict[str, Any]] = field(default_factory=list)
    states: tuple[str, ...] = ("param", *MOMENTS)
    meta: dict[str, Any] = field(default_factory=dict)
    """The trainer's own, where it was we who had written it."""
    notes: list[str] = field(default_factory=list)
    """What whoever imports it should know."""


def untrusted(path: Path, why: str) -> str:
    """The message for a file that the weights-only reader refuses."""
    return (
        f"{path}: cannot be read without running code that it names. If you, or someone you trust, made it: "
        f"--trust. ({why})"
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).splitlines()), "")


def write_checkpoint(
    root: Path, manifest: Manifest, parts: Iterable[Callable[[], Mapping[Piece, Tensor]]]
) -> Path:
    """Publish a checkpoint whose file of rank ``r`` holds what ``parts[r]()`` returns; returns its folder.

    One part is in memory at a time, beside its image of the file. ``manifest.files`` and ``manifest.world`` are filled in.

    Raises:
        OSError: it could not be written; nothing is left.
    """
    root.mkdir(parents=True, exist_ok=True)
    folder = checkpoint.temporary_folder(root, manifest.step, secrets.token_hex(4))
    folder.mkdir()
    try:
        buffer = HostBuffer(pinned=False)
        files: dict[str, Digest] = {}
        for rank, part in enumerate(parts):
            name = rank_file_name(rank)
            files[name] = _write_rank_file(folder / name, part(), buffer)
        return checkpoint.publish(folder, dataclasses.replace(manifest, files=files, world=len(files)))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_rank_file(path: Path, tensors: Mapping[Piece, Tensor], buffer: HostBuffer) -> Digest:
    layout = rank_file.layout(tensors)
    host = buffer.take(layout.size)
    image = image_of(host)
    image[: len(layout.header)] = layout.header
    for piece, at in zip(layout.pieces, layout.offsets):
        if piece.nbytes:
            host[at : at + piece.nbytes].copy_(_bytes(tensors[piece]))
    return rank_file.write(path, image, len(layout.header))


def stream_file(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
) -> None:
    """Write one ordinary safetensors file, holding one tensor at a time, by ``dattrain.files.replacing``.

    Args:
        path: of the file.
        tensors: (name, tensor), in the order of ``shapes``.
        shapes: safetensors dtype and shape of each tensor by name.
        metadata: strings for the file's header.

    Raises:
        ValueError: ``tensors`` are not those that ``shapes`` promises.
    """
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, (dtype, shape) in shapes.items():
        size = Piece("", name, 0, torch.Size(shape).numel(), dtype).nbytes
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with replacing(path, durable=True) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        names = iter(shapes.items())
        for name, tensor in tensors:
            wanted = next(names, ("nothing", ("", ())))
            if (name, tuple(tensor.shape)) != (wanted[0], tuple(wanted[1][1])):
                raise ValueError(f"{name} of shape {tuple(tensor.shape)} came where {wanted} was promised")
            if tensor.numel():
                file.write(image_of(_bytes(tensor)))
        if next(names, None) is not None:
            raise ValueError("fewer tensors came than were promised")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
