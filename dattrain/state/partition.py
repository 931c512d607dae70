"""What this rank holds of a DeepSpeed engine's state, as named fragments: the only module that knows DeepSpeed's insides.

ZeRO flattens each optimizer group and gives every rank a slice of it (stages 1, 2), or slices every parameter (stage 3);
stage 0 keeps everything everywhere. ``LocalState`` describes all of them alike: a list of ``Fragment``, each a run of
consecutive elements of one named parameter, whose fp32 master, moments and average can be read and written in place.
Everything above this module is arithmetic on (name, start, length).

Tested against DeepSpeed 0.19.8. Attributes used that are not its public interface:

- stages 1, 2 (``DeepSpeedZeroOptimizer``): ``round_robin_bit16_groups``, ``round_robin_bit16_offsets``,
  ``single_partition_of_fp32_groups``, ``partition_size``, ``dp_process_group``, ``update_lp_params``. Not ``_hp_mapping``:
  it is computed in the wrong order under ``round_robin_gradients``.
- bf16 with fp32 accumulation at stage 1 (``BF16_Optimizer``): ``bf16_groups``, ``fp32_groups_flat_partition``,
  ``update_lp_params``.
- stage 3: ``ds_id``, ``ds_shape``, ``ds_numel``, ``ds_tensor`` of parameters; ``grad_position``, ``get_param_id``,
  ``fp32_partitioned_groups_flat``, ``fp16_partitioned_groups_flat``, ``_unflatten_partitioned_parameters``,
  ``checkpoint_event_prologue``/``epilogue``, ``backup_optimizer``.
- all: ``engine.basic_optimizer``, ``engine.optimizer.loss_scaler``, the engine's step counters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dattrain.errors import UserError
from dattrain.runtime.collectives import rank_and_world
from dattrain.state.format.manifest import Parameter

MOMENTS: tuple[Literal["exp_avg", "exp_avg_sq"], ...] = ("exp_avg", "exp_avg_sq")
MINIMUM_VERSION = (0, 19, 8)
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, start + numel)`` of the flattened parameter ``name`` (full shape ``shape``), on this rank.

    Its master weights are ``masters[flat][offset : offset + numel]``, flattened; moments and averages lie at the same place
    of tensors like that master. ``flat`` is -1 for a frozen parameter, which has weights alone. ``saved`` is the part,
    relative to the fragment, that this rank writes into a checkpoint: all of a partitioned one, a share of a replicated one.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: int
    offset: int
    saved: tuple[int, int]


class LocalState:
    """This rank's part of ``engine``'s state. Cheap to build; build it anew after anything that re-creates the optimizer.

    Args:
        engine: what ``deepspeed.initialize`` returned, ZeRO stage 0-3, with an Adam-like client optimizer.

    Raises:
        UserError: DeepSpeed is older than 0.19.8, or the engine keeps state where fragments cannot reach it (NVMe).
    """

    def __init__(self, engine: Any) -> None:
        _require_version()
        self.engine = engine
        self.stage = int(engine.zero_optimization_stage())
        self.rank, self.world = rank_and_world()
        self._zero = engine.optimizer
        self.optimizers: list[Any] = [engine.basic_optimizer]
        """Those whose steps change the masters and moments."""
        self.masters: list[Tensor] = []
        """The local fp32 masters, one tensor per partition; under stage 0 the trainable parameters themselves."""
        self.parameters: dict[str, Parameter] = {}
        self.fragments: list[Fragment] = []
        self._keys: list[Tensor] = []  # under which the optimizer keeps the moments of each master
        self._frozen: dict[str, Tensor] = {}
        self._home: dict[str, int] = {}
        _refuse_nvme(self._zero)
        self._named = {_clean(n): p for n, p in engine.module.named_parameters()}
        names = {id(p): n for n, p in self._named.items()}
        if self.stage == 3:
            self._partition_by_parameter()
        elif self.stage > 0:
            self._partition_by_group(names)
        else:
            self._replicate()
        if self.stage > 0:
            self._keys = self.masters
        self._add_frozen()
        order = {n: i for i, n in enumerate(self._named)}
        self.fragments.sort(key=lambda f: order[f.name])
        self.parameters = {n: self._describe(n, p) for n, p in self._named.items()}

    # Where things are

    def _partition_by_group(self, names: Mapping[int, str]) -> None:
        zero = self._zero
        if hasattr(zero, "single_partition_of_fp32_groups"):
            groups, self.masters = zero.round_robin_bit16_groups, list(zero.single_partition_of_fp32_groups)
            offsets = zero.round_robin_bit16_offsets
        else:
            groups, self.masters = zero.bf16_groups, list(zero.fp32_groups_flat_partition)
            offsets = [_running([p.numel() for p in group]) for group in groups]
        self._check_group(zero.dp_process_group)
        for flat, (group, begins) in enumerate(zip(groups, offsets)):
            size = self.masters[flat].numel()
            first = size * self.rank
            for parameter, begin in zip(group, begins):
                name = names[id(parameter)]
                self._home[name] = flat
                lo, hi = max(begin, first), min(begin + parameter.numel(), first + size)
                if lo < hi:
                    shape, numel = tuple(parameter.shape), hi - lo
                    self.fragments.append(
                        Fragment(name, shape, lo - begin, numel, flat, lo - first, (0, numel))
                    )

    def _partition_by_parameter(self) -> None:
        zero = self._zero
        self.masters = list(zero.fp32_partitioned_groups_flat)
        backup = getattr(zero, "backup_optimizer", None)
        if backup is not None:
            self.optimizers.append(backup)
        self._check_group(zero.dp_process_group)
        for name, parameter in self._named.items():
            if not _optimized(parameter):
                continue
            flat, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            self._home[name] = flat
            self._add_slice(name, parameter, size, flat, offset)

    def _add_slice(self, name: str, parameter: Any, size: int, flat: int, offset: int) -> None:
        """This rank's slice, ``size`` elements or what is left, of a parameter that stage 3 has cut up."""
        start = size * self.rank
        numel = min(size, parameter.ds_numel - start)
        if numel > 0:
            shape = tuple(parameter.ds_shape)
            self.fragments.append(Fragment(name, shape, start, numel, flat, offset, (0, numel)))

    def _replicate(self) -> None:
        trainable = {n: p for n, p in self._named.items() if _optimized(p)}
        self._keys = list(trainable.values())
        self.masters = [p.data for p in trainable.values()]
        shares = _shares([p.numel() for p in trainable.values()], self.rank, self.world)
        for flat, ((name, parameter), saved) in enumerate(zip(trainable.items(), shares)):
            self._home[name] = flat
            self.fragments.append(
                Fragment(name, tuple(parameter.shape), 0, parameter.numel(), flat, 0, saved)
            )

    def _add_frozen(self) -> None:
        frozen = {n: p for n, p in self._named.items() if not _optimized(p)}
        shares = _shares([_numel(p) for p in frozen.values()], self.rank, self.world)
        for (name, parameter), saved in zip(frozen.items(), shares):
            if hasattr(parameter, "ds_id"):
                self._frozen[name] = parameter.ds_tensor
                self._add_slice(name, parameter, parameter.ds_tensor.ds_numel, -1, 0)
            else:
                self._frozen[name] = parameter.data
                if parameter.numel():
                    shape, numel = tuple(parameter.shape), parameter.numel()
                    self.fragments.append(Fragment(name, shape, 0, numel, -1, 0, saved))

    def _check_group(self, group: Any) -> None:
        import torch.distributed as dist

        if dist.get_world_size(group) != self.world:
            raise UserError(
                "checkpoints need plain data parallelism: tensor, pipeline and expert parallel groups are not known"
            )

    def _describe(self, name: str, parameter: Tensor) -> Parameter:
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if name not in self._home:
            return Parameter(shape, False, None)
        state = self._state_of(self._keys[self._home[name]])
        return Parameter(shape, True, int(state["step"]) if "step" in state else 0)

    def _state_of(self, key: Tensor) -> dict[str, Any]:
        for optimizer in self.optimizers:
            if key in optimizer.state:
                state: dict[str, Any] = optimizer.state[key]
                return state
        return {}

    # Reading and writing

    def tensor(self, fragment: Fragment, state: str, ema: list[Tensor] | None = None) -> Tensor | None:
        """The tensor that holds ``state`` of ``fragment`` at ``fragment.offset``; None for moments before the first step."""
        if fragment.flat < 0:
            return self._frozen[fragment.name] if state == "param" else None
        if state == "param":
            return self.masters[fragment.flat]
        if state == "ema":
            return None if ema is None else ema[fragment.flat]
        return self._state_of(self._keys[fragment.flat]).get(state)

    def create_moments(self, opt_step: Mapping[str, int]) -> None:
        """Give every master moments (zeros where there were none) and Adam's step count, as ``opt_step`` says by name.

        All parameters of one partition must agree, which they do if they ever were trained under stages 1-3.
        """
        steps: dict[int, set[int]] = {}
        for name, flat in self._home.items():
            steps.setdefault(flat, set()).add(opt_step[name])
        for flat, values in steps.items():
            # Under stage 0 a parameter without gradients is not stepped; the partition that takes it in counts on.
            step = max(values)
            key = self._keys[flat]
            optimizer = self._owner(flat, key)
            state = optimizer.state[key]
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(self.masters[flat], memory_format=torch.preserve_format)
            state["step"] = _step_value(optimizer, state.get("step"), step, self.masters[flat].device)

    def _owner(self, flat: int, key: Tensor) -> Any:
        """The optimizer that steps a master."""
        for optimizer in self.optimizers:
            if key in optimizer.state:
                return optimizer
        on_device = len(self.optimizers) > 1 and self._zero.subgroup_to_device[flat] != "cpu"
        return self.optimizers[1 if on_device else 0]

    def begin_write(self) -> None:
        """To be called on all ranks before weights are written: releases gathered parameters (stage 3)."""
        if self.stage == 3:
            self._zero.checkpoint_event_prologue()

    def refresh(self) -> None:
        """Bring the weights that the forward pass uses up to date with the masters. Collective: all ranks call it."""
        with torch.no_grad():
            if self.stage == 3:
                zero = self._zero
                for flat, master in enumerate(self.masters):
                    zero.fp16_partitioned_groups_flat[flat].data.copy_(master.data)
                    zero._unflatten_partitioned_parameters(flat)
                zero.checkpoint_event_epilogue()
            elif self.stage > 0:
                self._zero.update_lp_params()

    # What is not a tensor per parameter

    def buffers(self) -> dict[str, Tensor]:
        """The module's persistent buffers by name; the same on every rank."""
        found = {}
        for prefix, module in self.engine.module.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    found[_clean(f"{prefix}.{name}" if prefix else name)] = buffer
        return found

    def scalars(self) -> dict[str, Any]:
        """Loss scale and counters, as JSON."""
        engine = self.engine
        return {
            "global_steps": int(engine.global_steps),
            "global_samples": int(engine.global_samples),
            "skipped_steps": int(engine.skipped_steps),
            "loss_scaler": scaler_state(getattr(self._zero, "loss_scaler", None)),
        }

    def set_scalars(self, scalars: Mapping[str, Any]) -> None:
        """The reverse of ``scalars``; the dynamic loss scale is restored where both sides have one."""
        engine = self.engine
        engine.global_steps = scalars["global_steps"]
        engine.global_samples = scalars["global_samples"]
        engine.skipped_steps = scalars["skipped_steps"]
        # A checkpoint is taken between updates; the accumulation may have changed since.
        engine.micro_steps = scalars["global_steps"] * engine.gradient_accumulation_steps()
        scaler = getattr(self._zero, "loss_scaler", None)
        if scalars.get("loss_scaler") and getattr(scaler, "dynamic", False):
            for key, value in scalars["loss_scaler"].items():
                setattr(scaler, key, value)

    def groups(self) -> list[dict[str, Any]]:
        """Hyperparameters (numbers and short lists) of every optimizer group, without its parameters."""
        found = []
        for group in self.engine.basic_optimizer.param_groups:
            plain = {k: list(v) if isinstance(v, tuple) else v for k, v in group.items() if k != "params"}
            found.append({k: v for k, v in plain.items() if _is_plain(v)})
        return found


