"""Image classification: one label an image, soft targets under mixup, cross-entropy, top-1 and top-5.

Beyond these metrics (per class, calibration, files per image) is ``dattrain eval`` (``dattrain.evaluation``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dattrain.config.schema import Config
from dattrain.config.values import as_pair
from dattrain.data import factory
from dattrain.data.augment.mixup import MixupCutmix, Normalize
from dattrain.data.augment.plan import draw
from dattrain.data.batch import Batch
from dattrain.data.classes import Classes
from dattrain.data.loader import EvalLoader, TrainLoader
from dattrain.errors import ConfigError, UserError
from dattrain.models import flops, surgery, zoo
from dattrain.models.dat import DAT
from dattrain.models.dense.weights import BODY
from dattrain.tasks import head
from dattrain.tasks.base import Forward, Loss, Ranks, Size
from dattrain.tasks.predictions import Predictions

log = logging.getLogger(__name__)


class Classification:
    """See ``dattrain.tasks.base.Task``; its batch is a ``dattrain.data.batch.Batch``."""

    metrics = ("top1", "top5", "loss")

    def __init__(self, config: Config) -> None:
        self.config = config
        self.mixer = MixupCutmix(config.augment, config.model.num_classes)

    # The model

    def build(self, img_size: Size, shapes: Mapping[str, Sequence[int]] | None = None) -> DAT:
        """The recipe's model with fresh weights; with ``init.bias_table=sample`` its tables take the shapes of ``shapes``."""
        m = self.config.model
        torch.manual_seed(self.config.train.seed)
        model = zoo.create(
            m.name,
            num_classes=m.num_classes,
            img_size=img_size,
            in_chans=m.in_chans,
            drop_path_rate=m.drop_path,
            init=m.init,
            **m.overrides,
        )
        if shapes is not None and self.config.init.bias_table == "sample":
            surgery.adopt_tables(model, shapes)
        return model

    def initialise(
        self, model: nn.Module, tensors: Mapping[str, Tensor], source: Path, classes: Classes | None
    ) -> str:
        """Backbone by name, tables as ``init.bias_table`` says, the classifier as ``init.head`` says."""
        assert isinstance(model, DAT)
        init = self.config.init
        if any(name.startswith(BODY) for name in tensors):
            raise ConfigError(
                f"init.from={init.from_}: are weights of a network with maps (segmentation or detection), and task.kind=classification starts from a "
                "classifier's: give the run or file that this one was started from"
            )
        buffers = {name for name, _ in model.named_buffers()}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in buffers}
        classifier = tensors.get(surgery.HEAD[0])
        count = 0 if classifier is None else len(classifier)
        known = classes or Classes(self.config.model.num_classes, (), "this recipe")
        index = None
        if init.head == "keep" and classifier is not None:
            head.check_same(known, head.source_classes(source, count, guess=False))
        if init.head == "map":
            found = head.class_map(known, head.source_classes(source, count, guess=True))
            log.info("init.head=map: %s", found.report())
            index = found.index
        try:
            report = surgery.resize_for(
                model, tensors, bias_table=init.bias_table, head=init.head, class_map=index
            )
        except UserError as error:
            raise UserError(f"init.from={init.from_}: {error}") from error
        return str(report)

    def resize(self, tensors: Mapping[str, Tensor], img_size: Size) -> Iterator[tuple[str, Tensor]]:
        """Parameters of a model of ``img_size``; tables are resized as ``init.bias_table`` says."""
        scratch = self.build(img_size)
        surgery.resize_for(scratch, tensors, bias_table=self.config.init.bias_table)
        yield from ((name, p.detach()) for name, p in scratch.named_parameters())

    def noise_width(self, model: nn.Module) -> int:
        """The residual branches that drop path may drop."""
        return int(getattr(model, "num_drop_path", 0)) if self.config.model.drop_path > 0 else 0

    def input_size(self, img_size: Size) -> Size:
        """The model's own."""
        return img_size

    def flops(self, img_size: Size) -> float:
        """Multiply-adds of the forward pass of one image."""
        with torch.device("meta"):
            model = self.build(img_size)
        return flops.flops(model, img_size, self.config.model.in_chans)

    # The data

    def train_loader(
        self, *, rank: int, world: int, samples_seen: int, device: torch.device, img_size: Size
    ) -> TrainLoader[Batch]:
        """Images decoded, cropped and augmented; erasing and mixing is left to ``loss``, on the device."""
        return factory.train_loader(
            self.config, rank=rank, world=world, samples_seen=samples_seen, device=device, img_size=img_size
        )

    def eval_loader(
        self, classes: Classes, *, rank: int, world: int, device: torch.device, img_size: Size
    ) -> EvalLoader[Batch]:
        """Images resized and cropped as ``eval`` says; labels are numbers in ``classes``."""
        return factory.eval_loader(
            self.config, classes, rank=rank, world=world, device=device, img_size=img_size
        )

    def example(
        self,
        count: int,
        img_size: Size,
        device: torch.device,
        *,
        dtype: torch.dtype = torch.uint8,
        first: int = 0,
    ) -> Batch:
        """Noise under random labels."""
        height, width = as_pair(img_size)
        generator = torch.Generator().manual_seed(self.config.train.seed + first)
        position = torch.arange(first, first + count)
        plan = None
        if dtype == torch.uint8:
            pixels = torch.randint(256, (count, height, width, 3), generator=generator, dtype=dtype)
            plan = draw(self.config.augment, self.config.train.seed, position.numpy(), (height, width))
            images = pixels.permute(0, 3, 1, 2)
        else:
            images = torch.zeros(count, 3, height, width, dtype=dtype)
        labels = torch.randint(self.config.model.num_classes, (count,), generator=generator)
        names = [f"synthetic:{first + number}" for number in range(count)]
        return Batch(images, labels, torch.ones(count), position, names, plan).to(device)

    # The loss and the metrics

    def loss(self, forward: Forward, batch: Batch, *, noise: Tensor | None, dtype: torch.dtype) -> Loss:
        """Weighted soft cross-entropy, divided by the micro-batch: bad samples count in the divisor, with no loss."""
        images, targets, weight = self.mixer(batch, dtype)
        arguments = {} if noise is None else {"drop_path_noise": noise}
        logits = forward(_in_format(images, self.config), **arguments)
        losses = weight * F.cross_entropy(logits.float(), targets, reduction="none")
        total = losses.sum()
        return Loss(total / self.config.train.samples_a_pass, total.detach().double(), weight.sum().double())

    def evaluator(self, device: torch.device, dtype: torch.dtype) -> Accuracy:
        """A fresh count of hits."""
        return Accuracy(self.config, device, dtype)

    def summary(self, metrics: Mapping[str, float]) -> str:
        """Top-1, top-5 and loss, and the averaged weights' top-1 where there are any."""
        averaged = f", EMA {metrics['ema_top1']:.2f}" if "ema_top1" in metrics else ""
        return (
            f"top-1 {metrics['top1']:.2f}, top-5 {metrics['top5']:.2f}, loss {metrics['loss']:.4f}{averaged}"
        )


