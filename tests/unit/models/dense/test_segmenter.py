"""Decoders: the pyramid against torchvision's, sizes, noise of dropped channels, norms and initialisation."""

from __future__ import annotations

from math import prod, sqrt

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool, LastLevelP6P7

from dattrain.errors import UserError
from dattrain.models.dense import create_backbone, create_segmenter
from dattrain.models.dense.fpn import FPN
from dattrain.models.dense.norm import Classifier, ConvNormReLU, create_norm
from dattrain.models.dense.upernet import POOLED, AveragePool, UperNet
from dattrain.tasks.segmentation import pixel_cross_entropy


def segmenter(head: str = "upernet", drop_path: float = 0.3, **more):
    torch.manual_seed(0)
    backbone = create_backbone("dat_atto", img_size=64, drop_path_rate=drop_path)
    return create_segmenter(backbone, head, 7, **{"norm": "group", "channels": 64, **more})


def images(batch: int = 2, size: tuple[int, int] = (97, 130)) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("extra", ["none", "pool", "conv"])
def test_pyramid_is_torchvision_s(extra):
    torch.manual_seed(0)
    dims = (8, 16, 32)
    ours = FPN(dims, 12, extra)
    block = {"none": None, "pool": LastLevelMaxPool(), "conv": LastLevelP6P7(32, 12)}[extra]
    theirs = FeaturePyramidNetwork(dims, 12, block)
    names = {
        f"{kind}.{level}.{what}": f"{other}.{level}.0.{what}"
        for kind, other in (("lateral", "inner_blocks"), ("output", "layer_blocks"))
        for level in range(3)
        for what in ("weight", "bias")
    }
    if extra == "conv":
        names |= {
            f"extra.{i}.{what}": f"extra_blocks.p{6 + i}.{what}"
            for i in (0, 1)
            for what in ("weight", "bias")
        }
    state = ours.state_dict()
    assert set(names) == set(state)
    theirs.load_state_dict({names[name]: value for name, value in state.items()})
    sizes = ((25, 33), (13, 17), (7, 9))
    maps = [torch.randn(2, dim, *size) for dim, size in zip(dims, sizes)]
    found = ours(maps)
    expected = list(theirs({str(level): each for level, each in enumerate(maps)}).values())
    if extra == "conv":  # torchvision puts a ReLU before P7, mmdet does not
        expected[-1] = theirs.extra_blocks.p7(expected[-2])
    assert len(found) == {"none": 3, "pool": 4, "conv": 5}[extra]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    bound = sqrt(6 / (9 * 12 + 9 * 12))
    assert 0.9 * bound < float(ours.output[0].weight.detach().abs().max()) <= bound
    assert not any(parameter.any() for name, parameter in ours.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("side", POOLED)
@pytest.mark.parametrize("size", [(16, 16), (7, 7), (5, 9), (4, 32), (1, 2)])
def test_average_pool_is_torch_s(side, size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(AveragePool(side)(x), nn.functional.adaptive_avg_pool2d(x, side))
    assert AveragePool(side)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_nothing_raises_in_deterministic_mode_on_cuda(head):
    """Of the operators that torch.use_deterministic_algorithms names; bilinear enlargement it replaces by itself."""
    names = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.overloadpacket.__name__)
            if names[-1] == "nll_loss2d_forward":
                assert args[3] == 0  # a sum or mean would be added up in any order
            return func(*args, **(kwargs or {}))

    model = segmenter(head).train()
    with Recorded():
        found = model(images())
        logits = found[0] if isinstance(found, tuple) else found
        pixel_cross_entropy(logits, torch.zeros(2, 97, 130, dtype=torch.uint8)).sum().backward()
    assert {"convolution", "nll_loss2d_forward"} <= set(names)
    raising = ("_adaptive_", "adaptive_", "avg_pool3d", "max_unpool", "reflection_pad", "grid_sampler")
    assert not [name for name in names if name.startswith((*raising, "upsample_bicubic", "upsample_linear"))]


@pytest.mark.parametrize("head", ["upernet", "semantic_fpn"])
def test_sizes_are_rounded_up_and_every_parameter_has_a_gradient(head):
    model = segmenter(head).train()
    out = model(images())
    assert isinstance(out, tuple) == (head == "upernet")
    logits = out if head == "semantic_fpn" else out[0]
    assert tuple(logits.shape) == (2, 7, 25, 33)
    if head == "upernet":
        assert tuple(out[1].shape) == (2, 7, 7, 9)
    (sum(each.square().mean() for each in out) if head == "upernet" else out.square().mean()).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert tuple(model.eval()(images()).shape) == (2, 7, 25, 33)
    assert isinstance(segmenter(head, aux=False).train()(images()), torch.Tensor)


def test_what_is_dropped_is_what_the_noise_says():
    model = segmenter().train()
    columns = (10, 64, 32)  # two branches of five blocks, channels of the decoder, of the auxiliary head
    assert model.num_drop_path == sum(columns)
    x, noise = images(), torch.rand(2, sum(columns), generator=torch.Generator().manual_seed(3))
    logits, aux = model(x, noise)
    for again, once in zip(model(x, noise), (logits, aux)):
        assert torch.equal(again, once)
    for sample in range(2):  # whatever else is in the batch
        for alone, once in zip(model(x[sample : sample + 1], noise[sample : sample + 1]), (logits, aux)):
            torch.testing.assert_close(alone, once[sample : sample + 1], rtol=1e-4, atol=1e-5)
    for part, changes in zip(range(3), ((True, True), (True, False), (False, True))):
        start = sum(columns[:part])
        other = noise.clone()
        other[:, start : start + columns[part]] = 1 - other[:, start : start + columns[part]]
        assert tuple(not torch.equal(a, b) for a, b in zip(model(x, other), (logits, aux))) == changes
    assert any(not torch.equal(a, b) for a, b in zip(model(x), model(x)))
    with pytest.raises(ValueError, match=r"drop_path_noise is \(2, 105\), not \(2, 106\)"):
        model(x, noise[:, 1:])
    model.eval()
    assert torch.equal(model(x, noise), model(x))
    without = segmenter(drop_path=0.0, dropout=0.0).train()
    assert without.num_drop_path == 10
    assert all(torch.equal(a, b) for a, b in zip(without(x), without(x)))


def test_dropped_channels_are_scaled():
    classifier = Classifier(4, 3, 0.25).train()
    x, noise = torch.randn(1, 4, 2, 2), torch.tensor([[0.1, 0.25, 0.9, 0.2]])
    kept = torch.tensor([0.0, 1.0, 1.0, 0.0]).view(1, 4, 1, 1) / 0.75
    torch.testing.assert_close(classifier(x, noise), classifier.conv(x * kept))


def test_norms_have_the_same_parameters():
    kinds = {"sync": nn.SyncBatchNorm, "batch": nn.BatchNorm2d, "group": nn.GroupNorm}
    counts = set()
    for kind, module in kinds.items():
        norm = create_norm(kind, 48)
        assert type(norm) is module
        counts.add(sum(parameter.numel() for parameter in norm.parameters()))
    assert counts == {96}
    groups = {channels: create_norm("group", channels).num_groups for channels in (512, 64, 48, 32, 7, 1)}
    assert groups == {512: 32, 64: 8, 48: 6, 32: 4, 7: 1, 1: 1}
    with pytest.raises(UserError, match="norm='layer' is not known; choose one of sync, batch, group"):
        create_norm("layer", 8)


def test_weights_are_drawn_as_mmseg_draws_them():
    model = segmenter(channels=128)
    assert float(model.head.classifier.conv.weight.detach().std()) == pytest.approx(0.01, rel=0.15)
    assert not model.head.classifier.conv.bias.any()
    for block in model.head.modules():
        if isinstance(block, ConvNormReLU):
            weight = block[0].weight.detach()
            assert block[0].bias is None
            fan_out = weight.shape[0] * prod(weight.shape[2:])
            assert float(weight.std()) == pytest.approx(sqrt(2 / fan_out), rel=0.05)


def test_pyramid_pooling_sees_the_whole_image():
    """A change in one corner reaches the other one, which convolutions alone would not carry so far."""
    torch.manual_seed(0)
    head = UperNet((8, 8, 8, 8), 3, channels=16, norm="group", dropout=0.1).eval()
    maps = [torch.randn(1, 8, 4 * side, 4 * side) for side in (64, 32, 16, 8)]
    before = head(maps)
    maps[3] = maps[3].clone()
    maps[3][:, :, 0, 0] += 5
    assert len(head.pyramid) == len(POOLED) == 4
    assert float((head(maps) - before)[..., -1, -1].detach().abs().max()) > 1e-5


def test_protocol_of_the_engine():
    model = segmenter()
    layers = {name: model.layer_of(name) for name, _ in model.named_parameters()}
    assert layers["backbone.body.patch_embed.proj.weight"] == 0
    assert model.num_layers == 6
    after = {name for name, layer in layers.items() if layer == 6}
    assert after == {name for name in layers if name.startswith(("head.", "aux_head.", "backbone.norms."))}
    assert model.no_weight_decay() == {name for name in layers if "bias_table" in name}
    with pytest.raises(ValueError, match="is not a parameter"):
        model.layer_of("neck.weight")
    classifier = {id(parameter) for parameter in model.get_classifier().parameters()}
    assert classifier == {id(parameter) for name, parameter in model.named_parameters() if name in after}
    model.set_grad_checkpointing(True, mode="stage")
    assert model.backbone.body.checkpoint_stages
    for wrong in ({"head": "unet"}, {"dropout": 1.0}, {"norm": "none"}):
        with pytest.raises(UserError):
            segmenter(**wrong)
