"""Weights into other models: the authors' files, other resolutions, other heads, and what is refused."""

from __future__ import annotations

from ast import literal_eval
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from dattrain.errors import UserError
from dattrain.models import create, surgery, variant_of
from dattrain.models.attention import WindowAttention
from dattrain.models.authors import convert
from dattrain.models.dat import DAT
from dattrain.models.deformable import DeformableAttention
from dattrain.models.resize import resize_fixed_table, resize_table

ASSETS = Path(__file__).parents[2] / "assets/models"
RELEASED = {"dat_tiny": 224, "dat_small": 224, "dat_base": 224, "dat_base_384": 384}


def atto(seed=0, img_size=64, num_classes=10, **kwargs) -> DAT:
    torch.manual_seed(seed)
    model = create("dat_atto", num_classes=num_classes, img_size=img_size, **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias_table"):
                parameter.normal_(std=0.5)
    return model.eval()


def tensors(model: DAT) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# The authors' files


@pytest.mark.parametrize("released", RELEASED)
def test_names_shapes_and_order_are_the_authors(released):
    name = released.removesuffix("_384")
    model = create(name, num_classes=1000, img_size=RELEASED[released])
    ours = [f"{key}\t{tuple(t.shape)}\t{str(t.dtype)[6:]}" for key, t in convert.to_authors(model).items()]
    assert ours == (ASSETS / f"keys_{released}.txt").read_text().splitlines()


@pytest.mark.parametrize("released", ["dat_tiny", "dat_base_384"])
def test_variant_is_told_from_the_keys(released):
    state = {}
    for line in (ASSETS / f"keys_{released}.txt").read_text().splitlines():
        key, shape, dtype = line.split("\t")
        if "relative_position_index" not in key and "attn_mask" not in key:
            state[key] = torch.empty(literal_eval(shape), dtype=getattr(torch, dtype))
    full = {**state, **{k: t for k, t in convert.to_authors(_create(released)).items() if k not in state}}
    model = convert.from_authors({"model": full})
    assert variant_of(model) == released.removesuffix("_384")
    assert model.img_size == (RELEASED[released],) * 2
    assert model.window_size is None, "windows that follow the image size stay derived"
    assert model.num_classes == 1000


def _create(released: str) -> DAT:
    return create(released.removesuffix("_384"), num_classes=1000, img_size=RELEASED[released])


def test_file_without_buffers_is_read_by_configuration():
    model = atto(blocks=("LS", "LS", "LD", "LD"))
    state = {k: t for k, t in convert.to_authors(model).items() if "index" not in k and "mask" not in k}
    config = {
        "img_size": 64, "dims": [32, 64, 128, 256], "depths": [2, 2, 2, 2], "stage_spec": [["L", "S"], ["L", "S"], ["L", "D"], ["L", "D"]],
        "heads": [2, 4, 8, 16], "groups": [-1, -1, 2, 4], "strides": [-1, -1, 1, 1], "window_sizes": [4, 4, 4, 2],
        "use_pes": [False, False, True, True], "offset_range_factor": [-1, -1, 2, 2],
    }  # fmt: skip
    back = convert.from_authors(state, config)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(back(images), model(images))


def test_what_is_refused_of_the_authors():
    state = convert.to_authors(atto(blocks=("LS", "LS", "LD", "LD")))
    cases = [
        (
            {k: t for k, t in state.items() if k != "cls_norm.norm.bias"},
            "missing cls_norm.norm.bias; left over nothing",
        ),
        ({**state, "stages.9x": torch.zeros(1)}, "missing nothing; left over stages.9x"),
        ({**state, "cls_norm.norm.bias": torch.zeros(3)}, r"norm.bias of shape \(3,\), not \(256,\)"),
        (
            {**state, "stages.0.attns.1.attn_mask": state["stages.0.attns.1.attn_mask"] + 1},
            "stages.0.attns.1.attn_mask does not hold the values",
        ),
        ({"resnet.weight": torch.zeros(1)}, "not a checkpoint of the authors"),
        ({"epoch": 3}, "expected tensors by name; epoch is not a tensor"),
        ({}, "expected tensors by name"),
    ]
    for wrong, message in cases:
        with pytest.raises(UserError, match=message):
            convert.from_authors(wrong)
    with pytest.raises(UserError, match="SpatialReductionAttention .* has no counterpart"):
        convert.to_authors(atto(blocks=("P", "S", "LD", "D")))


def test_timm_loads_a_file_of_the_authors(tmp_path):
    source = create("dat_tiny", num_classes=1000, img_size=96, dims=(24, 48, 96, 192)).eval()
    torch.save({"model": convert.to_authors(source)}, tmp_path / "dat_tiny.pth")
    arguments = {
        "pretrained": True, "dims": (24, 48, 96, 192), "pretrained_cfg_overlay": {"file": str(tmp_path / "dat_tiny.pth")},
    }  # fmt: skip
    same = timm.create_model("dat_tiny", img_size=96, **arguments).eval()
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(same(images), source(images))
    larger = timm.create_model("dat_tiny", img_size=128, num_classes=5, **arguments).eval()
    expected = create("dat_tiny", num_classes=5, img_size=128, dims=(24, 48, 96, 192)).eval()
    surgery.resize_for(expected, tensors(source), head="new")
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        torch.testing.assert_close(larger.forward_features(images), expected.forward_features(images))


# Another resolution


@pytest.mark.parametrize("img_size", [96, 128, (64, 128), (96, 160)])
@pytest.mark.parametrize("bias_table", ["resize", "sample"])
def test_every_tensor_is_accounted_for(img_size, bias_table):
    source, target = atto(1), atto(2, img_size)
    report = surgery.resize_for(target, tensors(source), bias_table=bias_table)
    names = [entry.name for entry in report.entries]
    assert sorted(names) == sorted(tensors(source)), "each tensor once"
    deformable = {f"{n}.bias_table" for n, m in target.named_modules() if isinstance(m, DeformableAttention)}
    windows = {f"{n}.bias_table" for n, m in target.named_modules() if isinstance(m, WindowAttention)}
    changed = {
        name
        for name in windows | deformable
        if tensors(source)[name].shape != tensors(atto(0, img_size))[name].shape
    }
    resized = changed if bias_table == "resize" else changed & windows
    assert set(report.names("resized")) == resized
    assert set(report.names("kept")) == set(names) - resized
    for name, parameter in target.named_parameters():
        original = source.get_parameter(name)
        expected = (
            resize_table(original.detach(), tuple(parameter.shape[1:])) if name in resized else original
        )
        assert torch.equal(parameter, expected), name
    with torch.no_grad():
        assert target(torch.randn(1, 3, *target.img_size)).isfinite().all()
    text = str(report)
    assert text.startswith(f"{len(names)} tensors: ")
    assert all(name in text for name in changed)


def test_sampled_table_is_the_same_function_of_displacement():
    """`sample` at twice the size gives what the model gives when it is simply run at twice the size."""
    source, target = atto(1, window_size=4), atto(2, 128, window_size=4)
    surgery.resize_for(target, tensors(source), bias_table="sample")
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        # Stage 4's windows differ (2 at 64, where the map is no larger), but it holds a deformable block alone.
        torch.testing.assert_close(target(images), source(images))
        exact = source(images)
        surgery.resize_for(target := atto(3, 128, window_size=4), tensors(source))
        resized = target(images)
        lost = atto(4, 128, window_size=4)
        drawn = {
            n: t if "bias_table" not in n else lost.get_parameter(n).detach()
            for n, t in tensors(target).items()
        }
        surgery.resize_for(lost, drawn)
    error, random_error = ((other - exact).norm() / exact.norm() for other in (resized, lost(images)))
    assert error < 0.2 * random_error


def test_resized_tables_are_the_authors_bicubic():
    table = torch.randn(3, 13, 13)
    expected = F.interpolate(table[None], (23, 23), mode="bicubic", align_corners=False)[0]
    assert torch.equal(resize_table(table, (23, 23)), expected)
    assert resize_table(table, (13, 13)) is table
    narrow = resize_table(table.bfloat16(), (23, 23))
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected, atol=0.03, rtol=0.02)