class Accuracy:
    """Top-1 and top-5 in percent, and the mean loss, over images with a label; see ``dattrain.tasks.base.Evaluator``."""

    def __init__(self, config: Config, device: torch.device, dtype: torch.dtype) -> None:
        self._config, self._dtype = config, dtype
        self._normalize = Normalize(config.augment)
        self._top = min(5, config.model.num_classes)
        # Correct@1, correct@5, loss, images.
        self._sums = torch.zeros(4, dtype=torch.float64, device=device)
        self._predictions = Predictions(config.augment)

    def update(self, forward: Forward, batch: Batch, *, lockstep: bool) -> None:
        """Count a batch."""
        images = _in_format(self._normalize(batch.images).to(self._dtype), self._config)
        if not len(batch):
            if lockstep:
                forward(images.new_zeros(1, *images.shape[1:]))
            return
        logits = forward(images).float()
        weight = batch.weight.double()
        losses = F.cross_entropy(logits, batch.labels, reduction="none").double()
        self._predictions.add(batch.images, logits, losses, batch.labels, weight, batch.position, batch.keys)
        hits = logits.topk(self._top, dim=1).indices == batch.labels[:, None]
        self._sums[0] += (hits[:, 0] * weight).sum()
        self._sums[1] += (hits.any(dim=1) * weight).sum()
        self._sums[2] += (losses * weight).sum()
        self._sums[3] += weight.sum()

    def compute(self, ranks: Ranks) -> dict[str, float]:
        """``top1`` and ``top5`` in percent, ``loss`` in nats, ``images``."""
        ranks.sum(self._sums)
        top1, top5, loss, images = self._sums.tolist()
        count = max(images, 1.0)
        return {
            "top1": 100 * top1 / count,
            "top5": 100 * top5 / count,
            "loss": loss / count,
            "images": images,
        }

    def predictions(self, ranks: Ranks) -> dict[str, Any]:
        """The classes that were confused, the worst and the best images; see ``tasks.predictions``."""
        return self._predictions.gather(ranks)


def _in_format(images: Tensor, config: Config) -> Tensor:
    if config.train.channels_last:
        return images.contiguous(memory_format=torch.channels_last)
    return images
