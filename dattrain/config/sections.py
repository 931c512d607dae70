"""The sections of a recipe: frozen pydantic models, unknown keys refused. Together they are ``schema.Config``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from dattrain.errors import ConfigError

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")


def seconds(text: str) -> float:
    """Seconds of ``30s``, ``2m`` or ``1.5h``. Raises ValueError."""
    found = _DURATION.fullmatch(text)
    if found is None or not float(found[1]):
        raise ValueError(f"write a number of updates from 1 on, or a time as 30s, 2m or 1h, not {text}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def _interval(value: int | str) -> int | str:
    if isinstance(value, str) or value < 1:
        seconds(str(value))
    return value


Interval = Annotated[int | str, AfterValidator(_interval)]
"""Updates, or time."""


def _size(value: Any) -> Any:
    sides = value if isinstance(value, (list, tuple)) else [value]
    if (sides is value and len(sides) != 2) or any(type(side) is not int for side in sides):
        raise ValueError("write one number of pixels, or [height, width]")
    return value


Size = Annotated[int | tuple[int, int], BeforeValidator(_size)]
"""Pixels: a side, or height and width."""


def as_pair(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a size in a recipe or in JSON."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


class Section(BaseModel):
    """Base of every section: immutable, and a misspelled key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class Model(Section):
    """Which network. ``overrides`` are keyword arguments of the variant (``dattrain.models.zoo``): the ablations."""

    name: str = "dat_tiny"
    """A timm model name of this package: ``dat_{atto,tiny,small,base}``, ``dat_pp_{tiny,small,base,large}``; for dense prediction also timm's ``swin_*`` and ``pvt_v2_*``."""
    img_size: Size = 224
    """Pixels, one number or [height, width]; a multiple of 32."""
    num_classes: Count = 1000
    """Outputs of the head."""
    in_chans: Count = 3
    """Channels of an image: 3, which is what the data gives."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Stochastic depth of the last block; the blocks before it grow linearly from 0."""
    init: Literal["paper", "trunc_normal"] = "paper"
    """``paper`` is what the released models were trained from (docs/model.md); ``trunc_normal`` is std .02."""
    overrides: dict[str, Any] = {}
    """Keyword arguments of the variant, e.g. ``{offsets: false}``."""

    @model_validator(mode="after")
    def _overrides(self) -> Model:
        for name, key in {
            **{each: each for each in type(self).model_fields},
            "drop_path_rate": "drop_path",
        }.items():
            if name in self.overrides:
                raise ValueError(f"model.overrides.{name} is not an override: set model.{key}")
        return self


SegmentationHead = Literal["upernet", "semantic_fpn"]
DetectionHead = Literal["retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn"]
DETECTORS: tuple[DetectionHead, ...] = get_args(DetectionHead)
"""Values of ``task.head`` that are of ``task.kind: detection``."""


class Task(Section):
    """What is learned: the class of an image, of every pixel, or of objects. The other keys are of dense prediction."""

    kind: Literal["classification", "segmentation", "detection"] = "classification"
    """The last two put a decoder or detector on the backbone's maps; ``model.img_size`` is then the layout of its windows and tables alone."""
    head: SegmentationHead | DetectionHead = "upernet"
    """Segmentation: UperNet (Xiao et al., ECCV 2018), or the Semantic FPN of Panoptic FPN (Kirillov et al., CVPR 2019). Detection: RetinaNet (Lin et al., ICCV 2017), Faster, Mask or Cascade R-CNN; those with ``mask`` in their name give masks too."""
    norm: Literal["sync", "group", "batch"] = "sync"
    """Of the decoder, and of Cascade R-CNN's box heads: BatchNorm over all GPUs (the recipes'), GroupNorm (the same at every world size, and on CPUs), or BatchNorm of each device's micro-batch."""
    channels: Count | None = None
    """Of the decoder; null takes the papers': 512 (UperNet), 256 in the pyramid and half of it after (Semantic FPN), 256 in pyramid and heads of detectors, whose linear layers have four times as many."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Segmentation: share of channels dropped before the classifier."""
    aux_weight: Annotated[float, Field(ge=0.0)] = 0.4
    """Weight of the loss of UperNet's auxiliary head on the stride-16 map; 0 leaves that head out."""
    region_samples: Count = 512
    """R-CNNs: regions of an image that box and mask heads are trained on, a quarter of them of objects at most."""


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


