"""Backbones of dense prediction: layout, maps, output norms, drop path as a function of the sample, recomputation."""

from __future__ import annotations

from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F

from dattrain.errors import UserError
from dattrain.models.dense import create_backbone

SWIN, PVT = "swin_tiny_patch4_window7_224", "pvt_v2_b0"
# Small ones of each kind; depths of timm's are overridden for speed.
SMALL = {
    "dat_atto": {"img_size": 64},
    "dat_pp_tiny": {
        "img_size": 64,
        "blocks": ("N", "ND", "D", "D"),
        "dims": (16, 32, 64, 128),
        "heads": (1, 2, 4, 8),
    },
    SWIN: {"embed_dim": 24, "depths": (1, 1, 2, 2)},
    PVT: {"depths": (1, 1, 1, 2)},
}


def small(name: str, **more):
    torch.manual_seed(0)
    return create_backbone(name, **{**SMALL[name], **more})


def images(batch: int = 2, size: tuple[int, int] = (64, 96)) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def test_layout_is_that_of_pretraining_at_any_size():
    with torch.device("meta"):
        backbone = create_backbone("dat_tiny")
        maps = backbone(torch.empty(1, 3, 800, 1280))
    shapes = {name: tuple(value.shape) for name, value in backbone.named_parameters() if "bias_table" in name}
    assert shapes["body.stages.0.blocks.0.attn.bias_table"][1:] == (13, 13)  # windows of 7
    assert shapes["body.stages.2.blocks.1.attn.bias_table"][1:] == (27, 27)
    assert [tuple(each.shape) for each in maps] == [
        (1, dim, 800 // stride, 1280 // stride) for dim, stride in zip(backbone.channels, backbone.strides)
    ]
    assert backbone.channels == (96, 192, 384, 768)
    assert not [
        name for name, _ in backbone.named_parameters() if "head" in name or name.startswith("body.norm")
    ]


@pytest.mark.parametrize("name", SMALL)
def test_sides_are_rounded_up(name):
    maps = small(name).eval()(images(1, (97, 130)))
    assert [tuple(each.shape[2:]) for each in maps] == [(25, 33), (13, 17), (7, 9), (4, 5)]


def test_norms_are_on_used_outputs_alone_and_the_next_stage_does_not_see_them():
    backbone = small("dat_atto", outs=(1, 2, 3)).eval()
    assert backbone.channels == (64, 128, 256)
    assert not list(backbone.norms[0].parameters())
    assert [norm.eps for norm in backbone.norms[1:]] == [1e-5] * 3
    for norm in backbone.norms[1:]:
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    bare = backbone.body.forward_intermediates(images(), intermediates_only=True, output_fmt="NHWC")
    for found, stage in zip(backbone(images()), (1, 2, 3)):
        norm = backbone.norms[stage]
        expected = F.layer_norm(bare[stage], norm.weight.shape, norm.weight, norm.bias)
        torch.testing.assert_close(found, expected.permute(0, 3, 1, 2))
    for outs in ((), (0, 1), (3, 1), (1, 4), (0, 0, 3)):
        with pytest.raises(ValueError, match="outs="):
            small("dat_atto", outs=outs)


def test_maps_of_timm_networks_are_timm_s():
    swin = small(SWIN).eval()
    theirs = timm.create_model(SWIN, features_only=True, strict_img_size=False, **SMALL[SWIN]).eval()
    theirs.load_state_dict(
        {name.replace("layers.", "layers_"): value for name, value in swin.body.state_dict().items()}
    )
    swin.norms = torch.nn.ModuleList(torch.nn.Identity() for _ in range(4))
    x = images(size=(224, 224))  # elsewhere timm shifts before it pads, see below
    for ours, expected in zip(swin(x)[:3], theirs(x)[:3]):
        torch.testing.assert_close(ours, expected.permute(0, 3, 1, 2))
    # At 224 timm's last stage is one window and does not shift; the authors' dense code does at every size.
    assert [block.shift_size for block in swin.body.layers[3].blocks] == [(0, 0), (3, 3)]
    assert {block.window_size for layer in swin.body.layers for block in layer.blocks} == {(7, 7)}
    other = create_backbone(SWIN, img_size=64, **SMALL[SWIN])
    assert {block.window_size for layer in other.body.layers for block in layer.blocks} == {(7, 7)}

    pvt = small(PVT).eval()
    theirs = timm.create_model(PVT, features_only=True, **SMALL[PVT]).eval()
    theirs.load_state_dict(
        {name.replace("stages.", "stages_"): value for name, value in pvt.body.state_dict().items()}
    )
    for ours, expected in zip(pvt(x), theirs(x)):
        torch.testing.assert_close(ours, expected)
    assert not list(pvt.norms.parameters())  # its stages end in their own


@pytest.mark.parametrize("name", SMALL)
def test_drop_path_is_what_the_noise_says(name):
    """Each branch scaled by 0 or 1 / (1 - rate): the same as with the scale in the branch's last weights."""
    backbone = small(name, drop_path_rate=0.6)
    noise = torch.rand(2, backbone.num_drop_path, generator=torch.Generator().manual_seed(2))
    rates = torch.linspace(0, 0.6, backbone.num_drop_path // 2).repeat_interleave(2)
    x = images()
    found = backbone.train()(x, noise)
    plain = backbone.eval()(x, noise)
    assert all(not torch.equal(a, b) for a, b in zip(found[1:], plain[1:]))
    for sample in range(2):
        folded = deepcopy(backbone)
        stages = folded.body.layers if name == SWIN else folded.body.stages
        blocks = [block for stage in stages for block in stage.blocks]
        for index, block in enumerate(blocks):
            for branch, last in enumerate((block.attn.proj, block.mlp.fc2)):
                column = 2 * index + branch
                dropped = noise[sample, column] < rates[column]
                with torch.no_grad():
                    for parameter in last.parameters():
                        parameter.mul_(0 if dropped else 1 / (1 - rates[column]))
        for got, expected in zip(found, folded(x[sample : sample + 1])):
            torch.testing.assert_close(got[sample : sample + 1], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="drop_path_noise"):
        backbone.train()(x, noise[:, 1:])
    drawn = backbone(x)
    assert any(not torch.equal(a, b) for a, b in zip(drawn, backbone(x)))


@pytest.mark.parametrize("mode", ["stage", "block", "selective"])
@pytest.mark.parametrize("name", SMALL)
def test_recomputed_gradients_are_the_same(name, mode):
    if mode == "selective" and name in (SWIN, PVT):
        with pytest.raises(UserError, match="selective is for DAT's blocks; choose block or stage for"):
            small(name).set_grad_checkpointing(True, mode=mode)
        return
    backbone = small(name, drop_path_rate=0.6).train()
    noise = torch.rand(2, 2, backbone.num_drop_path, generator=torch.Generator().manual_seed(2))

    def gradients():
        backbone.zero_grad()
        # Two forwards before one backward: a recomputed block must not take the later one's noise.
        loss = sum(each.square().mean() for draw in noise for each in backbone(images(), draw))
        loss.backward()
        return {name: parameter.grad.clone() for name, parameter in backbone.named_parameters()}

    stored = gradients()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda each: saved.append(each.numel()) or each, lambda each: each
    ):
        backbone(images(), noise[0])
        everything = sum(saved)
        saved.clear()
        backbone.set_grad_checkpointing(True, mode=mode)
        backbone(images(), noise[0])
        assert sum(saved) < 0.7 * everything
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, stored[name], msg=name)


