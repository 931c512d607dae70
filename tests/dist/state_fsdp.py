"""One rank of test_state_fsdp: an FSDP 2 model takes what we exported, makes an update, and is saved by torch."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from dattrain.engine.optim import param_groups
from dattrain.models import zoo
from dattrain.runtime import environment


def gradients(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The same on every rank and in the test: a gradient of each parameter, whole."""
    g = torch.Generator().manual_seed(9)
    return {n: torch.randn(p.shape, generator=g) for n, p in net.named_parameters()}


def main(exported: Path, nested: Path, flat: Path) -> None:
    """Load ``exported``; save in both forms of get_state_dict, the second one in the background."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(1)
    net = zoo.create("dat_atto", num_classes=7, img_size=64)
    for stage in net.stages:
        fully_shard(stage, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(param_groups(net, 0.05), lr=0.1)
    model, states = get_state_dict(net, optimizer)
    wanted = {"model": model, "optimizer": states}
    dcp.load(wanted, checkpoint_id=exported)
    set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=wanted["optimizer"])
    for (_, p), g in zip(net.named_parameters(), gradients(net).values()):
        p.grad = distribute_tensor(g, mesh, p.placements)
    optimizer.step()
    train_state = {"step": torch.tensor(3, dtype=torch.int32)}
    model, states = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": states, "train_state": train_state}, checkpoint_id=nested)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, states = get_state_dict(net, optimizer, options=options)
    top = {**model, "optimizer": states, "train_state": train_state}
    dcp.async_save(top, checkpoint_id=flat).result()
    dist.barrier()


if __name__ == "__main__":
    code = 0
    try:
        main(*map(Path, sys.argv[1:]))
    except BaseException:
        traceback.print_exc()
        code = 1
    environment.hard_exit(code) if code == 0 else os._exit(code)