class Optim(Section):
    """AdamW. ``lr`` is stated at ``lr_batch`` and scaled linearly with the global batch (Goyal et al. 2017)."""

    lr: Positive = 5e-4
    """Peak learning rate for ``lr_batch`` samples per update."""
    lr_batch: Count = 512
    """Batch at which the rates are stated."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the averages of the gradient and its square."""
    eps: Positive = 1e-8
    """AdamW's addend of the denominator."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.05
    """Not applied to 1-D parameters, biases and position tables."""
    clip: Annotated[float, Field(ge=0.0)] = 5.0
    """Global gradient norm limit; 0 switches clipping off."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Multiplier of the learning rate per layer counted from the head; 1 switches it off."""
    freeze_backbone: bool = False
    """Train the head alone: a linear probe."""


class Schedule(Section):
    """Learning rate by update. Epochs are of ``data.train``; rates are stated at ``optim.lr_batch`` like ``optim.lr``."""

    kind: Literal["cosine", "linear", "poly", "step", "constant"] = "cosine"
    """Shape after the warm-up; under ``poly`` what is left of (1 - done) ** ``power``, under ``step`` times ``gamma`` at each of ``milestones``, warm-up included (mmcv)."""
    epochs: Positive = 300.0
    """Length; the last update may run into the next epoch by less than a batch."""
    updates: Count | None = None
    """Length in updates; null means ``epochs``."""
    warmup_epochs: Annotated[float, Field(ge=0.0)] = 20.0
    """Linear warm-up; the cosine runs under it (timm, warmup_prefix False)."""
    warmup_updates: Annotated[int, Field(ge=0)] | None = None
    """Warm-up in updates; null means ``warmup_epochs``."""
    power: Positive = 0.9
    """Exponent of ``poly``; 1 is a straight line."""
    milestones: tuple[Positive, ...] = ()
    """Where ``step`` multiplies the rate: epochs, or updates where the length is in updates."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    """Factor of ``step``."""
    min_lr: Annotated[float, Field(ge=0.0)] = 5e-6
    """Rate at the end."""
    warmup_lr: Annotated[float, Field(ge=0.0)] = 5e-7
    """Rate at the start."""

    @property
    def length(self) -> str:
        """For messages: ``300 epochs`` or ``160000 updates``."""
        return f"{self.epochs:g} epochs" if self.updates is None else f"{self.updates} updates"


class Progressive(Section):
    """From ``epoch`` on (fractions allowed), train at ``img_size``; tables are resized as ``init.bias_table`` says."""

    epoch: Annotated[float, Field(ge=0.0)]
    """Where the new size begins."""
    img_size: Size
    """Pixels."""


class Offload(Section):
    """DeepSpeed's offload blocks, passed through as they are."""

    optimizer: dict[str, Any] | None = None
    """DeepSpeed's ``offload_optimizer``."""
    param: dict[str, Any] | None = None
    """DeepSpeed's ``offload_param``; stage 3."""


class Zero(Section):
    """DeepSpeed ZeRO. ``extra`` is merged into DeepSpeed's ``zero_optimization`` block."""

    stage: Literal[0, 1, 2, 3] = 2
    """0 replicates; 1 shards optimizer state, 2 gradients too, 3 weights too."""
    offload: Offload = Offload()
    extra: dict[str, Any] = {}
    """Merged into DeepSpeed's ``zero_optimization`` block."""


class Profile(Section):
    """Trace steps [a, b) into the run folder, with a table per module and a memory snapshot on CUDA."""

    steps: tuple[int, int] | None = None
    """First and last update, e.g. [10, 13]."""


class Health(Section):
    """What is done about non-finite steps and stalled ranks."""

    max_bad_steps: Count = 5
    """Consecutive non-finite steps that are skipped before rolling back to the last checkpoint."""
    max_rollbacks: Annotated[int, Field(ge=0)] = 2
    """Rollbacks after which the run stops with a debug dump."""
    stall_seconds: Positive = 1800.0
    """A rank silent for longer than this dumps every rank's stack and ends the job."""


