"""Detection and instance segmentation: boxes of objects, and their masks, the losses of the detector's heads, COCO's AP.

Its evaluation is in ``coco_ap``, what of it a report shows in ``detected_images``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dattrain.config.schema import Config
from dattrain.data import detection_factory
from dattrain.data.annotations.kinds import needs_masks
from dattrain.data.classes import Classes
from dattrain.data.detection_batch import GRID, DetectionBatch
from dattrain.data.loader import EvalLoader, TrainLoader
from dattrain.errors import ConfigError, UserError
from dattrain.models.dense.backbone import Backbone
from dattrain.models.dense.create_detector import DetectorKind, create_detector, outs
from dattrain.models.dense.detector import Detector
from dattrain.models.dense.weights import initialise
from dattrain.tasks import coco_ap, coco_numbers, detection_head, head
from dattrain.tasks.base import Forward, Loss, Size
from dattrain.tasks.coco_ap import CocoAP
from dattrain.tasks.dense import DenseTask, check_norm

log = logging.getLogger(__name__)

_EXAMPLES = 8
"""Objects of an image of ``Detection.example``: COCO's images have 7.3 of them in the mean."""


class Detection(DenseTask[Detector]):
    """See ``dattrain.tasks.base.Task``; its batch is a ``dattrain.data.detection_batch.DetectionBatch``.

    Raises:
        ConfigError: settings that do not go together, which the schema does not know of.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.metrics = coco_ap.names(config.task.head)
        self._with_masks = needs_masks(config.task.kind, config.task.head)

    # The model

    @property
    def outs(self) -> Sequence[int]:
        """RetinaNet leaves out the first stage's."""
        return outs(cast(DetectorKind, self.config.task.head))

    def add_heads(self, backbone: Backbone) -> Detector:
        """Pyramid and heads on the backbone."""
        t, e = self.config.task, self.config.eval
        return create_detector(
            backbone,
            cast(DetectorKind, t.head),
            self.config.model.num_classes,
            norm=t.norm,
            channels=t.channels,
            region_samples=t.region_samples,
            score_threshold=e.score_threshold,
            max_detections=e.max_detections,
        )

    def initialise(
        self, model: nn.Module, tensors: Mapping[str, Tensor], source: Path, classes: Classes | None
    ) -> str:
        """Backbone by name, tables as ``init.bias_table`` says; pyramid and heads where the weights are a detector's of this kind.

        ``init.head`` is about the rows of these heads that are a class's: its scores, and where each class has its own its boxes and
        masks. ``new`` draws them afresh and keeps the rest, ``map`` picks them by the names of classes, ``keep`` needs the same
        classes. Of other weights (a classification's, another detector's) pyramid and heads stay as they were drawn.
        """
        assert isinstance(model, Detector)
        init = self.config.init
        fits = detection_head.fits(model, tensors)
        note = ""
        if not fits and init.head == "map":
            raise ConfigError(
                f"init.head=map picks rows of a {self.config.task.head}'s heads, and init.from={init.from_} has none such; leave "
                "init.head out for weights of a classification, or set init.head=new"
            )
        if not fits:
            note = "pyramid and heads are new, since these weights have none of this detector\n"
        elif init.head == "new":
            tensors = detection_head.mapped(model, tensors, torch.full((model.num_classes,), -1))
            note = (
                "init.head=new: pyramid and heads are kept but for the rows of the classes, which are new\n"
            )
        else:
            known = classes or Classes(model.num_classes, (), "this recipe")
            own = head.source_classes(source, detection_head.class_count(model, tensors), guess=False)
            if init.head == "keep":
                head.check_same(known, own)
            else:
                found = head.class_map(known, own)
                log.info("init.head=map: %s", found.report())
                tensors = detection_head.mapped(model, tensors, torch.as_tensor(found.index))
                note = f"init.head=map: {found.report()}\n"
        try:
            report = initialise(model, tensors, bias_table=init.bias_table, keep_head=fits)
            if fits and init.head != "keep":
                for name in detection_head.class_rows(model):
                    report.relabel(name, "new", f"rows of classes: init.head={init.head}")
        except UserError as error:
            raise UserError(f"init.from={init.from_}: {error}") from error
        return f"{note}{report}"

    def noise_width(self, model: nn.Module) -> int:
        """The backbone's branches and a column for each sampler; 0 where there is no sampler and nothing is dropped."""
        assert isinstance(model, Detector)
        samples = model.num_drop_path > model.backbone.num_drop_path
        return model.num_drop_path if samples or self.config.model.drop_path > 0 else 0

    # The data

    def train_loader(
        self, *, rank: int, world: int, samples_seen: int, device: torch.device, img_size: Size
    ) -> TrainLoader[DetectionBatch]:
        """Images with their objects; normalisation is left to ``loss``, on the device."""
        if "cascade" in self.config.task.head:  # the others' heads have no norms
            check_norm(self.config, device)
        return detection_factory.train_loader(
            self.config, rank=rank, world=world, samples_seen=samples_seen, device=device
        )

    def eval_loader(
        self, classes: Classes, *, rank: int, world: int, device: torch.device, img_size: Size
    ) -> EvalLoader[DetectionBatch]:
        """Images one by one, as they are stored, with their truth; raises UserError too where COCO's numbers cannot be had."""
        coco_numbers.check_installed()
        return detection_factory.eval_loader(self.config, classes, rank=rank, world=world, device=device)

    def example(
        self,
        count: int,
        img_size: Size,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.uint8,
        first: int = 0,
    ) -> DetectionBatch:
        """Noise with ``_EXAMPLES`` objects an image, as large as images of training get."""
        generator = torch.Generator().manual_seed(self.config.train.seed + first)
        images, sizes = self.example_images(count, img_size, dtype, generator)
        objects = count * _EXAMPLES
        # Between a tenth and half of the image's sides.
        side = 0.1 + 0.4 * torch.rand(objects, 2, generator=generator)
        corner = torch.rand(objects, 2, generator=generator) * (1 - side)
        scale = torch.tensor(images.shape[:1:-1], dtype=torch.float32)  # width, height
        grid = GRID if self._with_masks else 0
        return DetectionBatch(
            images=images,
            sizes=sizes,
            boxes=torch.cat([corner * scale, (corner + side) * scale], 1),
            labels=torch.randint(self.config.model.num_classes, (objects,), generator=generator),
            masks=torch.randint(256, (objects, grid, grid), generator=generator, dtype=torch.uint8),
            counts=(_EXAMPLES,) * count,
            weight=torch.ones(count),
            position=torch.arange(first, first + count),
            keys=[f"synthetic:{first + number}" for number in range(count)],
        ).to(device)

    # The loss and the metrics

    def loss(
        self, forward: Forward, batch: DetectionBatch, *, noise: Tensor | None, dtype: torch.dtype
    ) -> Loss:
        """The sum of the heads' losses, which are normalised over the micro-batch, as mmdetection does over a GPU's batch.

        So an update's loss is the mean over its micro-batches, whatever ranks they are of, and depends on ``train.micro_batch``. Bad
        samples have no part in it; the log weighs a micro-batch by the others that it has.
        """
        arguments = {} if noise is None else {"drop_path_noise": noise}
        losses: Mapping[str, Tensor] = forward(
            self.images(batch, dtype), _sizes(batch), batch.targets(), **arguments
        )
        value = torch.stack(list(losses.values())).sum()
        weight = batch.weight.sum().double()
        return Loss(
            value,
            value.detach().double() * weight,
            weight,
            {name: each.detach().double() * weight for name, each in losses.items()},
        )

    def evaluator(self, device: torch.device, dtype: torch.dtype) -> CocoAP:
        """A fresh collection of results."""
        return CocoAP(self.config, device, dtype)

    def summary(self, metrics: Mapping[str, float]) -> str:
        """AP, AP50 and AP75 of boxes and the APs of masks and of the averaged weights, where there are any."""
        said = [
            ("AP", "ap"),
            ("AP50", "ap50"),
            ("AP75", "ap75"),
            ("mask AP", "mask_ap"),
            ("mask AP50", "mask_ap50"),
        ]
        said += [("EMA AP", "ema_ap"), ("EMA mask AP", "ema_mask_ap")]
        return ", ".join(f"{name} {metrics[key]:.2f}" for name, key in said if key in metrics)


def _sizes(batch: Any) -> list[tuple[int, int]]:
    return [(height, width) for height, width in batch.sizes.tolist()]
