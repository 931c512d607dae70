"""Open what torch.distributed.checkpoint (DCP) wrote: every full tensor by its key, whichever ranks wrote its chunks.

Two layouts are known: ``.metadata`` beside ``*.distcp`` (``FileSystemWriter``, torchtitan, FSDP), and safetensors files whose
header says where a chunk belongs (``HuggingFaceStorageWriter``). ``.metadata`` is a pickle of a few plain classes. Here they
are read as records of their fields, none of torch's own code is called and nothing else may be named; chunks are read by
torch's weights-only reader. Only with ``trust`` are files unpickled. No ranks are needed, and one tensor is read at a time.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import stat
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dattrain.errors import UserError
from dattrain.state.convert.offline import first_line, untrusted

METADATA = ".metadata"
_LIMIT = 1 << 30
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: its first corner, its sides, and how to read it."""

    offsets: Shape
    sizes: Shape
    read: Callable[[], Tensor]


@dataclass
class Store:
    """What a folder holds: tensors as (shape, chunks) by key, and functions that read objects that are no tensors."""

    folder: Path
    tensors: dict[str, tuple[Shape, list[Chunk]]] = field(default_factory=dict)
    objects: dict[str, Callable[[], Any]] = field(default_factory=dict)

    def shape(self, key: str) -> Shape:
        """Shape of a tensor."""
        return self.tensors[key][0]

    def tensor(self, key: str) -> Tensor:
        """The full tensor of a key, on the host, in its own dtype. Memory: it and its largest chunk.

        Raises:
            UserError: a chunk cannot be read, is not as announced, or the chunks do not cover the tensor exactly once.
        """
        shape, chunks = self.tensors[key]
        full: Tensor | None = None
        seen = torch.zeros(shape, dtype=torch.bool)
        for chunk in chunks:
            part = chunk.read()
            if not isinstance(part, Tensor) or part.layout != torch.strided or part.shape != chunk.sizes:
                raise UserError(f"{self.folder}: {key} is not the tensor that its list of contents promises")
            part = part.detach()
            if chunk.sizes == shape and len(chunks) == 1:
                return part
            full = torch.empty(shape, dtype=part.dtype) if full is None else full
            box = tuple(slice(at, at + side) for at, side in zip(chunk.offsets, chunk.sizes))
            if part.dtype != full.dtype or seen[box].any():
                raise UserError(f"{self.folder}: chunks of {key} overlap or differ in dtype")
            full[box] = part
            seen[box] = True
        if full is None or not seen.all():
            raise UserError(f"{self.folder}: {key} of shape {shape} is not there in full")
        return full

    def value(self, key: str) -> Any:
        """A number, text or list, which DCP keeps as an object or as a tensor of one element. Raises UserError."""
        if key not in self.tensors:
            return self.objects[key]()
        tensor = self.tensor(key)
        return tensor.item() if tensor.numel() == 1 else tensor


def find(folder: Path, tag: str | None = None) -> Path | None:
    """The checkpoint that ``folder`` means: itself, its ``tag``, or the latest of torchtitan's ``step-N``; None without any."""
    if tag is not None:
        return (
            folder / tag if tag not in ("", ".", "..") and "/" not in tag and _is_one(folder / tag) else None
        )
    if _is_one(folder):
        return folder
    numbered = [p for p in folder.glob("step-*") if p.name[5:].isdecimal() and (p / METADATA).exists()]
    return max(numbered, key=lambda p: int(p.name[5:]), default=None)


def _is_one(folder: Path) -> bool:
    return (folder / METADATA).exists() or any(folder.glob("*.safetensors"))


def open_store(folder: Path, *, trust: bool = False) -> Store:
    """Open a checkpoint that ``find`` has found; every file is checked to be there in its size.

    Raises:
        UserError: it is none, is incomplete, needs ``trust``, or is of a kind that is not known.
    """
    return _from_metadata(folder, trust) if (folder / METADATA).exists() else _from_safetensors(folder)


# .metadata and .distcp


class _Record:
    """One of DCP's plain classes: whatever it was made from, its fields are attributes."""

    def __new__(cls, *arguments: object) -> _Record:
        return super().__new__(cls)

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, Mapping):
            self.__dict__.update(state)


_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "_MEM_FORMAT_ENCODING",
        "MetadataIndex",
        "StorageMeta",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    # Where torch 2.0 to 2.2 had them.
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
}


class _Refused(pickle.UnpicklingError):
    pass


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return _Record
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise _Refused(f"it names {module}.{name}")


