"""What detectors share: a backbone, a pyramid, heads; losses in training, objects in evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dattrain.models.dense.backbone import Backbone
from dattrain.models.dense.fpn import FPN
from dattrain.models.protocol import CheckpointMode

Sizes = Sequence[tuple[int, int]]
"""Height and width of each image of a micro-batch, without padding."""
Target = Mapping[str, Tensor]
"""``boxes``, ``labels`` and perhaps ``masks`` of an image, see ``Detector.forward``."""


class Detector(nn.Module):
    """Base of ``RetinaNet`` and ``FasterRCNN``; made by ``create_detector``.

    Attributes:
        num_drop_path: columns of ``drop_path_noise``: the backbone's residual branches, then one for each sampler of the heads.
        num_layers: as the backbone's; everything after the blocks is the last.
        has_masks: whether objects have masks.
        score_threshold: least score of an object in evaluation.
        max_detections: most objects of an image in evaluation.
    """

    samplers = 0
    """Random choices of the heads in training, for each image."""
    has_masks = False

    def __init__(
        self,
        backbone: Backbone,
        neck: FPN,
        num_classes: int,
        *,
        score_threshold: float = 0.05,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.num_classes = num_classes
        self.score_threshold, self.max_detections = score_threshold, max_detections
        self.num_drop_path = backbone.num_drop_path + self.samplers
        self.num_layers = backbone.num_layers

    def forward(
        self,
        x: Tensor,
        sizes: Sizes,
        targets: Sequence[Target | None] | None = None,
        drop_path_noise: Tensor | None = None,
    ) -> Any:
        """Losses in training, objects in evaluation.

        Args:
            x: B x in_chans x H x W, padded at the right and at the bottom.
            sizes: of the B images, without padding.
            targets: in training, of each image: ``boxes`` n x 4 fp32 (x1, y1, x2, y2 in pixels), ``labels`` n int64 in [0,
                num_classes), and where ``has_masks`` also ``masks``, n x G x G uint8: how much of each cell of a grid over its box an
                object covers, 255 for all of it. None for an image that has no part in any loss.
            drop_path_noise: B x num_drop_path fp32 uniforms in [0, 1): what is dropped and sampled is a function of them, the
                same whatever else is in the micro-batch. None draws from torch's generator. Without effect outside training.

        Returns:
            In training fp32 scalars under mmdet's names, the same names in every call. They are divided by what the micro-batch
            holds, as mmdet divides by what a GPU's batch does; their sum is the loss. In evaluation a list of B mappings, best
            first: ``boxes`` n x 4 fp32 in pixels of x, ``scores`` n fp32, ``labels`` n int64, and where ``has_masks`` also ``masks``,
            n x 28 x 28 fp32, the probability of the object in each cell of its box.
        """
        if len(sizes) != len(x):
            raise ValueError(f"{len(sizes)} sizes for {len(x)} images")
        if not self.training:
            return self.detect(self.neck(self.backbone(x)), sizes)
        if targets is None or len(targets) != len(x):
            raise ValueError("training needs targets, one for each image, or None in its place")
        noise, samples = None, torch.rand(0, device=x.device)
        if drop_path_noise is None:
            samples = torch.rand(len(x), self.samplers, device=x.device)
        else:
            if tuple(drop_path_noise.shape) != (len(x), self.num_drop_path):
                raise ValueError(
                    f"drop_path_noise is {tuple(drop_path_noise.shape)}, not {(len(x), self.num_drop_path)}"
                )
            noise, samples = drop_path_noise.split([self.backbone.num_drop_path, self.samplers], dim=1)
        return self.losses(self.neck(self.backbone(x, noise)), sizes, targets, samples)

    def losses(
        self, levels: list[Tensor], sizes: Sizes, targets: Sequence[Target | None], samples: Tensor
    ) -> dict[str, Tensor]:
        """What ``forward`` gives in training; ``samples`` is B x ``samplers``."""
        raise NotImplementedError

    def detect(self, levels: list[Tensor], sizes: Sizes) -> list[dict[str, Tensor]]:
        """What ``forward`` gives in evaluation."""
        raise NotImplementedError

    def forward_dummy(self, x: Tensor) -> object:
        """Every head's own output, to count by: with 1,000 proposals and 100 regions with masks (mmdet's name and numbers).

        In training with as many as that takes at most, to find its memory without values.
        """
        raise NotImplementedError

    def layer_of(self, parameter_name: str) -> int:
        """Depth of a parameter, for layer decay: 0 stem, one per block, ``num_layers`` norms of outputs, pyramid and heads.

        Raises:
            ValueError: not a name of this model's parameters.
        """
        part, _, name = parameter_name.partition(".")
        if part == "backbone":
            return self.backbone.layer_of(name)
        if part in dict(self.named_children()):
            return self.num_layers
        raise ValueError(f"{parameter_name!r} is not a parameter of {type(self).__name__}")

    def no_weight_decay(self) -> set[str]:
        """Names of position biases; norms and biases are 1-D and excluded by that."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True, mode: CheckpointMode = "block") -> None:
        """Recompute the backbone's activations in the backward pass; ``mode`` as in ``DAT.set_grad_checkpointing``."""
        self.backbone.set_grad_checkpointing(enable, mode)

    def get_classifier(self) -> nn.Module:
        """What is trained when the backbone's weights are frozen: pyramid and heads, and the norms of its outputs."""
        rest = [module for name, module in self.named_children() if name != "backbone"]
        return nn.ModuleList([self.backbone.norms, *rest])


def shapes_of(levels: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Height and width of each level's map."""
    return [(level.shape[2], level.shape[3]) for level in levels]


def by_anchor(maps: Sequence[Tensor], width: int) -> list[Tensor]:
    """B x (anchors * width) x H_i x W_i, the anchor the slower index, to fp32 B x (H_i * W_i * anchors) x width: the order of ``Anchors``."""
    return [each.float().permute(0, 2, 3, 1).reshape(len(each), -1, width) for each in maps]
