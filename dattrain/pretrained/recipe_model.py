"""A recipe's network without memory: names, shapes and what is trained, for what reads and writes checkpoints."""

from __future__ import annotations

from typing import Any

import torch

from dattrain.config.schema import Config
from dattrain.engine.optim import freeze_backbone
from dattrain.models import zoo
from dattrain.models.dat import DAT


def network(config: Config, img_size: Any) -> DAT:
    """The recipe's model laid out for ``img_size``, without memory, frozen as the recipe says."""
    model = config.model
    with torch.device("meta"):
        net = zoo.create(
            model.name,
            num_classes=model.num_classes,
            img_size=tuple(img_size) if isinstance(img_size, list) else img_size,
            in_chans=model.in_chans,
            **model.overrides,
        )
    if config.optim.freeze_backbone:
        freeze_backbone(net)
    return net
