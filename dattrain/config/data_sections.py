"""The sections of a recipe that say which images there are and what is done to them, in training and in evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from dattrain.config.values import Count, Positive, Probability, Section, Size


class Geometry(Section):
    """Sizes of images in dense prediction. Drawn per sample from (seed, epoch, sample), like all augmentation."""

    short_side: Count = 512
    """Pixels that the shorter side is resized to, the ratio kept, unless the longer one would exceed ``long_side``."""
    short_sides: tuple[Count, ...] = ()
    """Detection, in training: one of these is drawn in place of ``short_side``; empty means that."""
    long_side: Count = 2048
    """Most pixels of the longer side."""
    scale: tuple[Positive, Positive] = (0.5, 2.0)
    """In training both are multiplied by a number drawn uniformly from here."""
    crop: Size | None = 512
    """Pixels of the training crop (padded where the image is smaller), and of the sliding window; null trains on whole images."""
    max_class_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.75
    """Segmentation: of ten places drawn for a crop the first is taken where no class has more of the labelled pixels, else the last."""
    precrop: Probability = 0.0
    """Detection, in training: probability of another resize and a crop before all (DETR, Carion et al., ECCV 2020)."""
    precrop_short_sides: tuple[Count, ...] = (400, 500, 600)
    """Pixels that the shorter side is resized to before that crop, one of them."""
    precrop_sides: tuple[Count, Count] = (384, 600)
    """Least and most pixels of the height and of the width of that crop."""
    copy_paste: Probability = 0.0
    """Detection, in training: probability that objects of another image of the update are pasted in (Ghiasi et al., CVPR 2021)."""
    distortion: bool = True
    """Photometric distortion: brightness, contrast, saturation and hue, each with probability 1/2 (SSD, Liu et al., ECCV 2016)."""
    pad_to: Count = 32
    """Whole images of a micro-batch are padded at the right and at the bottom to its largest sides, rounded up to a multiple of this."""
    group_aspect: bool = True
    """Detection: the images of an update are divided into micro-batches by orientation, so that less is padded; which images an update has stays."""


class Data(Section):
    """Where images come from and in which order they are seen."""

    train: str | None = None
    """Shards: a folder, a file, or a brace pattern, local or ``s3://``, ``gs://``, ``https://``, ``hf://``; or an image folder, or a list of one (``*.images.json``)."""
    val: str | None = None
    """As ``train``; evaluated every ``eval.every_epochs``."""
    labels: (
        Literal["imagenet-1k", "imagenet-12k", "imagenet-22k", "imagenet-22k-winter21", "imagenet-21k-p"]
        | None
    ) = None
    """Label set that numbers the classes; None leaves it to the training set's names, or to bare numbers (docs/labels.md)."""
    lanes: Count = 64
    """Canonical lanes from which the global order is woven: part of the recipe, independent of the world size."""
    window: Count = 4
    """Shuffle window of a lane, in shards of mean length."""
    shuffle: bool = True
    """False keeps the order of the shards: for debugging."""
    reader: Literal["index", "webdataset"] = "index"
    """``index`` is exact; ``webdataset`` streams, and is not."""
    samples: Count | None = None
    """Samples per epoch of ``reader: webdataset``, which cannot count those of a stream."""
    decoder: Literal["cpu", "dali"] = "cpu"
    workers: Annotated[int, Field(ge=0)] = 4
    """Decoding processes per rank; 0 decodes in the training process."""
    prefetch: Count = 2
    """Micro-batches each worker (or DALI's queue) holds ready."""
    on_bad: Literal["error", "skip"] = "error"
    """``skip`` keeps a bad sample's place in the order with zero loss weight, counts it and names it."""
    verify: bool = True
    """Check shard sizes against their index before the first step."""
    cache_dir: str | None = None
    """Folder of the cache of remote shards; needed for remote sources."""
    cache_gb: Positive = 100.0
    """Bound of that cache per node, in 10^9 bytes."""
    dali_threads: Count = 4
    """Threads of DALI's CPU part."""
    dali_hw_decoder_load: Probability = 0.65
    """Share of JPEGs given to the hardware decoder of A100 and H100."""
    dali_preallocate_mb: Annotated[int, Field(ge=0)] = 0
    """Device memory that DALI takes at the start, in 10^6 bytes, so that a late large image does not."""

    @field_validator("reader", mode="before")
    @classmethod
    def _reader(cls, value: object) -> object:
        if value == "dali":
            raise ValueError(
                "the reader dali is gone, which kept an order of its own; data.reader=index with data.decoder=dali reads the same "
                "shards exactly (write that in an old run's config.yaml too, to evaluate it or to start from its weights)"
            )
        return value


