"""The schema of a recipe: its ``sections``, and what in them does not go together, refused with the reason when it is read.

Derived values are in ``derive``; files in ``load``.
"""

from __future__ import annotations

from pydantic import model_validator

from dattrain.config.sections import (
    Augment,
    Checkpoint,
    Data,
    Eval,
    Geometry,
    Init,
    Model,
    Optim,
    Schedule,
    Section,
    Task,
    Train,
    Zero,
    as_pair,
)

RENAMED = {"train.remat": "train.activation_checkpointing"}
"""Keys of former versions, which recipes and run folders may still have, and their names now."""
_EVAL_DENSE = ("mode", "stride", "scales", "flip")
"""Keys of ``eval`` that classification does not read."""


class Config(Section):
    """A recipe."""

    name: str = "run"
    """Name of the run folder and the Slurm job."""
    description: str = ""
    """Source of the values, expected devices and hours, and whether we have run it."""
    task: Task = Task()
    model: Model = Model()
    data: Data = Data()
    geometry: Geometry = Geometry()
    augment: Augment = Augment()
    eval: Eval = Eval()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    zero: Zero = Zero()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    init: Init = Init()

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        t, z = self.train, self.zero
        if z.stage == 0 and t.precision in ("bf16-pure", "fp16"):
            why = {
                "bf16-pure": "DeepSpeed's bf16 engine starts with an optimizer step on zero gradients there, which puts Adam's step count off by one",
                "fp16": "DeepSpeed never scales the loss there",
            }[t.precision]
            raise ValueError(
                f"zero.stage=0 with train.precision={t.precision} trains wrongly: {why}; use zero.stage 1-3, or precision bf16 or fp32"
            )
        if t.tf32 and t.precision != "fp32":
            raise ValueError(
                f"train.tf32 is a way to multiply in fp32, and train.precision={t.precision}: its products are in 16 bits already, "
                "and what it keeps in fp32 is kept so for accuracy; use train.precision=fp32, or leave train.tf32 out"
            )
        if t.cuda_graphs:
            # A graph's outputs live until the next forward pass, and its inputs must stay where they are.
            if t.compile == "none":
                raise ValueError("train.cuda_graphs needs train.compile: block or stage")
            if z.stage != 2:
                raise ValueError(
                    f"train.cuda_graphs needs zero.stage=2, not {z.stage}: stages 0 and 1 keep gradients in the graph's memory "
                    "between micro-batches, stage 3 moves the weights"
                )
            recomputed = t.activation_checkpointing
            if recomputed in ("stage", t.compile):
                raise ValueError(
                    f"train.cuda_graphs with train.compile={t.compile} cannot recompute from outside "
                    f"(train.activation_checkpointing={recomputed}); use none or selective{', or block' if t.compile == 'stage' else ''}"
                )
        if t.global_batch % self.augment.group:
            raise ValueError(
                f"augment.mix_group={self.augment.mix_group} does not divide train.global_batch={t.global_batch}, and samples are "
                "mixed within groups of an update; use a group that does, or augment.mix_prob=0"
            )
        if self.model.in_chans != 3:
            raise ValueError(f"model.in_chans={self.model.in_chans}, but the data gives 3 (RGB, gray as RGB)")
        for size in (self.model.img_size, *(p.img_size for p in t.progressive)):
            for side in as_pair(size):
                if side < 32 or side % 32:
                    raise ValueError(f"img_size={size} must be a multiple of 32 (the network's total stride)")
        if list(t.progressive) != sorted(t.progressive, key=lambda p: p.epoch):
            raise ValueError("train.progressive must be in order of epoch")
        self._length()
        if self.task.kind == "classification":
            self._not_of_segmentation()
        else:
            self._of_segmentation()
        if (z.stage < 1 and z.offload.optimizer) or (z.stage < 3 and z.offload.param):
            raise ValueError(
                f"zero.offload needs zero.stage 1-3 (optimizer) or 3 (param), not zero.stage={z.stage}"
            )
        if self.data.reader == "webdataset" and self.data.decoder == "dali":
            raise ValueError(
                "data.reader=webdataset decodes on the CPU; data.decoder=dali needs data.reader=index"
            )
        return self

    def _length(self) -> None:
        s = self.schedule
        if (s.updates is None) != (s.warmup_updates is None):
            raise ValueError(
                "schedule.updates and schedule.warmup_updates go together (or schedule.epochs and schedule.warmup_epochs): "
                f"updates={s.updates}, warmup_updates={s.warmup_updates}"
            )
        if s.updates is not None and s.warmup_updates is not None and s.warmup_updates > s.updates:
            raise ValueError(
                f"schedule.warmup_updates={s.warmup_updates} is longer than schedule.updates={s.updates}"
            )
        if s.updates is None and s.warmup_epochs > s.epochs:
            raise ValueError(
                f"schedule.warmup_epochs={s.warmup_epochs} is longer than schedule.epochs={s.epochs}"
            )

    def _not_of_segmentation(self) -> None:
        """What only dense prediction reads would be ignored."""
        for name, section in (("task", self.task), ("geometry", self.geometry)):
            if changed := [key for key, value in section if value != type(section).model_fields[key].default]:
                raise ValueError(
                    f"{name}.{changed[0]} has no meaning for task.kind=classification: leave it out, or set task.kind=segmentation"
                )
        if changed := [
            key for key in _EVAL_DENSE if getattr(self.eval, key) != Eval.model_fields[key].default
        ]:
            raise ValueError(
                f"eval.{changed[0]} is of segmentation, and this is task.kind=classification: leave it out"
            )

    def _of_segmentation(self) -> None:
        """What only classification reads must be off, lest a recipe say what is not done."""
        a, g = self.augment, self.geometry
        on = {
            "augment.mixup": (a.mixes and a.mixup > 0, 0),
            "augment.cutmix": (a.mixes and a.cutmix > 0, 0),
            "augment.randaugment": (a.randaugment is not None, "null"),
            "augment.color_jitter": (a.color_jitter > 0, 0),
            "augment.erase_prob": (a.erase_prob > 0, 0),
            "augment.label_smoothing": (a.label_smoothing > 0, 0),
            "train.progressive": (bool(self.train.progressive), "[]"),
            "data.reader": (self.data.reader != "index", "index"),
            "eval.batch": (self.eval.batch != 1, 1),
            "optim.freeze_backbone": (self.optim.freeze_backbone, "false"),
        }
        unread = {"augment": ("crop_scale", "crop_ratio"), "eval": ("resize", "crop_pct")}
        for name, keys in unread.items():
            section = getattr(self, name)
            for key in keys:
                default = type(section).model_fields[key].default
                on[f"{name}.{key}"] = (
                    getattr(section, key) != default,
                    list(default) if isinstance(default, tuple) else default,
                )
        if wrong := [f"{key}={off}" for key, (is_on, off) in on.items() if is_on]:
            raise ValueError(
                f"task.kind=segmentation cannot use what is set here; it takes {' '.join(wrong)} "
                "(extend base/segmentation.yaml, which sets them all)"
            )
        if self.eval.mode == "slide" and g.crop is None:
            raise ValueError("eval.mode=slide needs geometry.crop, the size of its windows")
        if self.eval.mode == "whole" and self.eval.stride is not None:
            raise ValueError("eval.stride is of eval.mode=slide: leave it out, or set that")
        if g.long_side < g.short_side:
            raise ValueError(
                f"geometry.long_side={g.long_side} is below geometry.short_side={g.short_side}: no image could be resized to both"
            )
        if min(g.short_side, *as_pair(32 if g.crop is None else g.crop)) < 32:
            raise ValueError(
                f"geometry.short_side={g.short_side}, geometry.crop={g.crop}: at least 32 pixels, the network's total stride"
            )
        if g.scale[0] > g.scale[1]:
            raise ValueError(f"geometry.scale={list(g.scale)}: the first must not be above the second")
        if not self.eval.scales:
            raise ValueError("eval.scales is empty: [1.0] evaluates at one size")
        if self.model.num_classes > 255:
            raise ValueError(
                f"model.num_classes={self.model.num_classes}: a map of classes has a byte per pixel, and 255 is void; 255 at most"
            )
