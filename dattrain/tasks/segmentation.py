"""Semantic segmentation: a class for every pixel, cross-entropy, mIoU.

Its evaluation is in ``mean_iou``, what of it a report shows in ``segmented_images``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dattrain.config.schema import Config
from dattrain.config.values import as_pair
from dattrain.data import dense_factory
from dattrain.data.annotations.semantic import VOID
from dattrain.data.classes import Classes
from dattrain.data.dense_batch import SegmentationBatch
from dattrain.data.loader import EvalLoader, TrainLoader
from dattrain.data.to_device import to_device
from dattrain.errors import ConfigError, UserError
from dattrain.models.blocks import recompute
from dattrain.models.dense.backbone import Backbone
from dattrain.models.dense.segmenter import HeadKind, Segmenter, create_segmenter
from dattrain.models.dense.weights import initialise
from dattrain.tasks import head
from dattrain.tasks.base import Forward, Loss, Size
from dattrain.tasks.dense import DenseTask, check_norm
from dattrain.tasks.dense_inference import stride_of
from dattrain.tasks.mean_iou import MeanIoU

log = logging.getLogger(__name__)

CLASSIFIERS = ("head.classifier.conv.", "aux_head.classifier.conv.")
"""Where a ``Segmenter`` has a row for each class."""
PARTS = ("loss_decode", "loss_aux")
"""The components of the loss where there is an auxiliary head; mmsegmentation's names."""


class Segmentation(DenseTask[Segmenter]):
    """See ``dattrain.tasks.base.Task``; its batch is a ``dattrain.data.dense_batch.SegmentationBatch``.

    Raises:
        ConfigError: settings that do not go together, which the schema does not know of.
    """

    metrics = ("miou", "macc", "aacc", "loss")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        _check(config)

    # The model

    def add_heads(self, backbone: Backbone) -> Segmenter:
        """Decoder and auxiliary head on the backbone."""
        t = self.config.task
        return create_segmenter(
            backbone,
            cast(HeadKind, t.head),
            self.config.model.num_classes,
            norm=t.norm,
            channels=t.channels,
            dropout=t.dropout,
            aux=t.aux_weight > 0,
        )

    def initialise(
        self, model: nn.Module, tensors: Mapping[str, Tensor], source: Path, classes: Classes | None
    ) -> str:
        """Backbone by name, tables as ``init.bias_table`` says.

        The decoder of a segmentation is taken as ``init.head`` says; weights of a classification have none, and it stays as
        it was drawn.
        """
        assert isinstance(model, Segmenter)
        init = self.config.init
        classifier = tensors.get(f"{CLASSIFIERS[0]}weight")
        note = ""
        if classifier is None:
            if init.head == "map":
                raise ConfigError(
                    f"init.head=map picks the rows of a decoder, and init.from={init.from_} has none; leave init.head out: the "
                    "decoder is drawn afresh"
                )
            note = "the decoder is new, since these weights have none\n"
        elif init.head != "new":
            known = classes or Classes(self.config.model.num_classes, (), "this recipe")
            own = head.source_classes(source, len(classifier), guess=False)
            if init.head == "keep":
                head.check_same(known, own)
            else:
                found = head.class_map(known, own)
                log.info("init.head=map: %s", found.report())
                tensors = _mapped(model, tensors, torch.as_tensor(found.index))
                note = f"init.head=map: {found.report()}\n"
        try:
            report = initialise(
                model,
                tensors,
                bias_table=init.bias_table,
                keep_head=init.head != "new" and classifier is not None,
            )
        except UserError as error:
            raise UserError(f"init.from={init.from_}: {error}") from error
        return f"{note}{report}"

    def noise_width(self, model: nn.Module) -> int:
        """The backbone's branches and the decoder's channels, where any are dropped."""
        assert isinstance(model, Segmenter)
        return model.num_drop_path if self.config.model.drop_path > 0 or self.config.task.dropout > 0 else 0

    # The data

    def train_loader(
        self, *, rank: int, world: int, samples_seen: int, device: torch.device, img_size: Size
    ) -> TrainLoader[SegmentationBatch]:
        """Crops or whole images with their maps; normalisation is left to ``loss``, on the device."""
        check_norm(self.config, device)
        return dense_factory.train_loader(
            self.config, rank=rank, world=world, samples_seen=samples_seen, device=device
        )

    def eval_loader(
        self, classes: Classes, *, rank: int, world: int, device: torch.device, img_size: Size
    ) -> EvalLoader[SegmentationBatch]:
        """Images one by one, as they are stored; labels are numbers in ``classes``."""
        return dense_factory.eval_loader(self.config, classes, rank=rank, world=world, device=device)

    def example(
        self,
        count: int,
        img_size: Size,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.uint8,
        first: int = 0,
    ) -> SegmentationBatch:
        """Noise under random classes, as large as images of training get."""
        generator = torch.Generator().manual_seed(self.config.train.seed + first)
        images, sizes = self.example_images(count, img_size, dtype, generator)
        classes = self.config.model.num_classes
        return SegmentationBatch(
            images=images,
            maps=torch.randint(classes, (count, *images.shape[2:]), generator=generator, dtype=torch.uint8),
            sizes=sizes,
            weight=torch.ones(count),
            position=torch.arange(first, first + count),
            keys=[f"synthetic:{first + number}" for number in range(count)],
        ).to(device)

    # The loss and the metrics

    def loss(
        self, forward: Forward, batch: SegmentationBatch, *, noise: Tensor | None, dtype: torch.dtype
    ) -> Loss:
        """Cross-entropy of every pixel at the images' own size, its mean over each sample, divided by the micro-batch.

        The mean is over all pixels of a crop, or of the sample's own area where whole images are trained on; void and padding
        are in its divisor, with no loss (mmsegmentation's ``avg_non_ignore=False``). Bad samples count in the divisor, too.
        """
        arguments = {} if noise is None else {"drop_path_noise": noise}
        found = forward(self.images(batch, dtype), **arguments)
        outputs = found if isinstance(found, tuple) else (found,)
        share = batch.weight / self._area(batch)
        factors = (1.0, self.config.task.aux_weight)
        losses = [
            factor * (share * pixel_cross_entropy(logits, batch.maps)).sum()
            for factor, logits in zip(factors, outputs)
        ]
        total = torch.stack(losses).sum()
        parts = {name: each.detach().double() for name, each in zip(PARTS, losses)} if len(losses) > 1 else {}
        return Loss(
            total / self.config.train.samples_a_pass,
            total.detach().double(),
            batch.weight.sum().double(),
            parts,
        )

    def _area(self, batch: SegmentationBatch) -> Tensor | int:
        """Pixels by which each sample's sum is divided: B float32, or one number."""
        if self.config.geometry.crop is not None:
            return batch.maps[0].numel()
        return to_device(batch.sizes.prod(1).float(), batch.maps.device)

    def evaluator(self, device: torch.device, dtype: torch.dtype) -> MeanIoU:
        """A fresh count of pixels."""
        return MeanIoU(self.config, device, dtype)

    def summary(self, metrics: Mapping[str, float]) -> str:
        """mIoU, mAcc, aAcc and loss, and the averaged weights' mIoU where there are any."""
        averaged = f", EMA {metrics['ema_miou']:.2f}" if "ema_miou" in metrics else ""
        return (
            f"mIoU {metrics['miou']:.2f}, mAcc {metrics['macc']:.2f}, aAcc {metrics['aacc']:.2f}, "
            f"loss {metrics['loss']:.4f}{averaged}"
        )


