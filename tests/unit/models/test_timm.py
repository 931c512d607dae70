"""What timm asks of every model (after its own generic tests).

Variants run narrowed (8 channels a head), and where only depths and widths differ, one of each kind stands for all;
`make test-full` runs all of them, at full width too.
"""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import create_feature_extractor
from timm.models._input import get_model_args
from timm.models._manipulate import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from dattrain.errors import UserError
from dattrain.models import VARIANTS, create

SIZE = 64


def narrow(name: str) -> tuple[int, ...]:
    return tuple(8 * heads for heads in VARIANTS[name]["heads"])


def build(name: str, full: bool, **kwargs) -> nn.Module:
    if not full:
        kwargs["dims"] = narrow(name)
    return timm.create_model(name, pretrained=False, **{"num_classes": 10, "img_size": SIZE, **kwargs})


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.full)], ids=["narrow", "full"])
def full(request) -> bool:
    return request.param


KINDS = ("dat_atto", "dat_tiny", "dat_pp_tiny")


@pytest.fixture(params=[pytest.param(v, marks=[] if v in KINDS else pytest.mark.full) for v in VARIANTS])
def name(request) -> str:
    torch.manual_seed(0)
    return request.param


@pytest.fixture(params=list(VARIANTS))
def every(request) -> str:
    torch.manual_seed(0)
    return request.param


def test_forward_and_backward(every, full):
    model = build(every, full, drop_path_rate=0.1).train()
    images = torch.randn(2, 3, SIZE, SIZE)
    logits = model(images)
    logits.mean().backward()
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_a_sample_does_not_depend_on_its_batch(name, full):
    model, images = build(name, full).eval(), torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)


def test_default_configuration(every, full):
    model = build(every, full)
    config = model.default_cfg
    modules, state = dict(model.named_modules()), model.state_dict()
    assert config["classifier"] in modules and f"{config['classifier']}.weight" in state
    assert f"{config['first_conv']}.weight" in state
    side, pool = config["input_size"][-1], config["pool_size"]
    assert model.map_sizes((side, side))[-1] == pool
    assert model.get_classifier() is modules[config["classifier"]]


def test_head_in_parts(name, full):
    model, images = build(name, full).eval(), torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        features = model.forward_features(images)
        assert features.shape == (2, 2, 2, model.num_features)
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
        assert torch.equal(model.forward_head(features), model(images))
        model.reset_classifier(0)
        torch.testing.assert_close(model(images), features.mean((1, 2)))
        model.reset_classifier(0, "")
        assert torch.equal(model(images), features)
        model.reset_classifier(7, "catavgmax")
        for wide in (build(name, full, global_pool="catavgmax").eval(), model):
            assert wide.forward_head(features, pre_logits=True).shape == (2, wide.head_hidden_size)
        model.reset_classifier(7, "avg")
        assert model(images).shape == (2, 7)
        assert model.num_classes == 7


def test_intermediates(name, full):
    model, images = build(name, full).eval(), torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        final, maps = model.forward_intermediates(images)
        assert torch.equal(final, model.forward_features(images))
        expected = [
            (2, i["num_chs"], SIZE // i["reduction"], SIZE // i["reduction"]) for i in model.feature_info
        ]
        assert [tuple(each.shape) for each in maps] == expected
        last = model.forward_intermediates(
            images, indices=1, norm=True, output_fmt="NHWC", intermediates_only=True
        )
        assert torch.equal(last[0], final)
        early = model.forward_intermediates(images, indices=[1], stop_early=True, intermediates_only=True)
        assert torch.equal(early[0], maps[1])


def test_features_by_a_list_of_modules_are_those_of_the_model(name, full):
    model, images = (
        build(name, full, features_only=True, out_indices=(1, 2)).eval(),
        torch.randn(1, 3, SIZE, SIZE),
    )
    chained = build(name, full, features_only=True, out_indices=(1, 2), feature_cls="list").eval()
    chained.load_state_dict(
        {key.replace("stages.", "stages_"): value for key, value in model.model.state_dict().items()},
        strict=False,
    )
    with torch.no_grad():
        for found, wanted in zip(chained(images), model(images)):
            assert torch.equal(found.permute(0, 3, 1, 2), wanted)  # each in the model's own layout


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (1, 2)])
def test_features_only(name, full, out_indices):
    model = build(name, full, features_only=True, out_indices=out_indices).eval()
    with torch.no_grad():
        maps = model(torch.randn(2, 3, SIZE, SIZE))
    assert [each.shape[1] for each in maps] == model.feature_info.channels()
    assert [SIZE // each.shape[-1] for each in maps] == model.feature_info.reduction()
    assert len(maps) == len(out_indices)
    stages = {name.split(".")[2] for name, _ in model.named_parameters() if name.startswith("model.stages.")}
    assert len(stages) == out_indices[-1] + 1, "stages after the last feature are pruned"


def test_weight_decay_groups(name, full):
    model = build(name, full)
    spared = model.no_weight_decay()
    assert spared <= dict(model.named_parameters()).keys()
    assert {n for n, p in model.named_parameters() if n.endswith("bias_table")} <= spared
    decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=spared)[1]["params"]
    ids = {id(parameter) for parameter in decayed}
    for parameter_name, parameter in model.named_parameters():
        wanted = parameter.ndim > 1 and not parameter_name.endswith("bias_table")
        assert (id(parameter) in ids) == wanted, parameter_name


