"""A checkpoint of another program (DeepSpeed, torch.distributed.checkpoint) as one of a run's own."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from dattrain.config.load import load
from dattrain.config.schema import Config
from dattrain.errors import UserError
from dattrain.models import surgery
from dattrain.pretrained.recipe_model import network
from dattrain.runtime import owner
from dattrain.runtime.health import NonFinitePolicy
from dattrain.state.checkpointer import describe
from dattrain.state.convert import dcp_read, dcp_store, deepspeed_read, offline
from dattrain.state.convert.offline import Source
from dattrain.state.format import checkpoint
from dattrain.state.format.manifest import Manifest, Parameter
from dattrain.state.load import check_fits


class Imported(NamedTuple):
    """The checkpoint's folder, what was read, and the position in the data that it resumes at."""

    folder: Path
    source: Source
    samples_seen: int


def import_checkpoint(
    source_dir: Path,
    run_dir: Path,
    *,
    source_format: Literal["deepspeed", "dcp"] | None = None,
    tag: str | None = None,
    samples_seen: int | None = None,
    trust: bool = False,
) -> Imported:
    """Write a checkpoint of the run at ``run_dir`` from what another program saved.

    Args:
        source_dir: what ``engine.save_checkpoint`` or ``dcp.save`` was given, or torchtitan's folder of ``step-N``.
        run_dir: a run folder with a ``config.yaml`` of the same model.
        source_format: None takes what the folder looks like.
        tag: which of its checkpoints; None takes the latest.
        samples_seen: position in the data; None takes what the source tells.
        trust: unpickle what cannot be read otherwise, which may run any code.

    Raises:
        UserError: a folder that is not there or holds something else, a model that is not the recipe's, a position that
            nothing tells, a step that the run has already.
    """
    if not source_dir.is_dir():
        raise UserError(f"{source_dir} is no folder")
    if not (run_dir / "config.yaml").is_file():
        raise UserError(
            f"{run_dir} has no config.yaml: it says which model and data the checkpoint resumes with"
        )
    config = load(run_dir / "config.yaml", []).config
    root = run_dir / "checkpoints"
    program, source = _read(source_dir, config, source_format, tag, trust)
    samples = source.samples if samples_seen is None else samples_seen
    if samples is None:
        samples = _samples_of_start(source, source_dir, config)
    if (root / checkpoint.folder_name(source.step)).exists():
        raise UserError(f"{root} already holds a checkpoint of step {source.step}")
    description = describe(config)
    counters = {"global_steps": source.step, "global_samples": samples, "skipped_steps": 0}
    manifest = Manifest(
        step=source.step,
        samples_seen=samples,
        world=0,
        stage=source.stage,
        precision=description.precision,
        states=source.states,
        parameters=source.parameters,
        buffers=source.buffers,
        engine=source.engine or {**counters, "loss_scaler": None},
        groups=source.groups,
        meta=_meta(config, source, samples) | {"imported_from": f"{program}: {source_dir.name}"},
        config_sha256=description.config_sha256,
        versions=description.versions,
        saved_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    try:
        with owner.acquire(run_dir, "imported into"):
            folder = offline.write_checkpoint(root, manifest, source.parts)
    except OSError as e:
        raise UserError(f"{root}: the checkpoint could not be written: {e.strerror or e}") from e
    return Imported(folder, source, samples)


def _read(
    folder: Path, config: Config, source_format: str | None, tag: str | None, trust: bool
) -> tuple[str, Source]:
    """The name of the program that wrote ``folder``, and what it holds, which is of the recipe's model."""
    found = dcp_store.find(folder, tag)
    listed = found is not None and (found / dcp_store.METADATA).exists()
    looks = "dcp" if listed or (found and not (folder / "latest").exists()) else "deepspeed"
    if (source_format or looks) == "deepspeed":
        source = deepspeed_read.read(folder, tag=tag, trust=trust)
        _check_model(config, source, {})
        return "DeepSpeed", source
    net = network(config, config.model.img_size)
    parameters = [n for n, _ in net.named_parameters()]
    buffers = {n: b for n, b in net.state_dict().items() if n not in set(parameters)}
    source = dcp_read.read(folder, parameters, list(buffers), tag=tag, trust=trust)
    _check_model(config, source, buffers)
    return "DCP", source


def _samples_of_start(source: Source, folder: Path, config: Config) -> int:
    if source.step:
        batch = config.train.global_batch
        raise UserError(
            f"{folder} does not tell the position in the data; give --samples-seen: {source.step} updates "
            f"of train.global_batch={batch} are {source.step * batch}"
        )
    return 0


def _meta(config: Config, source: Source, samples: int) -> dict[str, Any]:

    fresh = {
        "img_size": config.model.img_size,
        "metrics": {},
        "health": NonFinitePolicy(1, 0).state(),
        "bad_samples": 0,
    }
    return {**fresh, **source.meta, "step": source.step, "samples_seen": samples}


def _check_model(config: Config, source: Source, buffers: Mapping[str, Tensor]) -> None:

    net = network(config, source.meta.get("img_size", config.model.img_size))
    if config.init.bias_table == "sample":
        surgery.adopt_tables(net, {n: p.shape for n, p in source.parameters.items()})
    ours = {n: Parameter(tuple(p.shape), p.requires_grad) for n, p in net.named_parameters()}
    theirs = Manifest(source.step, 0, 0, 0, "", (), source.parameters, source.buffers)
    check_fits(ours, theirs, buffers)