def scaler_state(scaler: Any) -> dict[str, Any] | None:
    """Fields of DeepSpeed's dynamic loss scaler; None for a static one, or none."""
    if not getattr(scaler, "dynamic", False):
        return None
    return {k: getattr(scaler, k) for k in _SCALER if hasattr(scaler, k)}


def read(tensor: Tensor, offset: int, numel: int) -> Tensor:
    """``numel`` elements from ``offset`` of the flattened ``tensor``: a view where its memory allows, else a copy."""
    return tensor.detach().reshape(-1).narrow(0, offset, numel)


@torch.no_grad()
def write(tensor: Tensor, offset: int, values: Tensor) -> None:
    """Put ``values`` (1-D) at ``offset`` of the flattened ``tensor``, casting to its dtype."""
    if tensor.is_contiguous():
        tensor.detach().view(-1).narrow(0, offset, values.numel()).copy_(values)
    else:
        # A channels-last weight under stage 0: its flattened order is not its order in memory.
        flat = tensor.detach().reshape(-1)
        flat.narrow(0, offset, values.numel()).copy_(values)
        tensor.detach().copy_(flat.view(tensor.shape))


def _clean(name: str) -> str:
    return name.replace("_orig_mod.", "")


def _optimized(parameter: Tensor) -> bool:
    return parameter.requires_grad and _numel(parameter) > 0


