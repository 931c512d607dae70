"""DAT++ against the authors' code: a small model's numbers, and the names, shapes and order of the released files.

Sources in tests/assets/models: ``dat_pp_small.npz`` was computed in float64 with the authors' DAT++ code (LeapLabTHU/DAT, commit
32173fc), its neighbourhood attention naively with NATTEN's border rule; ``keys_dat_p*.txt`` list the entries of the state
dicts of that code's models.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from host_waits import fake_cuda, faked

from dattrain.errors import UserError
from dattrain.models import create, flops, zoo
from dattrain.models.authors import convert
from dattrain.models.deformable import OffsetNetwork

ASSETS = Path(__file__).parents[2] / "assets/models"
VARIANTS = ("tiny", "small", "base")


@pytest.fixture(scope="module")
def vector():
    with np.load(ASSETS / "dat_pp_small.npz", allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def state_of(vector):
    return {
        name.removeprefix("state/"): torch.from_numpy(value).double()
        for name, value in vector.items()
        if name.startswith("state/")
    }


def keys_of(name):
    lines = (ASSETS / f"keys_{name}.txt").read_text().splitlines()
    rows = [line.split("\t") for line in lines]
    return {key: tuple(int(n) for n in shape.strip("(),").split(",") if n.strip()) for key, shape, _ in rows}


def relative(ours, theirs):
    theirs = torch.from_numpy(theirs)
    return float((ours.detach().reshape(theirs.shape) - theirs).abs().max() / theirs.abs().max())


def test_logits_and_every_gradient_are_the_authors(vector):
    state = state_of(vector)
    model = convert.from_authors(state, json.loads(str(vector["config"])))
    image = torch.from_numpy(vector["input"]).double().requires_grad_()
    logits = model(image)
    assert relative(logits, vector["logits"]) < 1e-9
    (logits * torch.from_numpy(vector["cotangent"])).sum().backward()
    assert relative(image.grad, vector["grad_input"]) < 1e-9
    # Our gradients under their names: export of a model that holds gradients as weights.
    gradients = convert.from_authors(state, json.loads(str(vector["config"])))
    for name, parameter in model.named_parameters():
        gradients.get_parameter(name).data = parameter.grad
    ours = convert.to_authors(gradients)
    theirs = {n.removeprefix("grad/"): v for n, v in vector.items() if n.startswith("grad/")}
    assert len(theirs) == 33
    for name, gradient in theirs.items():
        assert relative(ours[name], gradient) < 1e-9, name


def test_positions_are_clamped_reference_plus_offset(vector):
    model = convert.from_authors(state_of(vector), json.loads(str(vector["config"])))
    seen = []
    for module in model.modules():
        if isinstance(module, OffsetNetwork):
            module.register_forward_hook(lambda _, args, out: seen.append((args[0].shape[1], out)))
    model(torch.from_numpy(vector["input"]).double())
    assert [(size, tuple(p.shape[1:])) for size, p in seen] == [
        (16, (1, 2, 2, 2)),
        (8, (2, 2, 2, 2)),
        (4, (2, 2, 2, 2)),
        (2, (4, 2, 2, 2)),
        (2, (4, 2, 2, 2)),
    ]
    assert all(p.abs().max() <= 1 for _, p in seen)
    assert any((p.abs() == 1).any() for _, p in seen), "offsets of this vector reach the border"


def test_the_round_trip_through_our_names_is_the_identity(vector):
    state = state_of(vector)
    back = convert.to_authors(convert.from_authors(state, json.loads(str(vector["config"]))))
    assert list(back) == list(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("size", VARIANTS)
def test_released_files_are_recognised_by_their_keys(size):
    keys = keys_of(f"dat_pp_{size}")
    state = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    model = convert.from_authors(state)
    assert zoo.variant_of(model) == f"dat_pp_{size}"
    with torch.device("meta"):
        ours = create(f"dat_pp_{size}", num_classes=1000, img_size=224)
    for setting in (
        "strides",
        "offset_kernels",
        "neighborhood",
        "conventions",
        "stem",
        "mlp",
        "local_perception",
    ):
        assert getattr(model, setting) == getattr(ours, setting), setting
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in ours.named_parameters()
    }


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 23.963), ("small", 53.127), ("base", 93.691), ("large", 209.216)]
)
def test_parameters_of_the_variants(size, millions):
    with torch.device("meta"):
        model = create(f"dat_pp_{size}", num_classes=1000, img_size=224)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


FLOPS = {
    ("tiny", 224): 4.288, ("small", 224): 9.426, ("base", 224): 16.559, ("large", 224): 36.815,
    ("tiny", 384): 13.135, ("small", 384): 28.502, ("base", 384): 49.734, ("large", 384): 109.796,
}  # fmt: skip


PAPER = (("tiny", 224), ("small", 224), ("base", 224), ("base", 384))
"""Whose FLOPs it states: 4.3, 9.4, 16.6 and 49.7."""


@pytest.mark.parametrize(
    ("size", "img_size", "giga"),
    [pytest.param(*key, n, marks=[] if key in PAPER else pytest.mark.full) for key, n in FLOPS.items()],
)
def test_flops_of_the_variants(size, img_size, giga):
    with torch.device("meta"):
        model = create(f"dat_pp_{size}", num_classes=1000, img_size=224)
    assert round(flops.flops(model, img_size) / 1e9, 3) == giga


def test_the_intermediate_model_without_convolutions_is_recognised():
    keys = keys_of("dat_p")
    state = {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    model = convert.from_authors(state)
    assert (model.stem, model.mlp, model.local_perception) == ("patch", "linear", False)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == 22.773
    assert list(convert.to_authors(model.to_empty(device="cpu"))) == list(keys)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("log_cpb", [True] * 4), ("layer_scale_values", [1e-5] * 4), ("use_lpus", [True, False, True, True])],
)
def test_settings_that_are_not_built_are_named(vector, setting, value):
    config = {**json.loads(str(vector["config"])), setting: value}
    with pytest.raises(UserError, match=setting):
        convert.from_authors(state_of(vector), config)


@pytest.mark.parametrize("size", [(96, 64), (70, 101), (32, 32)])
def test_any_input_size_runs_forward_and_backward(size):
    model = create("dat_pp_tiny", num_classes=7, img_size=64)
    out = model(torch.randn(1, 3, *size))
    out.sum().backward()
    assert out.shape == (1, 7) and out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"neighborhood": 4}, "odd"),
        ({"patch_size": 8}, "patch_size"),
        ({"stem": "convolution"}, "stem"),
        ({"neighborhood": (7, 7)}, "neighborhood"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        create("dat_pp_tiny", num_classes=7, img_size=64, **arguments)


def test_a_forward_pass_never_waits_for_the_device(vector):
    model = convert.from_authors(state_of(vector), json.loads(str(vector["config"])))
    images = vector["input"].shape
    with fake_cuda() as waits:
        faked(model)(torch.empty(*images, dtype=torch.float64, device="cuda"))
    assert not waits.found, waits.report()