def _from_metadata(folder: Path, trust: bool) -> Store:
    path = folder / METADATA
    if not 0 <= _size(path) <= _LIMIT:
        raise UserError(f"{path}: is no ordinary file of at most {_LIMIT} bytes")
    try:
        with open(path, "rb") as file:
            listed = pickle.load(file) if trust else _Unpickler(file).load()
        places = _places(folder, listed)
        store = Store(folder)
        for key, what in listed.state_dict_metadata.items():
            if not isinstance(key, str):
                raise TypeError(f"a key {key!r}")
            if hasattr(what, "chunks"):
                shape, boxes = _shape(what.size), {}
                for chunk in what.chunks:
                    boxes[_shape(chunk.offsets)] = _shape(chunk.sizes)
                store.tensors[key] = (
                    shape,
                    [
                        Chunk(at, _inside(key, at, sides, shape), partial(_load, *places[key, at], trust))
                        for at, sides in boxes.items()
                    ],
                )
            elif (key, None) in places:
                store.objects[key] = partial(_load, *places[key, None], trust)
    except _Refused as e:
        raise UserError(untrusted(path, str(e))) from e
    except (
        # What unpickling raises by where a file is damaged, and what records without their fields do.
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        ImportError,
        OverflowError,
        RecursionError,
        MemoryError,
        RuntimeError,
    ) as e:
        raise UserError(f"{path}: is not as torch writes it ({type(e).__name__}: {first_line(e)})") from e
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from e
    return store


def _places(folder: Path, listed: Any) -> dict[tuple[str, Shape | None], tuple[Path, int, int]]:
    """(key, first corner) -> file, first byte and length, of everything that the list of contents names."""
    places: dict[tuple[str, Shape | None], tuple[Path, int, int]] = {}
    needed: dict[Path, int] = {}
    for index, info in listed.storage_data.items():
        name = info.relative_path
        if not isinstance(name, str) or Path(name).is_absolute() or {"..", ""} & set(name.split("/")):
            raise UserError(f"{folder / METADATA}: names the file {name!r}, which is not in this folder")
        if getattr(info, "transform_descriptors", None):
            what = ", ".join(map(str, info.transform_descriptors))
            raise UserError(f"{folder}: is written through {what}; only what is written as it is can be read")
        begin, length = int(info.offset), int(info.length)
        if begin < 0 or length < 0:
            raise ValueError(f"a place {begin}, {length}")
        offset = getattr(index, "offset", None)
        places[index.fqn, None if offset is None else _shape(offset)] = (folder / name, begin, length)
        needed[folder / name] = max(needed.get(folder / name, 0), begin + length)
    wrong = []
    for path, least in needed.items():
        size = _size(path)
        if size < least:
            name = str(path.relative_to(folder))
            wrong.append(f"{name} is missing" if size < 0 else f"{name} has {size} bytes of at least {least}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UserError(f"{folder} is incomplete: {'; '.join(sorted(wrong)[:5])}{more}")
    return places


def _load(path: Path, begin: int, length: int, trust: bool) -> Any:
    try:
        with open(path, "rb") as file:
            file.seek(begin)
            data = io.BytesIO(file.read(length))
        return torch.load(data, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as e:
        raise UserError(untrusted(path, first_line(e))) from e
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from e
    except (RuntimeError, EOFError, ValueError, AttributeError, ImportError, LookupError, TypeError) as e:
        raise UserError(
            f"{path}: cannot be read at byte {begin} ({type(e).__name__}: {first_line(e)})"
        ) from e


# Safetensors


def _from_safetensors(folder: Path) -> Store:
    from safetensors import SafetensorError, safe_open

    found: dict[str, list[Chunk]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            if _size(path) < 0:
                raise OSError("not an ordinary file")
            with safe_open(path, "pt") as file:
                corners = json.loads((file.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    sides = _shape(file.get_slice(key).get_shape())
                    at = _shape(corners[key]["saved_offsets"]) if key in corners else (0,) * len(sides)
                    found.setdefault(key, []).append(Chunk(at, sides, partial(_slice, path, key)))
        except (SafetensorError, OSError, ValueError, TypeError, LookupError) as e:
            raise UserError(f"{path}: not a complete safetensors file ({first_line(e)})") from e
    if not found:
        raise UserError(f"{folder} is no checkpoint of torch.distributed.checkpoint: it holds no {METADATA}")
    return Store(
        folder,
        {
            key: (
                tuple(max(a) for a in zip(*(tuple(map(sum, zip(c.offsets, c.sizes))) for c in chunks))),
                chunks,
            )
            for key, chunks in found.items()
        },
    )


def _slice(path: Path, key: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{path}: {key} cannot be read ({first_line(e)})") from e


# Shared


def _shape(value: Any) -> Shape:
    shape = tuple(int(side) for side in value)
    if any(side < 0 for side in shape) or math.prod(shape) >= 1 << 62:
        raise ValueError(f"a shape {shape}")
    return shape


def _inside(key: str, at: Shape, sides: Shape, shape: Shape) -> Shape:
    if len(at) != len(shape) or len(sides) != len(shape):
        raise ValueError(f"{key} of shape {shape} has a chunk of other dimensions")
    if any(a + s > side for a, s, side in zip(at, sides, shape)):
        raise ValueError(f"{key} of shape {shape} has a chunk outside of it")
    return sides


def _size(path: Path) -> int:
    """Bytes of an ordinary file, or of what a link leads to; -1 for anything else."""
    try:
        status = os.stat(path)
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
