"""What a mask head shall give for a region: the object's mask, cut out by the region."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align


def mask_targets(masks: Tensor, boxes: Tensor, objects: Tensor, regions: Tensor, size: int = 28) -> Tensor:
    """Cells of which the object covers half or more.

    mmdet's ``BitmapMasks.crop_and_resize``, whose bitmaps are as large as the image. Here each object has a grid over its own
    box; a cell of the target averages as many samples of it as it has grid cells across, whichever of both is finer.

    Args:
        masks: n x G x G uint8, coverage (0 to 255) by the object of a cell of the grid over its box.
        boxes: n x 4 fp32 xyxy, pixels.
        objects: N int64 in [0, n).
        regions: N x 4 fp32 xyxy, pixels; what of them is outside of the object's box is not covered.

    Returns:
        N x size x size fp32 of 0 and 1.
    """
    if not len(objects):
        return boxes.new_zeros(0, size, size)
    side = masks.shape[-1]
    of_object = boxes[objects]
    scale = side / (of_object[:, 2:] - of_object[:, :2]).clamp(min=1e-6)
    # In cells of the grid, around which there is one of zeros: beyond its edge RoIAlign would repeat the outermost.
    corner = of_object[:, :2].repeat(1, 2)
    in_grid = (regions - corner) * scale.repeat(1, 2) + 1
    grids = F.pad(masks[:, None].to(boxes.dtype), (1, 1, 1, 1))
    numbered = F.pad(in_grid, (1, 0))
    numbered[:, 0] = objects
    covered: Tensor = roi_align(grids, numbered, size, 1.0, sampling_ratio=0, aligned=True)
    return (covered[:, 0] >= 127.5).to(boxes.dtype)