def test_fixed_tables_are_resized_along_queries_and_keys():
    smooth = torch.linspace(0, 1, 16).view(1, 16, 1) + torch.linspace(0, 2, 16).view(1, 1, 16)
    grown = resize_fixed_table(smooth, (4, 4, 4, 4), (8, 6, 8, 6))
    assert grown.shape == (1, 48, 48)
    for block in (grown[0, :, 0], grown[0, 0]):
        assert block.diff()[:5].gt(0).all(), "still grows along a row of the map"
    source, target = atto(1, position="fixed"), atto(2, 96, position="fixed")
    report = surgery.resize_for(target, tensors(source))
    assert report.names("resized") == [n for n in tensors(source) if n.endswith("bias_table")]
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        target.set_input_size(64)
        assert target(images).isfinite().all()


def test_shapes_of_sampled_tables_are_adopted_for_a_resume():
    source, target = atto(1), atto(2, 96)
    surgery.resize_for(target, tensors(source), bias_table="sample")
    saved = tensors(target)
    resumed = atto(3, 96)
    surgery.adopt_tables(resumed, {name: tensor.shape for name, tensor in saved.items()})
    resumed.load_state_dict(saved)
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(resumed(images), target(images))


def test_set_input_size_resizes_like_a_change_of_model():
    source, target = atto(1), atto(2, (96, 128))
    surgery.resize_for(target, tensors(source))
    source.set_input_size((96, 128))
    images = torch.randn(1, 3, 96, 128)
    with torch.no_grad():
        assert torch.equal(source(images), target(images))


