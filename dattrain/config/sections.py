"""The sections of a recipe: frozen pydantic models, unknown keys refused. Together they are ``schema.Config``.

Those of the images are in ``data_sections``.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, field_validator, model_validator

from dattrain.config.values import Count, Interval, Positive, Section, Size
from dattrain.errors import ConfigError


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
    overrides: dict[str, Any] = Field(default={})
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
    extra: dict[str, Any] = Field(default={})
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
    """``map`` picks the head's rows by the names of classes (22K to 1K); ``new`` draws it afresh, of a detector the rows of classes alone; ``keep`` needs the same classes."""

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)