class Train(Section):
    """The run itself. The batch is stated globally; accumulation follows from world size and ``micro_batch``."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of weights, order and augmentation."""
    global_batch: Count = 1024
    """Samples per update over all devices."""
    micro_batch: Count | Literal["auto"] = 128
    """Most samples per device and forward pass: the largest number up to it that divides a device's share is taken; ``auto`` takes what fits its memory."""
    precision: Literal["fp32", "bf16", "bf16-pure", "fp16"] = "bf16"
    """``bf16`` is autocast over fp32 weights; ``bf16-pure`` keeps bf16 weights with fp32 masters; ``fp16`` has a dynamic loss scale."""
    tf32: bool = False
    """On CUDA, matrix products and convolutions of ``precision: fp32`` by TF32 tensor cores: inputs rounded to 10 bits of mantissa."""
    activation_checkpointing: Literal["none", "stage", "block", "selective"] = "none"
    """What is recomputed in the backward pass instead of kept: whole stages, blocks, or the attention and MLP interiors only."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """0 switches the exponential moving average off."""
    compile: Literal["none", "block", "stage"] = "none"
    """torch.compile per block or stage."""
    cuda_graphs: bool = False
    """Replay what is compiled as CUDA graphs, for micro-batches so small that launching kernels takes longer than they do."""
    channels_last: bool = False
    """Memory format of the images and convolutions."""
    deterministic: bool = False
    """torch.use_deterministic_algorithms: equal bits on equal CUDA devices too, slower; what cannot do that raises."""
    max_steps: Count | None = None
    """Stop early after this many updates; the schedule keeps its length."""
    fast_dev_run: bool = False
    """Two updates, one evaluation, one save: whether everything works, before hours are spent."""
    early_stopping_patience: Count | None = None
    """Evaluations in a row without an improvement of ``checkpoint.metric`` after which the run has finished; null trains to the end."""
    early_stopping_min_delta: Annotated[float, Field(ge=0.0)] = 0.0
    """What counts as an improvement, in the metric's own unit (``top1`` is in percent): only more than this."""
    log_every: Interval = 50
    """Updates between two log lines; or time, as ``30s``, ``2m`` or ``1h``."""
    loggers: tuple[Literal["tensorboard", "csv", "wandb", "mlflow"], ...] = ("tensorboard",)
    """What gets the numbers of log lines and evaluations beside ``metrics.jsonl``, with sample pictures; the last two are packages to be installed."""
    gc_every: Count = 100
    """Updates between two collections of Python's garbage, on all ranks at once."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Intra-op CPU threads per rank; 0 leaves torch's choice."""
    profile: Profile = Profile()
    health: Health = Health()
    progressive: tuple[Progressive, ...] = ()

    @property
    def samples_a_pass(self) -> int:
        """``micro_batch`` where it is a number. Raises ConfigError for ``auto``."""
        if self.micro_batch == "auto":
            raise ConfigError(
                "train.micro_batch=auto is found where a training starts; a number is needed here"
            )
        return self.micro_batch

    @field_validator("loggers")
    @classmethod
    def _loggers(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("names a logger twice")
        return value


class Checkpoint(Section):
    """When to save and what to keep. A preemption's save counts among ``keep_last``."""

    every_steps: Count | None = None
    """Updates between two checkpoints; null means ``every_epochs``."""
    every_epochs: Positive = 1.0
    """Used when ``every_steps`` is None."""
    keep_last: Count = 2
    """Newest checkpoints kept."""
    keep_every_epochs: Positive | None = None
    """Keep one of every so many epochs for ever; null keeps none."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """Best ones by ``metric`` kept."""
    metric: str = "top1"
    """A number of the evaluation (``top1``, ``top5``, ``loss``; ``miou``, ``macc``, ``aacc``, ``loss``; ``ap``, ``ap50``, ... and ``mask_ap``, ...; each also ``ema_``); higher is better, but for losses."""
    background: bool = True
    """Write in the background of training."""
    verify: bool = True
    """Check the checksums of what is loaded."""


class Init(Section):
    """Start from the weights of another run or file (a fine-tune): weights alone, new optimizer and schedule."""

    required: bool = False
    """The recipe is a fine-tune: ``train``, ``plan`` and ``submit`` refuse it without ``init.from``."""
    from_: Annotated[str | None, Field(alias="from")] = None
    """A run folder (its last checkpoint; ``RUN@best``, ``RUN@STEP``), a checkpoint folder or a safetensors file."""
    ema: bool = True
    """Take the EMA weights where the source has them."""
    bias_table: Literal["resize", "sample"] = "resize"
    """Deformable bias tables: bicubic ``resize`` to the new map, or keep the continuous table and ``sample`` it unchanged."""
    head: Literal["keep", "new", "map"] = "keep"
    """``map`` picks the head's rows by the names of classes (22K to 1K); ``new`` draws it afresh; ``keep`` needs the same classes."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)
