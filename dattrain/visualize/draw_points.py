"""One image with its deformed sampling points, on a matplotlib axis of the caller's: for notebooks and figures."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from dattrain.errors import UserError
from dattrain.models.dense.detector import Detector
from dattrain.pretrained import preprocess
from dattrain.pretrained.pretrained_cfg import PretrainedCfg
from dattrain.visualize import draw, sampling_points
from dattrain.visualize.picture import picture_of


def draw_points(
    model: nn.Module,
    image: np.ndarray | Tensor,
    *,
    cfg: PretrainedCfg,
    axis: Axes,
    stage: int | None = None,
    block: int | None = None,
    group: int | None = None,
    area: float = 16.0,
) -> None:
    """Draw an image with its deformed sampling points on ``axis``, point size by the attention received.

    Args:
        model: as ``load_model`` gives it.
        image: uint8, H x W, H x W x 3, or a tensor 3 x H x W; prepared for the model as ``cfg`` says.
        cfg: as ``load_model`` gives it beside the model.
        axis: where to draw.
        stage: from 1; None takes the first stage with deformable attention and at least two offset groups, else the first
            with any (the paper draws its third).
        block: of the stage, from 0; None takes the stage's last deformable block.
        group: from 1; None draws all, each in its colour.
        area: mean area of a point, in square typographic points.

    Raises:
        UserError: the model has no such block or group.
    """
    pixels = preprocess.as_pixels(image, upright=cfg.sides is not None)
    prepared = preprocess.prepare(pixels, cfg)
    device = next(model.parameters()).device
    if isinstance(model, Detector):
        blocks = attended_image(model, prepared, cfg, device=device)
    else:
        blocks = capture_image(model, prepared, cfg, device=device)
    if stage is None:
        stage = next((b.stage for b in blocks if b.groups > 1), blocks[0].stage)
    chosen = sampling_points.select(blocks, stage=stage, block=block)[-1]
    if group is not None and not 1 <= group <= chosen.groups:
        raise UserError(f"group {group}: stage {stage} has groups 1 to {chosen.groups}")
    groups = None if group is None else [group - 1]
    draw.points(axis, picture_of(pixels, cfg), chosen, groups, area=area)


def attended_image(
    model: Detector,
    image: Tensor,
    cfg: PretrainedCfg,
    *,
    query: tuple[float, float] | None = None,
    device: str | torch.device = "cpu",
) -> list[sampling_points.Deformed]:
    """Positions of every deformable block of a detector's backbone for one prepared image (3 x H x W uint8), and what each key gets.

    Of all queries, or of the one at ``query``: the map of a detector's image is too large for the attention of each of them.

    Args:
        query: (y, x) as fractions of the image.
    """
    x = preprocess.model_input(image, cfg, device)
    share = image.shape[1] / x.shape[2], image.shape[2] / x.shape[3]

    def weights(rows: int, columns: int) -> Tensor:
        if query is None:
            return torch.ones(rows * columns)
        one = torch.zeros(rows * columns)
        place = (query[0] * share[0], query[1] * share[1])
        one[sampling_points.token_at(place, (rows, columns))] = 1
        return one

    return sampling_points.attended(model.backbone, x, weights, list)


def capture_image(
    model: nn.Module, image: Tensor, cfg: PretrainedCfg, *, device: str | torch.device = "cpu"
) -> list[sampling_points.Deformed]:
    """Positions and attention of every deformable block for one prepared image (3 x H x W uint8)."""
    return capture_with_logits(model, image, cfg, device=device)[0]


def capture_with_logits(
    model: nn.Module, image: Tensor, cfg: PretrainedCfg, *, device: str | torch.device = "cpu"
) -> tuple[list[sampling_points.Deformed], Tensor]:
    """As ``capture_image``, and the logits of the same pass (float32, on the CPU; empty without a head)."""
    batch = preprocess.model_input(image, cfg, device)
    found: list[Tensor] = []
    handle = model.register_forward_hook(lambda module, arguments, output: found.append(output))
    try:
        blocks = sampling_points.capture(model, batch, attention=True)[0]
    finally:
        handle.remove()
    return blocks, found[-1][0].float().cpu() if cfg.num_classes else torch.empty(0)
