"""One rank of the state tests: runs a list of jobs, each a fresh DeepSpeed engine on a small model, in one process.

``python state_worker.py PLAN.json`` under RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Every job trains on data that is a
function of the position alone, may resume, may save, and leaves a line of JSON with its losses in ``<out>``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint as remat

GLOBAL_BATCH = 12


@dataclass
class Job:
    """One engine's life. ``run`` holds its checkpoints; it ends with a checkpoint of ``step`` where it stands."""

    run: str
    out: str
    stage: int = 2
    precision: str = "fp32"
    accumulation: int = 1
    remat: bool = False
    ema: float = 0.0
    resume: bool = False
    until: int = 4
    save_at: list[int] = field(default_factory=list)
    background: bool = True
    frozen: bool = False
    channels_last: bool = False
    width: int = 8
    zero: dict[str, Any] = field(default_factory=dict)
    keep_last: int = 100
    nan_at: int = -1


class Net(nn.Module):
    """A DAT in miniature: convolutions, norms, attention by grid_sample with a table of biases, a buffer that counts."""

    def __init__(self, width: int, use_remat: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.depthwise = nn.Conv2d(width, width, 3, 1, 1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.offset = nn.Conv2d(width, 2, 1, bias=False)
        self.table = nn.Parameter(torch.randn(3, 7, 7) * 0.02)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(3 * width, width)
        self.head = nn.Linear(width, 5)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("grid", torch.linspace(-1, 1, 4), persistent=False)
        self.remat = use_remat

    def block(self, x: torch.Tensor) -> torch.Tensor:
        offset = self.offset(self.depthwise(x)).permute(0, 2, 3, 1).float().tanh() * 0.2
        at = torch.stack(torch.meshgrid(self.grid.float(), self.grid.float(), indexing="ij"), -1).flip(-1)
        sampled = nn.functional.grid_sample(x.float(), at + offset, align_corners=True).to(x.dtype)
        bias = self.table[:, 2:6, 2:6].mean(0)
        y = self.norm((x + sampled + bias).permute(0, 2, 3, 1))
        return x + self.out(nn.functional.gelu(self.mix(y))).permute(0, 3, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls += 1
        x = self.stem(x)
        x = remat(self.block, x, use_reentrant=False) if self.remat else self.block(x)
        return self.head(x.mean((2, 3)))


def batch(position: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples ``[position, position + size)``: each one a function of its position."""
    images, labels = [], []
    for i in range(position, position + size):
        g = torch.Generator().manual_seed(1000 + i % 96)
        images.append(torch.randn(3, 16, 16, generator=g))
        labels.append(int(torch.randint(5, (), generator=g)))
    return torch.stack(images), torch.tensor(labels)


def start_distributed() -> tuple[int, int]:
    """Join the gloo group without building DeepSpeed's shared-memory op."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logging.logger.setLevel("ERROR")
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    return dist.get_rank(), dist.get_world_size()


def build(job: Job) -> Any:
    """An engine with two groups of other learning rates and decays, the second without decay."""
    import deepspeed

    torch.manual_seed(7)
    model = Net(job.width, job.remat)
    if job.frozen:
        for parameter in [*model.stem.parameters(), model.table]:
            parameter.requires_grad_(False)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in trained if p.ndim > 1], "lr": 3e-3, "weight_decay": 0.05},
        {"params": [p for n, p in trained if p.ndim <= 1], "lr": 1e-3, "weight_decay": 0.0},
    ]
    world = dist.get_world_size()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world // job.accumulation,
        "gradient_accumulation_steps": job.accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": job.stage, "stage3_param_persistence_threshold": 20, **job.zero},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    if job.precision == "bf16":
        # Without the empty list, as engine/zero.py has it too, ZeRO-3 gathers weights in bf16 at some times and fp32 at others.
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    elif job.precision == "bf16-pure":
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif job.precision == "fp16":
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
        config["fp16"] = {"enabled": True, "initial_scale_power": 10, "loss_scale_window": 2, "hysteresis": 1}
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    if job.channels_last:
        engine.module.to(
            memory_format=torch.channels_last
        )  # DeepSpeed cannot broadcast such weights: afterwards
    return engine


def train_step(engine: Any, job: Job, step: int) -> float:
    """One update on the global batch; the mean loss over all of it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    micro = GLOBAL_BATCH // world // job.accumulation
    total = torch.zeros((), dtype=torch.float64)
    dtype = {"bf16-pure": torch.bfloat16, "fp16": torch.float16}.get(job.precision, torch.float32)
    for i in range(job.accumulation):
        first = step * GLOBAL_BATCH + (rank * job.accumulation + i) * micro
        images, labels = batch(first, micro)
        if step == job.nan_at:
            images = images * float("inf")
        loss = nn.functional.cross_entropy(engine(images.to(dtype)).float(), labels)
        engine.backward(loss)
        engine.step()
        total += loss.detach().double()
    dist.all_reduce(total)
    return float(total) / world / job.accumulation


def run(job: Job) -> dict[str, Any]:
    """Train from where the run stands until ``job.until``; saves at the steps asked for and at the end."""
    from dattrain.state.checkpointer import Checkpointer, Description
    from dattrain.engine.ema import new_average, update_average
    from dattrain.state.partition import LocalState
    from dattrain.state.format.retention import Policy

    engine = build(job)
    ema = new_average(LocalState(engine).masters) if job.ema else None
    keeper = Checkpointer(
        Path(job.run),
        Policy(job.keep_last),
        Description(precision=job.precision),
        background=job.background,
        patience=60,
    )
    step, losses = 0, []
    if job.resume:
        meta = keeper.resume(engine, ema)
        step = meta["step"] if meta else 0
    resumed_at = step
    saved = -1
    while step < job.until:
        losses.append(train_step(engine, job, step))
        step += 1
        if ema is not None:
            update_average(ema, LocalState(engine).masters, job.ema)
        if step in job.save_at:
            keeper.save(engine, ema, {"step": step, "samples_seen": step * GLOBAL_BATCH, "epoch": step / 8})
            saved = step
    if saved != step:
        keeper.save(engine, ema, {"step": step, "samples_seen": step * GLOBAL_BATCH, "epoch": step / 8})
    keeper.wait()
    local = LocalState(engine)
    result = {
        "losses": losses,
        "resumed_at": resumed_at,
        "skipped": list(keeper.skipped),
        "scalars": local.scalars(),
        "groups": [{k: g[k] for k in ("lr", "weight_decay")} for g in local.groups()],
    }
    if dist.get_rank() == 0:
        Path(job.out).write_text(json.dumps(result))
    with contextlib.suppress(Exception):
        engine.destroy()
    return result


def finish(code: int) -> None:
    """Leave without running destructors: ZeRO-3 sometimes aborts in them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Run every job of the plan."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    start_distributed()
    code = 0
    try:
        for entry in plan:
            run(Job(**entry))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finish(code)


if __name__ == "__main__":
    main()
