"""Write our checkpoints as torch.distributed.checkpoint (DCP) does, for people who go to FSDP or torchtitan."""

from __future__ import annotations

import io
import json
import os
import pickle
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from dattrain.errors import UserError
from dattrain.files import sync
from dattrain.state import gather
from dattrain.state.convert.dcp_store import METADATA
from dattrain.state.format import checkpoint
from dattrain.state.format.manifest import Manifest
from dattrain.state.partition import MOMENTS

_FILE = "__0_0.distcp"
_Where = tuple[str | int, ...]


def write(folder: Path, out: Path, groups: Sequence[Mapping[str, Any]]) -> Path:
    """Write our checkpoint as the folder ``out``, which ``dcp.load`` reads on any number of ranks; returns ``out``.

    Keys are those that ``get_state_dict`` of a model and its ``torch.optim.AdamW`` gives, under ``model`` and ``optimizer``,
    nested or flattened, and those of torchtitan, whose model lies at the top: several keys may name the same bytes. Averages
    are a model under ``ema``. ``train_state`` holds ``step`` and ``samples_seen`` as tensors, and as JSON in bytes what
    only we know, so that the way back is exact. One tensor is in memory at a time, and its image.

    Args:
        folder: a checkpoint, or a run folder, which means its newest complete one.
        out: does not exist yet, or is an empty folder. It has its name when it is complete.
        groups: of the optimizer, in order; each has ``params`` (names) and AdamW's settings, others are torch's defaults.

    Raises:
        UserError: ``out`` is there already, or the checkpoint is damaged.
        OSError: it could not be written; nothing is left.
    """
    folder = checkpoint.locate(folder)
    manifest = checkpoint.check(folder)
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out} is there already")
    out.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = out.absolute().with_name(f".{out.absolute().name}.{secrets.token_hex(4)}")
    tmp_path.mkdir()
    try:
        with open(tmp_path / _FILE, "wb") as file:
            contents = _Contents(file)
            _put_all(contents, folder, manifest, groups)
            _sync(file)
        with open(tmp_path / METADATA, "wb") as file:
            pickle.dump(contents.metadata(), file)
            _sync(file)
        sync(tmp_path)
        os.rename(tmp_path, out)
        sync(out.absolute().parent)
    except BaseException:
        shutil.rmtree(tmp_path, ignore_errors=True)
        raise
    return out


def _put_all(
    contents: _Contents, folder: Path, manifest: Manifest, groups: Sequence[Mapping[str, Any]]
) -> None:
    averaged = "ema" in manifest.states
    for name, tensor in gather.iter_tensors(folder, "param"):
        frozen = averaged and not manifest.parameters[name].trainable
        contents.tensor(tensor, ("model", name), (name,), *([("ema", name)] if frozen else []))
    for name, tensor in gather.load_buffers(folder).items():
        contents.tensor(tensor, ("model", name), (name,), *([("ema", name)] if averaged else []))
    trained = [n for n, p in manifest.parameters.items() if p.trainable]
    if averaged:
        for name, tensor in gather.iter_tensors(folder, "ema", names=trained):
            contents.tensor(tensor, ("ema", name))
    for moment in MOMENTS:
        for name, tensor in gather.iter_tensors(folder, moment):
            contents.tensor(tensor, ("optimizer", "state", name, moment))
    for name in trained:
        step = torch.tensor(float(manifest.parameters[name].opt_step or 0))
        contents.tensor(step, ("optimizer", "state", name, "step"))
    for number, group in enumerate(_full_groups(groups)):
        for key, value in group.items():
            flat = [] if key == "params" else group["params"]
            contents.object(
                value,
                ("optimizer", "param_groups", number, key),
                *(("optimizer", f"param_groups.{name}.{key}") for name in flat),
            )
    contents.tensor(torch.tensor(manifest.step, dtype=torch.int32), ("train_state", "step"))
    contents.tensor(torch.tensor(manifest.samples_seen), ("train_state", "samples_seen"))
    ours = {"engine": dict(manifest.engine), "meta": dict(manifest.meta), "stage": manifest.stage}
    text = bytearray(json.dumps(ours).encode())
    contents.tensor(torch.frombuffer(text, dtype=torch.uint8), ("train_state", "dattrain"))


def _full_groups(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """With every setting that torch's AdamW asks a checkpoint for; how a device computes is left to the reader's."""
    usual = torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).state_dict()["param_groups"][0]
    return [{**usual, **group, "params": list(group["params"])} for group in groups]


class _Contents:
    """Writes one data file and keeps the list of what lies where in it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._listed: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._paths: dict[str, _Where] = {}
        self._objects: dict[bytes, _StorageInfo] = {}

    def tensor(self, tensor: Tensor, *paths: _Where) -> None:
        """Write a tensor that is found at each of ``paths``."""
        info = self._write(_image(tensor))
        origin = torch.Size([0] * tensor.dim())
        for path in paths:
            key = self._name(path)
            chunk = ChunkStorageMetadata(offsets=origin, sizes=tensor.size())
            properties = TensorProperties(dtype=tensor.dtype)
            self._listed[key] = TensorStorageMetadata(properties, tensor.size(), [chunk])
            self._places[MetadataIndex(key, origin)] = info

    def object(self, value: Any, *paths: _Where) -> None:
        """Write what is no tensor; equal ones share their bytes."""
        image = _image(value)
        info = self._objects.get(image) or self._objects.setdefault(image, self._write(image))
        for path in paths:
            key = self._name(path)
            self._listed[key] = BytesStorageMetadata()
            self._places[MetadataIndex(key)] = info

    def metadata(self) -> Metadata:
        """The list, as ``.metadata`` holds it."""
        return Metadata(
            state_dict_metadata=self._listed,
            planner_data=self._paths,
            storage_data=self._places,
            storage_meta=StorageMeta(),
            version=CURRENT_DCP_VERSION,
        )

    def _name(self, path: _Where) -> str:
        key = ".".join(map(str, path))
        if key in self._listed:
            raise UserError(f"two things would be called {key}; such a model cannot be written for DCP")
        self._paths[key] = path
        return key

    def _write(self, image: bytes) -> _StorageInfo:
        # Not torch.save into the file: a full disk would come back as another error than OSError.
        begin = self._file.tell()
        self._file.write(image)
        return _StorageInfo(_FILE, begin, len(image))


def _image(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