def test_features_of_timm_take_the_noise():
    torch.manual_seed(0)
    features = timm.create_model(
        "dat_atto", features_only=True, drop_path_rate=0.5, out_indices=(1, 3)
    ).train()
    noise = torch.rand(2, features.model.num_drop_path)
    once, again = features(images(), noise), features(images(), noise)
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    direct = features.model.forward_intermediates(
        images(), indices=[1, 3], intermediates_only=True, drop_path_noise=noise
    )
    assert all(torch.equal(a, b) for a, b in zip(once, direct))
    assert not torch.equal(once[1], features(images(), torch.rand_like(noise))[1])


@pytest.mark.parametrize("name", SMALL)
def test_layers_of_parameters(name):
    backbone = small(name)
    layers = {each: backbone.layer_of(each) for each, _ in backbone.named_parameters()}
    assert set(layers.values()) >= set(range(backbone.num_layers))
    assert {layer for each, layer in layers.items() if each.startswith("body.patch_embed")} == {0}
    assert all(layer == backbone.num_layers for each, layer in layers.items() if each.startswith("norms."))
    last = "body.layers.3.blocks.1.mlp.fc2.bias" if name == SWIN else "body.stages.3.blocks.0.mlp.fc2.bias"
    assert layers[last] == backbone.num_layers - 1 - (name == PVT)
    assert backbone.no_weight_decay() == {each for each in layers if "bias_table" in each}
    with pytest.raises(ValueError, match="is not a parameter"):
        backbone.layer_of("head.weight")


def test_stage_norm_of_pvt_is_of_its_last_block():
    backbone = small(PVT)
    assert backbone.layer_of("body.stages.0.norm.weight") == 1
    assert backbone.layer_of("body.stages.1.downsample.proj.weight") == 2


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("resnet50", {}, "model.name='resnet50' is no backbone for dense prediction; there are dat_tiny"),
        ("swinv2_tiny_window8_256", {}, "no backbone for dense prediction"),
        ("dat_tinny", {}, "did you mean 'dat_tiny'"),
        ("swin_tiny_patch4_window7", {}, "did you mean 'swin_tiny_patch4_window7_224'"),
        (SWIN, {"dephts": 2}, "model.overrides.dephts is not an argument of timm's swin_tiny"),
        ("dat_tiny", {"blokcs": 2}, "model.overrides.blokcs is not an argument of dat_tiny"),
    ],
)
def test_what_is_no_backbone_is_said(name, overrides, message):
    with pytest.raises(UserError, match=message):
        create_backbone(name, **overrides)


@pytest.mark.parametrize("side", (14, 16))
def test_opposite_edges_of_swins_map_do_not_see_each_other(side):
    """Whether windows of 7 divide the map or not: it is padded before the shift, and what the shift brings together is masked."""
    block = small(SWIN).eval().body.layers[3].blocks[1]
    assert block.shift_size == (3, 3)
    x = torch.randn(1, side, side, block.norm1.normalized_shape[0])
    changed = x.clone()
    changed[:, -1] += 1.0
    with torch.no_grad():
        differs = (block(x) != block(changed)).flatten(2).any(2)[0]
    assert differs[-1] and not differs[:7].any()
