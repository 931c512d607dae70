"""The network as a whole: any size, drop path by noise, recomputation, initialisation, ablations, precision, bad settings."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dattrain.errors import UserError
from dattrain.models import VARIANTS, create, variant_of
from dattrain.models.dat import DAT
from dattrain.models.deformable import DeformableAttention, OffsetNetwork


def atto(img_size=64, **kwargs) -> DAT:
    torch.manual_seed(0)
    return create("dat_atto", num_classes=10, img_size=img_size, **kwargs)


def loud(model: DAT) -> DAT:
    """Large tables and offsets, so that a mistake in either shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias_table"):
                parameter.normal_(std=0.5)
            elif name.endswith("offset.proj.weight"):
                parameter.mul_(4)
    return model


def points(model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output of ``model`` and the positions of each deformable block."""
    found: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _m, _i, out: found.append(out.detach()))
        for module in model.modules()
        if isinstance(module, OffsetNetwork)
    ]
    out = model(images)
    for hook in hooks:
        hook.remove()
    return out, found


# Sizes


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 90), st.integers(1, 90))
def test_any_input_size(height, width):
    model = atto().eval()
    with torch.no_grad():
        features = model.forward_features(torch.randn(1, 3, height, width))
    assert features.shape == (1, -(-height // 32), -(-width // 32), 256)
    assert features.isfinite().all()


def test_padding_is_zeros_at_right_and_bottom_of_the_image():
    model, images = atto().eval(), torch.randn(1, 3, 62, 61)
    padded = torch.zeros(1, 3, 64, 64)
    padded[..., :62, :61] = images
    with torch.no_grad():
        assert torch.equal(model(images), model(padded))


@pytest.mark.parametrize(
    ("img_size", "expected"),
    [
        (224, [7, 7, 7, 7]),
        (256, [8, 8, 8, 8]),
        (384, [12, 12, 12, 12]),
        (512, [16, 16, 16, 16]),
        ((224, 384), [7, 7, 7, 7]),
    ],
)
def test_window_follows_the_image(img_size, expected):
    with torch.device("meta"):
        model = create("dat_tiny", num_classes=1, img_size=img_size)
    assert [window[0] for window in model.windows(model.img_size)] == expected
    height, width = model.map_sizes(model.img_size)[2]
    assert model.stages[2].blocks[1].attn.bias_table.shape == (12, 2 * height - 1, 2 * width - 1)


def test_window_can_be_kept_and_never_exceeds_the_map():
    with torch.device("meta"):
        model = create("dat_tiny", num_classes=1, img_size=384, window_size=7)
        small = create("dat_tiny", num_classes=1, img_size=64, window_size=7)
    assert model.windows(model.img_size) == [(7, 7)] * 4
    assert small.windows(small.img_size) == [(7, 7), (7, 7), (4, 4), (2, 2)]


# Drop path


def test_drop_path_is_a_function_of_the_noise():
    model = atto(drop_path_rate=0.5).train()
    images, noise = torch.randn(4, 3, 64, 64), torch.rand(4, model.num_drop_path)
    together = model(images, noise)
    alone = torch.cat([model(images[i : i + 1], noise[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, model(images, noise.flip(0)), atol=1e-3)


def test_drop_path_drops_and_rescales_the_named_branch():
    model = atto(drop_path_rate=0.5).train()
    images, block = torch.randn(1, 3, 64, 64), 3
    rates = model.drop_path_rates()
    assert rates.tolist() == pytest.approx([0, 0, 0.125, 0.125, 0.25, 0.25, 0.375, 0.375, 0.5, 0.5])
    noise = torch.ones(1, model.num_drop_path)
    noise[0, 2 * block] = rates[2 * block] - 1e-3
    seen: dict[str, Tensor] = {}
    module = model.stages[2].blocks[1]
    module.register_forward_pre_hook(lambda _m, args: seen.update(x=args[0]))
    module.norm2.register_forward_pre_hook(lambda _m, args: seen.update(after=args[0]))
    module.mlp.register_forward_hook(lambda _m, _i, out: seen.update(mlp=out))
    module.register_forward_hook(lambda _m, _i, out: seen.update(out=out))
    model(images, noise)
    assert torch.equal(seen["after"], seen["x"]), "the attention branch was dropped"
    torch.testing.assert_close(seen["out"], seen["after"] + seen["mlp"] / (1 - 0.375))


def test_drop_path_needs_fitting_noise_and_rests_outside_training():
    model = atto(drop_path_rate=0.5)
    images = torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match="drop_path_noise is"):
        model.train()(images, torch.rand(2, 3))
    model.eval()
    assert torch.equal(model(images, torch.zeros(2, model.num_drop_path)), model(images))


# Recomputation


def run(model: DAT, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, list[Tensor], int]:
    """Logits, gradients, and the bytes kept for the backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(images, noise)
    logits.square().sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters()], sum(kept.values())


