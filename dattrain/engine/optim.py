"""AdamW with the recipe's groups: weight decay or none, and a learning rate per layer without a group per layer.

ZeRO gives every optimizer group its own flat partition, with its own reductions; one group per layer would make dozens of
small ones. So there are two groups at most, and the rate of a layer is a factor on a run of elements of the flat fp32
partition: ``AdamW.set_scales`` takes the runs, and ``step`` hands views of them, by factor, to torch's own update: on a CPU by way
of ``fused_adamw``, which keeps the bits from depending on where a tensor was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from dattrain.config.schema import Config
from dattrain.engine import fused_adamw
from dattrain.engine.zero import cpu_adam
from dattrain.errors import UserError
from dattrain.state.partition import LocalState

DECAY, NO_DECAY = "decay", "no_decay"


@dataclass(frozen=True)
class Run:
    """Elements ``[start, start + numel)`` of a flat tensor, whose learning rate is multiplied by ``scale``."""

    start: int
    numel: int
    scale: float


class AdamW(torch.optim.AdamW):
    """torch's AdamW, with runs of elements at their own multiple of the group's learning rate.

    The state (``exp_avg``, ``exp_avg_sq``, ``step``) is that of ``torch.optim.AdamW``, one entry per tensor. The result of
    a step equals that of ``torch.optim.AdamW`` with one group per rate: decoupled weight decay is scaled too.

    Raises:
        ValueError: a group wants ``maximize`` or ``amsgrad``, which such a step does not do.
    """

    _runs: dict[int, tuple[Tensor, tuple[Run, ...]]]
    _skipped = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, which calls it for every group; see the class."""
        super().add_param_group(param_group)
        for name in ("maximize", "amsgrad"):
            if self.param_groups[-1][name]:
                raise ValueError(f"this AdamW steps without {name}; torch.optim.AdamW has it")

    def skip_next(self) -> None:
        """Let the next ``step`` do nothing: its gradients are not finite, and under stage 0 DeepSpeed does not look."""
        self._skipped = True

    def set_scales(self, runs: Mapping[Tensor, Sequence[Run]]) -> None:
        """Say how the tensors that ``step`` will see are cut up; elements outside every run are left as they are.

        A tensor that is not named here, or all of whose runs have factor 1, is stepped at once.
        """
        self._runs = {}
        for tensor, parts in runs.items():
            ordered = _joined(sorted(parts, key=lambda run: run.start))
            uncut = len(ordered) == 1 and ordered[0].numel == tensor.numel()
            if not uncut and tensor.dim() != 1:
                raise ValueError(
                    f"runs of a tensor of shape {tuple(tensor.shape)}; only flat ones can be cut up"
                )
            if any(run.scale != 1.0 for run in ordered):
                # The tensor is kept as well: its id must not be given to another one.
                self._runs[id(tensor)] = (tensor, tuple(ordered))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; see the class."""
        if self._skipped:
            self._skipped = False
            return None
        if not getattr(self, "_runs", None) and not any(_on_host(group) for group in self.param_groups):
            return super().step(closure)
        if closure is not None:
            raise ValueError("a step by runs, or fused on a CPU, takes no closure")
        for group in self.param_groups:
            self._step_group(group)
        return None

    def _step_group(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        averages: list[Tensor] = []
        squares: list[Tensor] = []
        steps: list[Tensor] = []
        init_group: Any = self._init_group  # untyped
        init_group(group, params, grads, averages, squares, [], steps)
        runs = getattr(self, "_runs", {})
        by_scale: dict[float, list[fused_adamw.Member]] = {}
        for p, g, m, v, step in zip(params, grads, averages, squares, steps):
            cut = runs.get(id(p))
            for run in cut[1] if cut else (Run(0, p.numel(), 1.0),):
                views = [p, g, m, v]
                if run.numel < p.numel():
                    views = [t.narrow(0, run.start, run.numel) for t in views]
                by_scale.setdefault(run.scale, []).append(fused_adamw.Member._make([*views, step]))
        for scale, members in by_scale.items():
            _update(members, group, group["lr"] * scale)
        for step in steps:
            step += 1


def _on_host(group: Mapping[str, Any]) -> bool:
    return bool(group["fused"]) and all(p.device.type == "cpu" for p in group["params"])


def _update(members: list[fused_adamw.Member], group: Mapping[str, Any], lr: float) -> None:
    settings: dict[str, Any] = {"lr": lr, "eps": group["eps"], "weight_decay": group["weight_decay"]}
    if _on_host(group):
        fused_adamw.step(members, betas=group["betas"], **settings)
        return
    weights, gradients, averages, squares, steps = (list(column) for column in zip(*members))
    adam(
        weights,
        gradients,
        averages,
        squares,
        [],
        # The update counts a step per tensor that it is given, so each view has a counter of its own.
        [step.clone() for step in steps],
        foreach=group["foreach"],
        capturable=group["capturable"],
        differentiable=False,
        fused=group["fused"],
        decoupled_weight_decay=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        maximize=False,
        **settings,
    )


def build(model: nn.Module, config: Config, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters of ``model``, which must not be partitioned yet.

    With ``optim.freeze_backbone`` all but ``model.get_classifier()`` is frozen first. Where ZeRO keeps the optimizer in
    host memory beside a CUDA device, it is DeepSpeed's vectorised AdamW, unless layers have rates of their own.

    Raises:
        UserError: nothing is left to train.
    """
    optim = config.optim
    if optim.freeze_backbone:
        freeze_backbone(model)
    groups = param_groups(model, optim.weight_decay)
    if not groups:
        raise UserError("optim.freeze_backbone=true, but the model has no head: nothing is left to train")
    offloaded = config.zero.offload.optimizer is not None
    if offloaded and device.type == "cuda" and optim.layer_decay == 1:
        return cpu_adam(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    fused = device.type == "cpu" or not offloaded
    return AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused or None)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups (fewer where one is empty: DeepSpeed would drop it): with weight decay, and without.

    Without are 1-D parameters (norms, biases, gains) and those that ``model.no_weight_decay()`` names.
    """
    no_weight_decay: Callable[[], set[str]] = getattr(model, "no_weight_decay", set)
    exempt = no_weight_decay()
    members: dict[str, list[nn.Parameter]] = {DECAY: [], NO_DECAY: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.dim() <= 1 or name.endswith(".bias") or name in exempt
            members[NO_DECAY if plain else DECAY].append(parameter)
    rates = {DECAY: weight_decay, NO_DECAY: 0.0}
    return [
        {"params": params, "weight_decay": rates[name], "name": name}
        for name, params in members.items()
        if params
    ]


def freeze_backbone(model: nn.Module) -> None:
    """Make the classifier alone trainable: a linear probe."""
    classifier: nn.Module = model.get_classifier()  # type: ignore[operator]
    head = {id(p) for p in classifier.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in head)


def layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """Factor of the learning rate by parameter name: ``layer_decay`` to the power of the layers between it and the head."""
    last = int(model.num_layers)  # type: ignore[arg-type]
    layer_of: Callable[[str], int] = model.layer_of  # type: ignore[assignment]
    return {name: layer_decay ** (last - layer_of(name)) for name, _ in model.named_parameters()}


def apply_layer_decay(optimizer: AdamW, local: LocalState, scales: Mapping[str, float]) -> None:
    """Tell ``optimizer`` where in this rank's partitions which factor holds. ``scales`` by parameter name."""
    runs: dict[Tensor, list[Run]] = {}
    trainable = {name: p for name, p in local.engine.module.named_parameters() if p.requires_grad}
    for fragment in local.fragments:
        if fragment.flat < 0:
            continue
        # Under stage 0 the optimizer steps the parameters themselves.
        tensor = trainable[fragment.name] if local.stage == 0 else local.masters[fragment.flat]
        runs.setdefault(tensor, []).append(Run(fragment.offset, fragment.numel, scales[fragment.name]))
    optimizer.set_scales(runs)


def _joined(runs: Sequence[Run]) -> list[Run]:
    """Neighbours of one factor as one run."""
    joined: list[Run] = []
    for run in runs:
        if joined and joined[-1].scale == run.scale and joined[-1].start + joined[-1].numel == run.start:
            joined[-1] = Run(joined[-1].start, joined[-1].numel + run.numel, run.scale)
        else:
            joined.append(run)
    return joined