@pytest.mark.parametrize("coarse", [False, True])
def test_every_parameter_has_a_layer(name, full, coarse):
    model = build(name, full)
    layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert layers.keys() == dict(model.named_parameters()).keys()
    if coarse:
        assert max(layers.values()) == len(model.stages) + 1
        return
    assert sum(len(g["params"]) for g in param_groups_layer_decay(model, layer_decay=0.75)) == len(layers)


def test_layer_of_counts_from_stem_to_head(every, full):
    model = build(every, full)
    layers = {n: model.layer_of(n) for n, _ in model.named_parameters()}
    assert set(layers.values()) == set(range(model.num_layers + 1))
    assert layers == group_parameters(model, model.group_matcher(), reverse=True), "timm's layers"
    assert model.layer_of("head.fc.weight") == model.num_layers == model.layer_of("norm.weight") + 1
    assert list(layers.values()) == sorted(layers.values()), "parameters are registered in the order of depth"
    with pytest.raises(ValueError, match="is not a parameter"):
        model.layer_of("neck.weight")


def test_state_dict_round_trip(name, full):
    model, other = build(name, full).eval(), build(name, full).eval()
    images = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        assert not torch.equal(model(images), other(images))
        other.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(model(images), other(images))
    assert model.state_dict().keys() == dict(model.named_parameters()).keys(), "no buffers in checkpoints"


def test_gradient_checkpointing(name, full):
    model, images = build(name, full).train(), torch.randn(2, 3, SIZE, SIZE)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_registered():
    assert set(VARIANTS) <= set(timm.list_models("dat_*"))
    assert timm.list_models("dat_*", pretrained=True) == []


def test_set_input_size(name, full):
    model = build(name, full).eval()
    model.set_input_size(96)
    fresh = build(name, full, img_size=96)
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in fresh.named_parameters()
    }
    with torch.no_grad():
        assert model(torch.randn(1, 3, 96, 96)).shape == (1, 10)
    model.set_input_size((64, 128))
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 128)).isfinite().all()


