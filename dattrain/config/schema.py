"""The schema of a recipe: its ``sections``, and what in them does not go together, refused with the reason when it is read.

Derived values are in ``derive``; files in ``load``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import model_validator

from dattrain.config.data_sections import Augment, Data, Eval, Geometry
from dattrain.config.sections import DETECTORS, Checkpoint, Init, Model, Optim, Schedule, Task, Train, Zero
from dattrain.config.values import Section, as_pair

RENAMED = {"train.remat": "train.activation_checkpointing"}
"""Keys of former versions, which recipes and run folders may still have, and their names now."""
_SEGMENTATION = {
    "task": ("dropout", "aux_weight"),
    "geometry": ("max_class_share",),
    "eval": ("mode", "stride", "scales", "flip"),
}
"""Keys that segmentation alone reads."""
_DETECTION = {
    "task": ("region_samples",),
    "geometry": (
        "short_sides",
        "precrop",
        "precrop_short_sides",
        "precrop_sides",
        "copy_paste",
        "group_aspect",
    ),
    "eval": ("max_detections", "score_threshold"),
}
"""Keys that detection alone reads."""


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
            self._of_classification()
        else:
            self._of_dense_prediction()
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
        if s.updates is not None:
            if s.warmup_updates is None:
                raise ValueError(
                    f"schedule.updates={s.updates} needs schedule.warmup_updates: a warm-up in epochs is of a length in epochs"
                )
            if s.warmup_updates > s.updates:
                raise ValueError(
                    f"schedule.warmup_updates={s.warmup_updates} is longer than schedule.updates={s.updates}"
                )
        elif s.warmup_updates is None and s.warmup_epochs > s.epochs:
            raise ValueError(
                f"schedule.warmup_epochs={s.warmup_epochs} is longer than schedule.epochs={s.epochs}"
            )
        if (s.kind == "step") != bool(s.milestones):
            raise ValueError(
                f"schedule.kind={s.kind} with schedule.milestones={list(s.milestones)}: `step` needs milestones, and no other reads them"
            )
        end = s.epochs if s.updates is None else s.updates
        if list(s.milestones) != sorted(set(s.milestones)) or any(each >= end for each in s.milestones):
            raise ValueError(
                f"schedule.milestones={list(s.milestones)} must grow and lie before the end ({s.length})"
            )

    def _changed(self, keys: Mapping[str, Sequence[str]]) -> list[str]:
        """Those of ``keys``, by section, that are not at their defaults."""
        return [
            f"{name}.{key}"
            for name, own in keys.items()
            for section in [getattr(self, name)]
            for key in own
            if getattr(section, key) != type(section).model_fields[key].default
        ]

    def _of_classification(self) -> None:
        """What only dense prediction reads would be ignored."""
        if changed := self._changed(
            {name: list(type(getattr(self, name)).model_fields) for name in ("task", "geometry")}
        ):
            raise ValueError(
                f"{changed[0]} has no meaning for task.kind=classification: leave it out, or set task.kind=segmentation or detection"
            )
        if changed := self._changed({"eval": [*_SEGMENTATION["eval"], *_DETECTION["eval"]]}):
            raise ValueError(
                f"{changed[0]} is of dense prediction, and this is task.kind=classification: leave it out"
            )

    def _of_dense_prediction(self) -> None:
        """What other tasks alone read must be off, lest a recipe say what is not done."""
        a, g, kind = self.augment, self.geometry, self.task.kind
        detects = kind == "detection"
        if (self.task.head in DETECTORS) != detects:
            fits = DETECTORS if detects else ("upernet", "semantic_fpn")
            raise ValueError(
                f"task.head={self.task.head} is not of task.kind={kind}, which has {', '.join(fits)}"
            )
        if changed := self._changed(_SEGMENTATION if detects else _DETECTION):
            raise ValueError(f"{changed[0]} has no meaning for task.kind={kind}: leave it out")
        if self.task.head == "retinanet" and (changed := self._changed({"task": ("region_samples",)})):
            raise ValueError(
                f"{changed[0]} is of R-CNNs, and task.head=retinanet has no regions: leave it out"
            )
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
        for name in self._changed({"augment": ("crop_scale", "crop_ratio"), "eval": ("resize", "crop_pct")}):
            section, key = name.split(".")
            default = type(getattr(self, section)).model_fields[key].default
            on[name] = (True, list(default) if isinstance(default, tuple) else default)
        if wrong := [f"{key}={off}" for key, (is_on, off) in on.items() if is_on]:
            raise ValueError(
                f"task.kind={kind} cannot use what is set here; it takes {' '.join(wrong)} "
                f"(extend base/{kind}.yaml, which sets them all)"
            )
        if detects and self.data.decoder == "dali":
            raise ValueError(
                "data.decoder=dali is not for task.kind=detection, whose boxes, masks and pasted objects are made on the CPU beside the pixels; "
                "use data.decoder=cpu"
            )
        if g.copy_paste and self.train.global_batch == 1:
            raise ValueError(
                f"geometry.copy_paste={g.copy_paste} takes objects from another image of the update, and train.global_batch=1 has none"
            )
        if self.eval.mode == "slide" and g.crop is None:
            raise ValueError("eval.mode=slide needs geometry.crop, the size of its windows")
        if self.eval.mode == "whole" and self.eval.stride is not None:
            raise ValueError("eval.stride is of eval.mode=slide: leave it out, or set that")
        shorter = [g.short_side, *g.short_sides]
        if g.long_side < max(shorter):
            name = "short_side" if g.short_side == max(shorter) else "short_sides"
            raise ValueError(
                f"geometry.long_side={g.long_side} is below geometry.{name}={max(shorter)}: no image could be resized to both"
            )
        smallest = {
            "short_side": g.short_side,
            "short_sides": min(g.short_sides, default=32),
            "crop": 32 if g.crop is None else min(as_pair(g.crop)),
            "precrop_short_sides": min(g.precrop_short_sides, default=32),
            "precrop_sides": g.precrop_sides[0],
        }
        if small := [f"geometry.{key}={getattr(g, key)}" for key, side in smallest.items() if side < 32]:
            raise ValueError(f"{', '.join(small)}: at least 32 pixels, the network's total stride")
        for name in ("scale", "precrop_sides"):
            low, high = getattr(g, name)
            if low > high:
                raise ValueError(f"geometry.{name}=[{low}, {high}]: the first must not be above the second")
        if g.precrop and not g.precrop_short_sides:
            raise ValueError(f"geometry.precrop={g.precrop} needs geometry.precrop_short_sides")
        if not self.eval.scales:
            raise ValueError("eval.scales is empty: [1.0] evaluates at one size")
        if not detects and self.model.num_classes > 255:
            raise ValueError(
                f"model.num_classes={self.model.num_classes}: a map of classes has a byte per pixel, and 255 is void; 255 at most"
            )
