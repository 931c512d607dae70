"""One rank of the tests of what happens on the way: each scenario is a function, run on every rank, that writes what it saw."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dattrain.config.load import load
from dattrain.engine import optim, zero
from dattrain.engine.train import train
from dattrain.engine.trainer import Trainer
from dattrain.errors import UserError
from dattrain.runtime import environment
from dattrain.state.partition import LocalState, read

RUN: list[Path] = []


@contextmanager
def disturbed(at: dict[int, str]) -> Iterator[None]:
    """At the 1-based update of ``at``: ``nan`` (images of the last rank), ``USR2`` (to the last rank), ``stop`` (the file)."""
    plain = Trainer.update

    def update(self):
        what = at.get(self.step + 1)
        disturbed_here = dist.get_rank() == dist.get_world_size() - 1
        if what == "USR2" and disturbed_here:
            os.kill(os.getpid(), signal.SIGUSR2)
        if what == "stop" and disturbed_here:
            (RUN[0] / "stop").touch()
        train_step = self.session.train_step
        forward = train_step.forward
        if what == "nan" and disturbed_here:

            def broken(batch):
                loss = forward(batch)
                nan = float("nan")
                return replace(loss, value=loss.value * nan, total=loss.total * nan)

            train_step.forward = broken
        try:
            return plain(self)
        finally:
            train_step.forward = forward

    Trainer.update = update
    try:
        yield
    finally:
        Trainer.update = plain


def attempt(
    recipe: str, run: str, overrides: list[str], at: dict[str, str] | None = None
) -> dict[str, object]:
    """Train once; what became of it."""
    RUN[:] = [Path(run)]
    try:
        with disturbed({int(k): v for k, v in (at or {}).items()}):
            outcome = train(load(recipe, overrides).config, Path(run))
    except UserError as error:
        return {"error": str(error)}
    handlers = [signal.getsignal(s) is signal.SIG_DFL for s in (signal.SIGTERM, signal.SIGUSR2)]
    return {
        "status": outcome.status,
        "step": outcome.step,
        "code": outcome.exit_code,
        "restored": all(handlers),
    }


class Toy(nn.Module):
    """Three layers whose gradients are known: the loss is a fixed linear function of the parameters."""

    num_layers = 2

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(7, 9 + i) for i in range(3))

    def layer_of(self, name: str) -> int:
        return int(name.split(".")[1])

    def forward(self, step: torch.Tensor) -> torch.Tensor:
        return sum(layer(step.expand(1, 7)).sum() for layer in self.layers)


def layer_decay(folder: str) -> dict[str, object]:
    """Partitioned by runs, under every stage, against AdamW of whole parameters with a group per layer and kind."""
    found: dict[str, object] = {}
    device = torch.device("cpu")
    factor, rates, decay = 0.7, [1e-2, 5e-3, 2e-3], 0.05
    xs = [torch.tensor([0.5]), torch.tensor([-2.0]), torch.tensor([0.25])]
    reference = Toy()
    groups = [
        {
            "params": [p],
            "weight_decay": decay if p.dim() > 1 else 0.0,
            "scale": factor ** (2 - reference.layer_of(n)),
        }
        for n, p in reference.named_parameters()
    ]
    plain = optim.AdamW(groups, lr=1.0, fused=True)
    for x, lr in zip(xs, rates):
        for group in plain.param_groups:
            group["lr"] = lr * group["scale"]
        plain.zero_grad()
        reference(x).backward()
        plain.step()
    expected = {n: p.detach() for n, p in reference.named_parameters()}
    recipe = load(
        f"{folder}/recipe.yaml", ["train.precision=fp32", "optim.clip=0", f"optim.weight_decay={decay}"]
    ).config
    for stage in range(4):
        config = recipe.model_copy(update={"zero": recipe.zero.model_copy(update={"stage": stage})})
        model = Toy()
        optimizer = optim.build(model, config, device)
        settings = {
            **zero.ds_config(config, _Derived, device="cpu"),
            "train_batch_size": dist.get_world_size(),
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
        }
        scales = optim.layer_scales(model, factor)
        engine = zero.initialize(model, optimizer, settings, device)
        groups_made = len(optimizer.param_groups)
        optim.apply_layer_decay(optimizer, LocalState(engine), scales)
        for x, lr in zip(xs, rates):
            for group in engine.basic_optimizer.param_groups:
                group["lr"] = lr
            engine.backward(engine(x))
            engine.step()
        local = LocalState(engine)
        equal, elements = True, 0
        for fragment in local.fragments:
            own = read(local.tensor(fragment, "param"), fragment.offset, fragment.numel)
            theirs = expected[fragment.name].reshape(-1)[fragment.start : fragment.start + fragment.numel]
            equal &= torch.equal(own, theirs)
            elements += fragment.numel
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (equal, elements))
        found[str(stage)] = {
            "equal": all(e for e, _ in gathered),
            "elements": sum(n for _, n in gathered),
            "groups": groups_made,
        }
        engine.destroy()
    return found


class _Derived:
    accumulation = 1
    micro_batch = 1


def main(plan: Path) -> None:
    """Run every entry of the plan, ``[name, function, arguments]``; rank 0 writes ``name.json`` beside it."""
    env = environment.resolve(os.environ)
    environment.connect(env, environment.pick_device(env), 120)
    for name, function, arguments in json.loads(plan.read_text()):
        result = {"attempt": attempt, "layer_decay": layer_decay}[function](*arguments)
        (plan.parent / f"{name}.{env.rank}.json").write_text(json.dumps(result))
    environment.disconnect()
    environment.hard_exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
