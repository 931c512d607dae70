"""The one place where DeepSpeed is set up: a recipe to DeepSpeed's JSON (pure), and that to an engine.

What ``dattrain.state.partition`` may rely on: ``initialize`` returns a ``DeepSpeedEngine`` of ZeRO stage 0-3 over plain data
parallelism (the default process group), whose ``basic_optimizer`` is a torch-like AdamW (ours, or DeepSpeed's CPU Adam
where the optimizer is offloaded from CUDA) with at most two groups, none of them empty; ``engine.module`` is the model itself,
parameter names unchanged.

Not used, and why (docs/zero.md): DeepSpeed's checkpoints (not atomic, not elastic), its activation checkpointing (wrong under
autocast), its schedulers and its data loaders (ours are functions of the position), ``zero.Init`` (other initial weights).
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from dattrain.config.derive import Derived
from dattrain.config.schema import Config
from dattrain.engine import precision
from dattrain.errors import ConfigError
from dattrain.runtime import environment
from dattrain.runtime.imports import uncollected

RESERVED = {"stage", "offload_optimizer", "offload_param"}
"""Keys of ``zero_optimization`` that have a setting of their own."""
REFUSED = {
    "zero_quantized_weights": "quantised weights change what is trained and cannot be checkpointed exactly",
    "zero_quantized_gradients": "quantised gradients break the equality of curves across stages",
    "zero_hpz_partition_size": "a secondary partition is state that fragments do not know",
    "mics_shard_size": "MiCS partitions are not over all ranks, which fragments assume",
}


def ds_config(config: Config, derived: Derived, *, device: str = "cuda") -> dict[str, Any]:
    """DeepSpeed's configuration for a recipe. Pure.

    Raises:
        ConfigError: ``zero.extra`` sets a key that has its own setting, or one that is known to break exactness.
    """
    zero = config.zero
    for key in zero.extra:
        if key in RESERVED:
            raise ConfigError(f"zero.extra.{key}: use zero.{key.replace('offload_', 'offload.')} instead")
        if key in REFUSED:
            raise ConfigError(f"zero.extra.{key} is refused: {REFUSED[key]}")
    block: dict[str, Any] = {"stage": zero.stage}
    if zero.stage > 0:
        # Sized for models of 10-200M parameters; DeepSpeed's defaults take 2 GB for buffers alone.
        block |= {
            "contiguous_gradients": True,
            # For it DeepSpeed waits for the device after each backward pass, which one rank gains nothing from.
            "overlap_comm": device == "cuda" and derived.world > 1,
            "reduce_bucket_size": precision.REDUCE_BUCKET,
            "allgather_bucket_size": precision.ALLGATHER_BUCKET,
        }
    if zero.stage == 3:
        block |= {"stage3_prefetch_bucket_size": precision.PREFETCH_BUCKET}
    if zero.offload.optimizer is not None:
        block["offload_optimizer"] = dict(zero.offload.optimizer)
    if zero.offload.param is not None:
        block["offload_param"] = dict(zero.offload.param)
    return {
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": derived.micro_batch,
        "gradient_accumulation_steps": derived.accumulation,
        # Stated even when it is off: DeepSpeed's default is 1.0.
        "gradient_clipping": config.optim.clip,
        "steps_per_print": None,
        # Its clock is on by default and stops the whole device at each forward pass and each step; ours does not.
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {**block, **zero.extra},
        **_precision(config),
    }


def _precision(config: Config) -> dict[str, Any]:
    match config.train.precision:
        case "fp32":
            return {}
        case "bf16":
            # An empty list keeps gradients (and stage 3's gathered weights) in fp32 on the wire: with bf16 there, the
            # sum over ranks would round at each of them.
            return {
                "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
            }
        case "bf16-pure":
            return {
                "bf16": {"enabled": True, "check_grad_overflow": True},
                "data_types": {"grad_accum_dtype": _name(precision.GRADIENTS["bf16-pure"])},
            }
        case "fp16":
            return {
                "fp16": {
                    "enabled": True,
                    "loss_scale": 0,
                    "initial_scale_power": 16,
                    "loss_scale_window": 1000,
                    "hysteresis": 2,
                    "min_loss_scale": 1,
                }
            }


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, quiet, and without the extension that it would compile on its first use on a CPU.

    That extension (shared-memory collectives) takes half a minute and a C++ compiler, and changes no result.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # It calls collectives by names that torch is about to retire; that is for its makers to read.
    warnings.filterwarnings(
        "ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning
    )
    # It asks every optimizer whether it is Muon, whose module hands functions to torch.compile as it is imported: with that come
    # TorchInductor and Triton, a second and more for nothing.
    uncompiled = mock.patch.object(torch, "compile", lambda function: function)
    with uncollected("deepspeed"), uncompiled:
        import deepspeed
        import deepspeed.ops
        import deepspeed.runtime.zero.muon.original_muon

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return deepspeed


def destroy_process_group() -> None:
    """Destroy the process group by way of DeepSpeed; safe where DeepSpeed was never set up.

    It keeps groups of its own, with which the next training of this process would fail.
    """
    if "deepspeed" in sys.modules:
        from deepspeed.comm import comm

        if comm.cdb is not None and comm.cdb.is_initialized() and dist.is_initialized():
            comm.destroy_process_group()
            return
    environment.disconnect()


def initialize(
    model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], device: torch.device
) -> Any:
    """An engine over ``model`` (moved to ``device``, partitioned in place). The process group must be up.

    The same weights must be there on every rank before (they are drawn from the seed); DeepSpeed broadcasts rank 0's anyway.
    """
    deepspeed = import_deepspeed(device)
    logger = logging.getLogger("DeepSpeed")
    # It warns of every optimizer that is not its own, and of ours; the tests against torch.optim.AdamW are the answer.
    logger.setLevel(logging.ERROR)
    try:
        engine, *_ = deepspeed.initialize(
            model=model.to(device), optimizer=optimizer, config=settings, dist_init_required=False
        )
    finally:
        logger.setLevel(logging.WARNING)
    return engine


def cpu_adam(
    groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """DeepSpeed's vectorised AdamW for host memory. Compiled on first use (about a minute)."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, lr=lr, betas=betas, eps=eps, adamw_mode=True)
    return optimizer


def loss_scale(engine: Any) -> float | None:
    """The dynamic loss scale, None where there is none."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return float(scaler.cur_scale) if scaler is not None and getattr(scaler, "dynamic", False) else None