@pytest.mark.parametrize("overrides", [{}, {"blocks": ("P", "S", "ND", "D")}, {"proj_drop_rate": 0.2}])
def test_recomputation_changes_nothing_but_memory(overrides):
    model = atto(drop_path_rate=0.2, **overrides).train()
    images, noise = torch.randn(4, 3, 64, 64), torch.rand(4, model.num_drop_path)

    def seeded() -> tuple[Tensor, list[Tensor], int]:
        torch.manual_seed(1)
        return run(model, images, noise)

    logits, gradients, kept = seeded()
    for mode in ("selective", "block", "stage"):
        model.set_grad_checkpointing(True, mode=mode)
        again, regained, fewer = seeded()
        assert torch.equal(again, logits), mode
        assert all(torch.equal(a, b) for a, b in zip(gradients, regained)), mode
        assert fewer < kept, f"{mode} keeps {fewer} bytes, less recomputation keeps {kept}"
        kept = fewer
    model.set_grad_checkpointing(False)
    assert seeded()[2] > kept
    with pytest.raises(UserError, match=r"mode='all' is not known; choose one of stage, block, selective"):
        model.set_grad_checkpointing(True, mode="all")


# Initialisation


def test_initialisation_by_name():
    paper, normal = atto(), atto(init="trunc_normal")
    for model, weight_std, bias in ((paper, (1 / 3 / 128) ** 0.5, True), (normal, 0.02, False)):
        linear = model.stages[2].blocks[1].attn.q
        assert float(linear.weight.detach().std()) == pytest.approx(weight_std, rel=0.05)
        assert bool(linear.bias.any()) == bias
        table = model.stages[2].blocks[1].attn.bias_table
        assert float(table.detach().std()) == pytest.approx(0.01, rel=0.25)
    _, moved = points(paper, torch.randn(1, 3, 64, 64))
    reference = paper.stages[2].blocks[1].attn.offset.reference(4, 4, torch.device("cpu"), torch.float32)
    assert float((moved[0][0, 0] - reference).abs().mean()) > 0.01, (
        "released models start from non-zero offsets"
    )
    with pytest.raises(UserError, match="init='xavier' is not known; choose one of paper, trunc_normal"):
        atto(init="xavier")


def test_weights_are_a_function_of_the_seed():
    first, second = atto(), atto()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


# Ablations

ABLATIONS = [
    {"offsets": False, "position": "none"},
    {"offsets": False},
    {"position": "none"},
    {"position": "fixed"},
    {"position": "dwconv"},
    {"blocks": ("P", "P", "LD", "D"), "sr_ratios": (4, 2, 1, 1)},
    {"blocks": ("D", "D", "LD", "D")},
    {"blocks": ("D", "D", "DD", "D"), "strides": (4, 4, 2, 1), "position": "fixed"},
    {"blocks": ("L", "S", "LS", "S"), "shift": "floor"},
    {"offset_range": "free", "reference": "corner"},
    {"offset_range": "tanh"},
    {"offset_range": "clamp", "reference": "shifted", "query_grid": "corner"},
    {"offsets": False, "strides": (1, 1, 2, 1)},
]


@pytest.mark.parametrize("overrides", ABLATIONS, ids=str)
def test_ablations_run_at_any_size_and_use_every_parameter(overrides):
    model = loud(atto(**overrides))
    images = torch.randn(2, 3, 64, 64)
    logits = model(images)
    logits.square().sum().backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    unused = {n for n in silent if ".offset." not in n} if overrides.get("offsets") is False else silent
    assert not unused
    with torch.no_grad():
        assert not torch.allclose(logits, loud(atto())(images), atol=1e-3)
        assert model(torch.randn(1, 3, 70, 51)).isfinite().all()


