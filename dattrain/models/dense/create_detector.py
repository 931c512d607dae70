"""From the name of a head to a detector with fresh weights."""

from __future__ import annotations

from typing import Any, Literal

from dattrain.models.arguments import check_choices
from dattrain.models.dense.backbone import Backbone
from dattrain.models.dense.detector import Detector
from dattrain.models.dense.faster_rcnn import FasterRCNN
from dattrain.models.dense.norm import Norm
from dattrain.models.dense.retinanet import RetinaNet

DetectorKind = Literal["retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"]


def outs(head: DetectorKind) -> tuple[int, ...]:
    """Stages whose maps a detector takes: the ``outs`` of its backbone.

    Raises:
        UserError: a head that there is not.
    """
    check_choices(head=(head, DetectorKind))
    return (1, 2, 3) if head == "retinanet" else (0, 1, 2, 3)


def create_detector(
    backbone: Backbone,
    head: DetectorKind,
    num_classes: int,
    *,
    norm: Norm = "sync",
    channels: int | None = None,
    region_samples: int = 512,
    score_threshold: float = 0.05,
    max_detections: int = 100,
) -> Detector:
    """Put pyramid and heads with fresh weights on a backbone of the maps ``outs(head)``.

    Args:
        head: those with ``mask`` in their name give masks too.
        num_classes: categories, without a background.
        norm: of the box heads of Cascade R-CNN, see ``norm.create_norm``; the others have none.
        channels: of pyramid and heads; None takes 256. Linear layers of box heads have four times as many.
        region_samples: regions of an image that the heads of R-CNNs are trained on.
        score_threshold, max_detections: of objects in evaluation.

    Raises:
        UserError: a head or norm that there is not.
    """
    check_choices(head=(head, DetectorKind))
    limits: dict[str, Any] = {"score_threshold": score_threshold, "max_detections": max_detections}
    if head == "retinanet":
        return RetinaNet(backbone, num_classes, channels=channels or 256, **limits)
    return FasterRCNN(
        backbone,
        num_classes,
        cascade=head.startswith("cascade"),
        masks="mask" in head,
        norm=norm,
        channels=channels or 256,
        region_samples=region_samples,
        **limits,
    )