def test_weights_take_the_target_precision():
    target = atto(2, 96).to(torch.bfloat16)
    surgery.resize_for(target, tensors(atto(1)))
    assert {parameter.dtype for parameter in target.parameters()} == {torch.bfloat16}


# Another head


def test_rows_of_the_head_are_picked_by_the_map():
    source, target = atto(1, num_classes=10), atto(2, num_classes=4)
    drawn = tensors(target)
    report = surgery.resize_for(target, tensors(source), head="map", class_map=[7, -1, 0, 7])
    head, bias = target.head.fc.weight, target.head.fc.bias
    for row, wanted in enumerate([7, None, 0, 7]):
        expected = drawn["head.fc.weight"][row] if wanted is None else source.head.fc.weight[wanted]
        assert torch.equal(head[row], expected)
        expected = drawn["head.fc.bias"][row] if wanted is None else source.head.fc.bias[wanted]
        assert torch.equal(bias[row], expected)
    statuses = {entry.name: (entry.status, entry.detail) for entry in report.entries}
    assert statuses["head.fc.weight"] == ("kept", "3 of 4 rows picked out of 10 classes")
    assert statuses["head.fc.weight[1]"] == ("new", "no counterpart in the source; drawn as init=paper")
    assert "head.fc.bias[1]" in str(report)


def test_a_new_head_is_the_models_own_draw():
    source, target = atto(1, num_classes=10), atto(2, num_classes=4, init="trunc_normal")
    drawn = tensors(target)["head.fc.weight"]
    report = surgery.resize_for(target, tensors(source), head="new")
    assert torch.equal(target.head.fc.weight, drawn)
    assert report.names("new") == ["head.fc.weight", "head.fc.bias"]
    assert "4 x 256, drawn as init=trunc_normal in place of 10 x 256" in str(report)


def test_a_model_without_head_drops_the_sources():
    report = surgery.resize_for(atto(2, num_classes=0), tensors(atto(1)), head="new")
    assert report.names("dropped") == ["head.fc.weight", "head.fc.bias"]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (
            {"num_classes": 4},
            {},
            r"head.fc.weight is \(10, 256\) in the source, \(4, 256\) in the model; choose init.head",
        ),
        ({"dims": (32, 64, 128, 512)}, {}, r"stages.3.downsample.conv.weight is"),
        ({"heads": (1, 4, 8, 16)}, {}, r"stages.0.blocks.0.attn.bias_table is .*: other heads"),
        (
            {"blocks": ("L", "S", "L", "D")},
            {},
            "the source has tensors that the model has no place for: stages.2.blocks.1",
        ),
        ({"blocks": ("L", "S", "LDD", "D")}, {}, "the source lacks stages.2.blocks.2.norm1.weight"),
        ({}, {"head": "map"}, "init.head=map needs a map"),
        (
            {},
            {"head": "map", "class_map": [0] * 9},
            r"the class map is torch.int64 of shape \(9,\), not 10 integers",
        ),
        ({}, {"head": "map", "class_map": [0.0] * 10}, "the class map is torch.float32"),
        ({}, {"head": "map", "class_map": [10] + [0] * 9}, r"goes from 0 to 10, outside -1 ... 9"),
        ({}, {"head": "none"}, "init.head='none' is not known; choose one of keep, new, map"),
        (
            {},
            {"bias_table": "bilinear"},
            "init.bias_table='bilinear' is not known; choose one of resize, sample",
        ),
    ],
)
def test_what_fits_nowhere_is_an_error(change, arguments, message):
    target = atto(2, **change)
    before = tensors(target)
    with pytest.raises(UserError, match=message):
        surgery.resize_for(target, tensors(atto(1)), **arguments)
    assert all(torch.equal(before[name], parameter) for name, parameter in target.named_parameters())


@pytest.mark.parametrize("img_size", [192, 256, 384, 448, 512, (224, 384)])
def test_from_224_to_any_size(img_size):
    """The sizes people fine-tune at, on a narrowed dat_tiny: as many windows across the map as at 224, or padded ones."""
    narrow = {"num_classes": 4, "dims": (24, 48, 96, 192)}
    source, target = (
        create("dat_tiny", img_size=224, **narrow),
        create("dat_tiny", img_size=img_size, **narrow),
    )
    report = surgery.resize_for(target, tensors(source))
    assert len(report.entries) == len(tensors(source))
    height, width = target.map_sizes(target.img_size)[2]
    assert target.stages[2].blocks[1].attn.bias_table.shape[1:] == (2 * height - 1, 2 * width - 1)
    side = min(target.img_size) // 32
    assert target.stages[0].blocks[1].attn.bias_table.shape[1:] == (2 * side - 1, 2 * side - 1)
    with torch.no_grad():
        assert target.eval()(torch.randn(1, 3, *target.img_size)).isfinite().all()