def test_the_arguments_of_timms_swin():
    """Windows and images that are no squares, sizes that are strict, and what ``set_input_size`` takes; refused where it cannot be."""
    model = build("dat_tiny", False, img_size=(128, 192), window_size=(2, 3), strict_img_size=True).eval()
    assert model.windows(model.img_size) == [(2, 3)] * 4
    with torch.no_grad():
        first = model(torch.randn(1, 3, 128, 192))
    assert first.isfinite().all()
    with pytest.raises(
        ValueError, match=r"images of \(128, 192\) alone \(strict_img_size=True\), got \(192, 128\)"
    ):
        model(torch.randn(1, 3, 192, 128))
    assert build("dat_tiny", False, window_size=[[2, 3], 2, (1, 2), 1]).window_size == (
        (2, 3), (2, 2), (1, 2), (1, 1)
    )  # fmt: skip
    model.set_input_size((256, 192), patch_size=(4, 4), window_ratio=(8, 8, 16, 16), always_partition=False)
    assert model.windows(model.img_size) == [(8, 6), (8, 6), (4, 3), (4, 3)]
    assert get_model_args(model)["window_size"] == model.window_size
    with torch.no_grad():
        assert model(torch.randn(1, 3, 256, 192)).isfinite().all()
    before = model.img_size, model.window_size, [p.shape for p in model.parameters()]
    for wrong, message in (
        ({"patch_size": 8}, "patch_size=8: this model's patches are of 4"),
        ({"always_partition": True}, "always_partition=True: windows of this model are never larger"),
        ({"window_ratio": (8, 4)}, "window_ratio=.* has 2 entries, but blocks has 4 stages"),
        ({"window_size": (2, 3, 2)}, "window_size=.* has 3 entries, but blocks has 4 stages"),
        ({"window_size": 2.0}, "window_size=2.0 must be a positive side"),
    ):
        with pytest.raises(UserError, match=message):
            model.set_input_size(64, **wrong)
    assert before == (model.img_size, model.window_size, [p.shape for p in model.parameters()])
    assert build("dat_pp_tiny", False, strict_img_size=True, dynamic_img_size=True).strict_img_size is False
    two = {"dims": (8, 16), "blocks": ("L", "S"), "heads": (1, 2), "groups": (1, 1), "strides": (1, 1)}
    two |= {"offset_kernels": (3, 3), "sr_ratios": (1, 1), "num_classes": 2, "img_size": 64}
    with pytest.raises(UserError, match="height and width or one side per stage"):
        create("dat_atto", window_size=(4, 2), **two)


def test_other_channels(name, full):
    with torch.no_grad():
        assert build(name, full, in_chans=1).eval()(torch.randn(1, 1, SIZE, SIZE)).shape == (1, 10)


def test_device_and_precision_are_timms(name):
    """``create_model(device=, dtype=)`` as timm 1.0.31 passes them to every constructor, and what is made from such a model."""
    arguments = {"device": "meta", "dtype": torch.bfloat16, "img_size": SIZE}
    for extra in ({}, {"features_only": True}, {"num_classes": 0, "global_pool": ""}):
        model = timm.create_model(name, pretrained=False, **arguments, **extra)
        tensors = [*model.parameters(), *model.buffers()]
        assert {(t.device.type, t.dtype) for t in tensors if t.is_floating_point()} == {
            ("meta", torch.bfloat16)
        }
    model = timm.create_model(name, pretrained=False, **arguments)
    image = torch.empty(1, 3, SIZE, SIZE, device="meta", dtype=torch.bfloat16)
    assert model(image).dtype == torch.bfloat16
    model.requires_grad_(False)
    model.set_input_size(2 * SIZE)
    assert not [n for n, p in model.named_parameters() if p.requires_grad], "what was frozen stays frozen"
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model(name, pretrained=False, not_an_argument=1)


def test_features_by_symbolic_tracing(name):
    model = build(name, False).eval()
    extractor = create_feature_extractor(model, {"norm": "last"})
    images = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(extractor(images)["last"], model.forward_features(images))


def test_weights_of_another_network_are_refused_with_another_head_too(tmp_path):
    """Where the head differs, or is not wanted, timm leaves what it does not find as it was drawn."""
    file = tmp_path / "deep.safetensors"
    save_file(build("dat_tiny", False, img_size=96).state_dict(), file)
    given = {"dims": narrow("dat_tiny"), "pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}
    for other in ({"num_classes": 3}, {"features_only": True}, {"num_classes": 0}):
        with pytest.raises(UserError, match="they lack stages.2.blocks.6.norm1.weight, .* and have nothing"):
            timm.create_model("dat_small", **given, **other)
        with pytest.raises(UserError, match="they lack nothing, and have stages.2.blocks.4.attn.bias_table"):
            timm.create_model("dat_tiny", blocks=("LS", "LS", "LDLD", "LD"), **given, **other)
    given["pretrained_cfg_overlay"] |= {"input_size": (3, 96, 96), "num_classes": 10}
    model = timm.create_model("dat_tiny", num_classes=3, **given)
    assert model.img_size == (96, 96), "the size of the images that the weights' configuration tells"
    kept = load_file(file)
    assert all(torch.equal(p, kept[n]) for n, p in model.named_parameters() if not n.startswith("head."))


def test_pretrained_weights_do_not_exist(every):
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model(every, pretrained=True, dims=narrow(every), img_size=SIZE)