def pixel_cross_entropy(logits: Tensor, maps: Tensor) -> Tensor:
    """Sum over the pixels of each sample of the cross-entropy of bilinearly enlarged logits: B float32, nats; void gives 0.

    The enlarged scores, which would be most of the memory of a step of 150 classes at 512 x 512 (157 MB a sample, three times),
    are there for one sample at a time: they are computed anew in the backward pass.

    Args:
        logits: B x K x h x w.
        maps: B x H x W uint8, ``VOID`` where there is no class.
    """
    return torch.stack([recompute(_sum, one, truth) for one, truth in zip(logits.split(1), maps.split(1))])


def _sum(logits: Tensor, maps: Tensor) -> Tensor:
    large = F.interpolate(logits.float(), size=maps.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(large, maps.long(), ignore_index=VOID, reduction="none").sum()


def _mapped(model: Segmenter, tensors: Mapping[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """``tensors`` with the classifiers' rows picked by class; a class that the source lacks keeps the model's own draw."""
    found = dict(tensors)
    for name, parameter in model.named_parameters():
        if name.startswith(CLASSIFIERS) and name in found:
            there = (index >= 0).view(-1, *[1] * (parameter.dim() - 1))
            picked = found[name].to(parameter.dtype)[index.clamp(min=0)]
            found[name] = torch.where(there, picked, parameter.detach().cpu())
    return found


def _check(config: Config) -> None:
    geometry, train, eval_ = config.geometry, config.train, config.eval
    if eval_.mode == "slide" and geometry.crop is not None:
        crop = as_pair(geometry.crop)
        stride = stride_of(crop, eval_.stride)
        if stride[0] > crop[0] or stride[1] > crop[1]:
            raise ConfigError(
                f"eval.stride={eval_.stride} is more than geometry.crop={geometry.crop}: there would be pixels that no window "
                "covers; use the crop's size or less"
            )
    if config.task.norm == "batch" and config.task.head == "upernet" and train.micro_batch == 1:
        raise ConfigError(
            "task.norm=batch with train.micro_batch=1: UperNet pools maps to one value a channel, of which a device's one sample of a "
            "micro-batch has no statistics; use a micro-batch of 2 or more, or task.norm=group"
        )
