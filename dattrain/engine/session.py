"""A model with its DeepSpeed engine, average and update at one image size: drawn, or fine-tuned.

Progressive resizing ends one session and opens the next from the checkpoint between them (``new_resolution``).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dattrain.config.derive import Derived
from dattrain.config.schema import Config
from dattrain.data.classes import Classes
from dattrain.engine import activation_checkpointing, initial_weights, optim, zero
from dattrain.engine import compile as compiling
from dattrain.engine.ema import Ema
from dattrain.engine.step import TrainStep
from dattrain.errors import UserError
from dattrain.runtime.collectives import from_first
from dattrain.state.format import named
from dattrain.state.format.manifest import Manifest
from dattrain.state.partition import LocalState
from dattrain.tasks.base import Size, Task
from dattrain.tasks.create import create_task

log = logging.getLogger(__name__)


@dataclass
class Session:
    """Everything that depends on the image size."""

    img_size: Size
    engine: Any
    ema: Ema | None
    train_step: TrainStep

    @property
    def ema_tensors(self) -> list[Tensor] | None:
        """What a checkpoint saves and restores of the average."""
        return None if self.ema is None else self.ema.tensors

    def close(self) -> None:
        """End the engine: its hooks and buffers."""
        self.engine.destroy()


def open_session(
    config: Config,
    derived: Derived,
    device: torch.device,
    img_size: Size,
    *,
    task: Task | None = None,
    manifest: Manifest | None = None,
    classes: Classes | None = None,
) -> Session:
    """Build model and engine. Collective.

    Args:
        task: None makes that of the recipe.
        manifest: of the checkpoint that will be loaded: weights need not come from ``init.from``, and continuous tables
            take the shapes that they have there. None for a fresh start.
        classes: of the model's outputs, for ``init.head``; None where they are unknown.

    Raises:
        UserError: nothing usable at ``init.from``, or tensors that do not fit.
    """
    task = task or create_task(config)
    shapes = None if manifest is None else {name: p.shape for name, p in manifest.parameters.items()}
    model = task.build(img_size, shapes)
    if manifest is None and config.init.from_ is not None:
        given = config.init.from_
        try:
            source = from_first(lambda: named.weights(given, hint=True))
            tensors, what = initial_weights.shared_source(source, ema=config.init.ema)
        except UserError as error:
            raise UserError(f"init.from={given}: {error}") from error
        status = task.initialise(model, tensors, source, classes)
        log.info("init.from=%s (%s): %s", config.init.from_, what, status)
    activation_checkpointing.apply(model, config.train.activation_checkpointing)
    scales = optim.layer_scales(model, config.optim.layer_decay) if config.optim.layer_decay < 1 else None
    optimizer = optim.build(model, config, device)
    compiling.apply(
        model,
        config.train.compile,
        graphs_on=device.type if config.train.cuda_graphs else None,
        training_only=config.task.kind != "classification",
    )
    engine = zero.initialize(model, optimizer, zero.ds_config(config, derived, device=device.type), device)
    if scales is not None:
        assert isinstance(optimizer, optim.AdamW)
        optim.apply_layer_decay(optimizer, LocalState(engine), scales)
    ema = Ema(engine, config.train.ema_decay) if config.train.ema_decay > 0 else None
    noise_width = task.noise_width(model)
    engine.train()
    step = TrainStep(engine, task, config, derived.accumulation, noise_width, device)
    return Session(img_size, engine, ema, step)
