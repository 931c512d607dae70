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
    Init,
    Model,
    Optim,
    Schedule,
    Section,
    Train,
    Zero,
    as_pair,
)

RENAMED = {"train.remat": "train.activation_checkpointing"}
"""Keys of former versions, which recipes and run folders may still have, and their names now."""


class Config(Section):
    """A recipe."""

    name: str = "run"
    """Name of the run folder and the Slurm job."""
    description: str = ""
    """Source of the values, expected devices and hours, and whether we have run it."""
    model: Model = Model()
    data: Data = Data()
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
        if self.schedule.warmup_epochs > self.schedule.epochs:
            raise ValueError(
                f"schedule.warmup_epochs={self.schedule.warmup_epochs} is longer than schedule.epochs={self.schedule.epochs}"
            )
        if (z.stage < 1 and z.offload.optimizer) or (z.stage < 3 and z.offload.param):
            raise ValueError(
                f"zero.offload needs zero.stage 1-3 (optimizer) or 3 (param), not zero.stage={z.stage}"
            )
        if self.data.reader == "webdataset" and self.data.decoder == "dali":
            raise ValueError(
                "data.reader=webdataset decodes on the CPU; data.decoder=dali needs data.reader=index"
            )
        return self
