"""A recipe's network without memory: names, shapes and what is trained, for what reads and writes checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dattrain.config.schema import Config
from dattrain.config.sections import as_pair
from dattrain.engine.optim import freeze_backbone
from dattrain.models.dat import DAT
from dattrain.pretrained.pretrained_cfg import build, cfg_of_recipe


def network(config: Config, img_size: int | Sequence[int]) -> DAT:
    """The recipe's model laid out for ``img_size``, on the meta device, frozen as the recipe says."""
    net = build(replace(cfg_of_recipe(config), img_size=as_pair(img_size)), meta=True)
    if config.optim.freeze_backbone:
        freeze_backbone(net)
    return net
