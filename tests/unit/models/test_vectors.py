"""The authors' CVPR code in float64: a small model's logits, sampling positions and gradients (tests/assets/models)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dattrain.models.authors import convert, names
from dattrain.models.dat import DAT

ASSET = Path(__file__).parents[2] / "assets/models/dat_cvpr_small.npz"


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    with np.load(ASSET) as file:
        return dict(file)


def tensors(vectors: dict[str, np.ndarray], kind: str) -> dict[str, Tensor]:
    return {
        name[len(kind) + 1 :]: torch.from_numpy(a)
        for name, a in vectors.items()
        if name.startswith(f"{kind}/")
    }


@pytest.fixture(scope="module", params=["config", "keys"])
def run(request, vectors) -> tuple[DAT, dict[str, Tensor], Tensor, Tensor]:
    """Model, positions by module name, logits and input after a backward pass."""
    config = json.loads(str(vectors["config"])) if request.param == "config" else None
    model = convert.from_authors(tensors(vectors, "state"), config).double()
    positions: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("attn.offset"):
            module.register_forward_hook(
                lambda _m, _i, out, name=name: positions.__setitem__(name, out.detach())
            )
    images = torch.from_numpy(vectors["input"]).double().requires_grad_()
    logits = model(images)
    (logits * torch.from_numpy(vectors["cotangent"])).sum().backward()
    return model, positions, logits.detach(), images


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_logits_positions_and_input_gradient(run, vectors):
    _, positions, logits, images = run
    assert relative(logits, torch.from_numpy(vectors["logits"])) < 1e-9
    theirs = tensors(vectors, "positions")
    assert len(theirs) == len(positions) == 3
    for name, points in theirs.items():
        stage, block = (part.lstrip("stageblock") for part in name.split("/"))
        assert relative(positions[f"stages.{stage}.blocks.{block}.attn.offset"], points) < 1e-9, name
    assert relative(images.grad, torch.from_numpy(vectors["grad_input"])) < 1e-9


def test_every_gradient(run, vectors):
    model, *_ = run
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    theirs = {}
    for link in names.links(model, "", ""):
        if link.ours is not None:
            theirs.update(zip(link.theirs, link.write(ours[link.ours])))
    expected = tensors(vectors, "grad")
    assert len(expected) > 25
    for name, gradient in expected.items():
        assert relative(theirs[name], gradient) < 1e-9, name


def test_round_trip_is_the_identity(vectors):
    state = tensors(vectors, "state")
    back = convert.to_authors(convert.from_authors(state))
    assert list(back) == list(state)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor), name
        assert back[name].dtype == tensor.dtype, name