def _numel(parameter: Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _running(sizes: list[int]) -> list[int]:
    return list(itertools.accumulate(sizes[:-1], initial=0))


def _shares(sizes: list[int], rank: int, world: int) -> list[tuple[int, int]]:
    """What of each tensor is ``rank``'s, of tensors of ``sizes`` laid end to end and cut into ``world`` equal parts."""
    total = sum(sizes)
    first, last = total * rank // world, total * (rank + 1) // world
    return [
        (lo, max(lo, hi))
        for begin, size in zip(_running(sizes), sizes)
        for lo, hi in [(min(max(first - begin, 0), size), min(max(last - begin, 0), size))]
    ]


def _step_value(optimizer: Any, old: Any, step: int, device: torch.device) -> Any:
    if isinstance(old, Tensor):
        return torch.full_like(old, float(step))
    if isinstance(old, int) or not isinstance(optimizer, torch.optim.Adam):
        return step  # DeepSpeed's own Adams count in an int
    group = optimizer.param_groups[0]
    on_device = group.get("capturable") or group.get("fused")
    return torch.tensor(float(step), dtype=torch.float32, device=device if on_device else "cpu")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 16 and all(_is_plain(v) for v in value)
    return (
        value is None
        or isinstance(value, (bool, int, str))
        or (isinstance(value, float) and math.isfinite(value))
    )


def _refuse_nvme(zero: Any) -> None:
    if getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False):
        raise UserError(
            "zero.offload to device nvme cannot be checkpointed: its state is in DeepSpeed's swap files; use device: cpu"
        )


def _require_version() -> None:
    import deepspeed

    numbers = tuple(int(x) for x in deepspeed.__version__.split("+")[0].split(".")[:3] if x.isdigit())
    if numbers < MINIMUM_VERSION:
        raise UserError(
            f"deepspeed {deepspeed.__version__} is installed; dattrain's checkpoints know its state from 0.19.8 on"
        )