def test_without_offsets_keys_are_the_pixels():
    """The shortcut that skips sampling gives what sampling at the pixels gives."""
    model = loud(atto(offsets=False)).double().eval()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        quick = model(images)
        for module in model.modules():
            if isinstance(module, DeformableAttention):
                module.on_grid = lambda height, width: False
        torch.testing.assert_close(model(images), quick, rtol=1e-10, atol=1e-12)


# Precision

BOUNDS = {torch.bfloat16: (0.06, 0.025), torch.float16: (0.008, 0.003)}
"""Largest error of a position in pixels, and relative error of the logits, against fp32."""


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "pure"])
@pytest.mark.parametrize("img_size", [64, 96])
def test_positions_stay_fp32(dtype, autocast, img_size):
    model, images = loud(atto(img_size)).eval(), torch.randn(4, 3, img_size, img_size)
    exact, wide = points(model, images)
    if autocast:
        with torch.autocast("cpu", dtype):
            logits, narrow = points(model, images)
    else:
        model = copy.deepcopy(model).to(dtype)
        logits, narrow = points(model, images.to(dtype))
    pixels, relative = BOUNDS[dtype]
    for ours, theirs in zip(narrow, wide):
        assert ours.dtype == torch.float32
        assert not torch.equal(ours.to(dtype).float(), ours), "positions went through the narrow type"
        assert float((ours - theirs).abs().max()) * ours.shape[2] / 2 < pixels
    assert float((logits.detach().float() - exact.detach()).norm() / exact.detach().norm()) < relative
    logits.float().square().sum().backward()
    tables = [p.grad for n, p in model.named_parameters() if n.endswith("bias_table")]
    assert all(table.isfinite().all() and table.any() for table in tables)
    if autocast:
        assert all(table.dtype == torch.float32 for table in tables)


# Names


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_told_from_the_model(name):
    with torch.device("meta"):
        assert variant_of(create(name, num_classes=3, img_size=96, in_chans=1)) == name
        other = {"offset_range": "free"} if "pp" in name else {"position": "none"}
        assert variant_of(create(name, num_classes=3, img_size=96, **other)) is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"position": "sine"}, "position='sine' is not known; choose one of none, relative, fixed, dwconv"),
        ({"offset_range": 0}, "offset_range=0 must be a number above 0, 'free', 'tanh' or 'clamp'"),
        ({"blocks": ("L", "X", "LD", "D")}, r"blocks\[1\]='X' must be a string of the letters"),
        ({"heads": (2, 4, 8)}, r"heads=\[2, 4, 8\] has 3 entries, but blocks has 4 stages"),
        ({"heads": (3, 4, 8, 16)}, r"dims\[0\]=32 is not a multiple of heads\[0\]=3"),
        ({"groups": (1, 1, 3, 4)}, r"heads\[2\]=8 is not a multiple of groups\[2\]=3"),
        ({"strides": (1, 1, 0, 1)}, r"strides=\[1, 1, 0, 1\] must be positive integers"),
        ({"offset_kernels": (9, 7, 4, 3)}, r"offset_kernels\[2\]=4 must be odd"),
        ({"blocks": ("N", "S", "LD", "D"), "neighborhood": 6}, r"neighborhood\[0\]=6 must be odd"),
        ({"mlp_ratio": "4"}, "mlp_ratio='4' must be a number above 0"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1.0 must be a number in \[0, 1\)"),
        ({"img_size": (64, 0)}, "must be a positive side"),
        ({"img_size": 64.0}, "img_size=64.0 must be a positive side"),
        (
            {"widow_size": 7},
            r"model.overrides.widow_size is not an argument of dat_atto \(did you mean 'window_size'\?\)",
        ),
    ],
)
def test_settings_that_cannot_be_used(overrides, message):
    with pytest.raises(UserError, match=message):
        create("dat_atto", **{"num_classes": 10, "img_size": 64, **overrides})


def test_settings_as_a_recipe_states_them():
    """YAML has lists and integers where Python has tuples and floats."""
    stated = {
        "blocks": ["L", "S", "LD", "D"],
        "groups": [1, 1, 2, 4],
        "offset_range": 2,
        "window_size": [4, 4, 4, 2],
    }
    given, usual = atto(**stated), atto()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(given.eval()(images), usual.eval()(images))
    assert variant_of(given) == "dat_atto"


def test_unknown_model():
    with pytest.raises(UserError, match=r"model 'dat_tinny' is not known \(did you mean 'dat_tiny'\?\)"):
        create("dat_tinny", num_classes=10, img_size=64)
