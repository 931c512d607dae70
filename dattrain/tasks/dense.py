"""What segmentation and detection have in common: the backbone, its input, sizes, and the settings that neither takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from dattrain.config.schema import Config
from dattrain.config.values import as_pair
from dattrain.data import dense_factory
from dattrain.data.augment.dense_transforms import PaddedBatch, normalised
from dattrain.errors import ConfigError
from dattrain.models import flops, surgery
from dattrain.models.dense.backbone import Backbone, create_backbone
from dattrain.models.dense.detector import Detector
from dattrain.models.dense.segmenter import Segmenter
from dattrain.models.dense.weights import initialise
from dattrain.tasks.base import Size

M = TypeVar("M", Segmenter, Detector)
"""The network."""


class DenseTask(ABC, Generic[M]):
    """The part of ``dattrain.tasks.base.Task`` that is the same whatever stands on the backbone.

    Raises:
        ConfigError: settings that do not go together, which the schema does not know of.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        train = config.train
        if train.compile != "none" and config.geometry.crop is None:
            raise ConfigError(
                f"train.compile={train.compile} compiles anew for every size, and geometry.crop=null trains on images of many; set "
                "geometry.crop, or train.compile=none"
            )
        if train.cuda_graphs:
            raise ConfigError(
                f"train.cuda_graphs replays small micro-batches, and is not for task.kind={config.task.kind}; leave it out"
            )

    @abstractmethod
    def add_heads(self, backbone: Backbone) -> M:
        """The network on a backbone, with fresh weights from torch's generator."""

    @property
    def outs(self) -> Sequence[int]:
        """Stages of the backbone whose maps the network takes."""
        return 0, 1, 2, 3

    def build(self, img_size: Size, shapes: Mapping[str, Sequence[int]] | None = None) -> M:
        """The network with fresh weights; ``img_size`` is the layout of the backbone's windows and tables.

        With ``init.bias_table=sample`` its tables take the shapes of ``shapes``.
        """
        m = self.config.model
        torch.manual_seed(self.config.train.seed)
        backbone = create_backbone(
            m.name,
            img_size=img_size,
            outs=self.outs,
            drop_path_rate=m.drop_path,
            init=m.init,
            in_chans=m.in_chans,
            **m.overrides,
        )
        model = self.add_heads(backbone)
        if shapes is not None and self.config.init.bias_table == "sample":
            surgery.adopt_tables(model, shapes)
        return model

    def resize(self, tensors: Mapping[str, Tensor], img_size: Size) -> Iterator[tuple[str, Tensor]]:
        """Parameters of a model whose windows and tables are laid out for ``img_size``."""
        scratch = self.build(img_size)
        state = {**scratch.state_dict(), **tensors}
        initialise(scratch, state, bias_table=self.config.init.bias_table, keep_head=True)
        yield from ((name, p.detach()) for name, p in scratch.named_parameters())

    def input_size(self, img_size: Size) -> tuple[int, int]:
        """The crop, or the largest whole image."""
        return dense_factory.largest(self.config.geometry)

    def flops(self, img_size: Size) -> float:
        """Multiply-adds of the forward pass of a crop, or of ``short_side`` x ``long_side`` where whole images are trained on.

        As the papers count: without an auxiliary head; with 1000 proposals and 100 regions of masks (mmdetection's
        ``forward_dummy``).
        """
        g = self.config.geometry
        with torch.device("meta"):
            model = self.build(img_size)
        size = (g.short_side, g.long_side) if g.crop is None else as_pair(g.crop)
        return flops.flops(model, size, self.config.model.in_chans)

    def images(self, batch: PaddedBatch, dtype: torch.dtype) -> Tensor:
        """What the network gets of a micro-batch: B x 3 x H x W of ``dtype``, normalised where it is not yet."""
        augment, images = self.config.augment, batch.images
        if not images.is_floating_point():
            images = normalised(batch, augment.mean, augment.std)
        kind = torch.channels_last if self.config.train.channels_last else torch.contiguous_format
        return images.to(dtype, memory_format=kind)

    def example_images(
        self, count: int, img_size: Size, dtype: torch.dtype, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Of ``example``: B x 3 x H x W of ``dtype``, as large as images of training get, noise in uint8 and else 0; B x 2 int64 sizes."""
        height, width = self.input_size(img_size)
        shape = count, 3, height, width
        if dtype == torch.uint8:
            images = torch.randint(256, shape, generator=generator, dtype=dtype)
        else:
            images = torch.zeros(shape, dtype=dtype)
        return images, torch.tensor([[height, width]]).expand(count, 2)


def check_norm(config: Config, device: torch.device) -> None:
    """Refuse what BatchNorm cannot do on a device or in a precision. Raises ConfigError."""
    norm, precision = config.task.norm, config.train.precision
    if norm == "sync" and device.type != "cuda":
        raise ConfigError(
            f"task.norm=sync is of CUDA devices, and this one is {device.type}; use task.norm=group, which is the same at every "
            "number of devices, or task.norm=batch"
        )
    if norm != "group" and precision in ("bf16-pure", "fp16"):
        raise ConfigError(
            f"task.norm={norm} keeps running averages, and train.precision={precision} would keep them in 16 bits, where their "
            "updates are lost; use train.precision=bf16, or task.norm=group"
        )