class Augment(Section):
    """Training augmentation, drawn per sample from (seed, epoch, sample), and the normalisation of every image."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random resized crop, as a share of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the crop, drawn log-uniformly."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Filter of every resize, antialiased."""
    hflip: Probability = 0.5
    """Probability of a horizontal flip."""
    randaugment: str | None = "rand-m9-mstd0.5-inc1"
    """timm's RandAugment string; null switches it off."""
    color_jitter: Annotated[float, Field(ge=0.0)] = 0.0
    """Brightness, contrast and saturation strength; timm, and so the authors' recipe, leaves it out where RandAugment is on."""
    erase_prob: Probability = 0.25
    """Probability of random erasing."""
    erase_mode: Literal["pixel", "const"] = "pixel"
    """Fill with a normal draw per ``pixel``, or with the mean (``const``)."""
    mixup: Annotated[float, Field(ge=0.0)] = 0.8
    """Alpha of the Beta distribution; 0 switches mixup off."""
    cutmix: Annotated[float, Field(ge=0.0)] = 1.0
    """Alpha of the Beta distribution; 0 switches cutmix off."""
    mix_prob: Probability = 1.0
    """Probability that a group is mixed at all."""
    mix_switch: Probability = 0.5
    """Probability of cutmix where both are on."""
    mix_group: Annotated[int, Field(ge=2, multiple_of=2)] = 2
    """Samples that share one draw of weight, box and mode, and are mixed first with last: 2 is timm's ``pair`` mode, a device's batch timm's ``batch`` mode."""
    label_smoothing: Probability = 0.1
    """Mass taken from the true class."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per channel, of images in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per channel, of images in [0, 1]."""

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    @property
    def group(self) -> int:
        """Samples that are mixed among themselves; 1 where nothing is mixed."""
        return self.mix_group if self.mixes else 1


class Eval(Section):
    """Evaluation transform. ``resize=squash`` with crop_pct .875 is what the authors' logged accuracies used."""

    every_epochs: Positive = 1.0
    """Epochs between two evaluations during training; the last update is always evaluated."""
    every_steps: Count | None = None
    """Updates between two evaluations; null means ``every_epochs``."""
    batch: Count = 64
    """Images per device; 1 for dense prediction, where padding would change the result."""
    resize: Literal["shorter", "squash"] = "shorter"
    """``shorter`` keeps the aspect ratio; ``squash`` does not."""
    crop_pct: Annotated[float, Field(gt=0.0, le=1.0)] = 0.875
    """The central crop is img_size of img_size / crop_pct pixels."""
    ema: bool = True
    """Evaluate the EMA weights too, when there are any."""
    mode: Literal["whole", "slide"] = "whole"
    """Segmentation: the whole image at once, or windows of ``geometry.crop`` whose logits are averaged where they overlap."""
    stride: Size | None = None
    """Pixels between two windows of ``slide``; null takes two thirds of the window."""
    scales: tuple[Positive, ...] = (1.0,)
    """Segmentation: probabilities are averaged over images resized by these factors (the paper's multi-scale: .5, .75, 1, 1.25, 1.5, 1.75)."""
    flip: bool = False
    """Segmentation: and over their mirror images."""
    max_detections: Count = 100
    """Detection: most objects of an image (COCO's 100; LVIS has 300)."""
    score_threshold: Probability = 0.05
    """Detection: least score of an object (LVIS has .0001)."""
