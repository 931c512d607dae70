"""Weights of a classification or a dense training into a dense model: the fate of every tensor."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from dattrain.errors import UserError
from dattrain.models import create
from dattrain.models.dense import create_backbone, create_detector, create_segmenter
from dattrain.models.dense.create_detector import outs
from dattrain.models.dense.weights import initialise


def segmenter(head: str = "semantic_fpn", classes: int = 5, seed: int = 1, name: str = "dat_atto", **more):
    torch.manual_seed(seed)
    backbone = create_backbone(name, **({"img_size": 64} if name == "dat_atto" else {}), **more)
    return create_segmenter(backbone, head, classes, norm="batch", channels=16)


def detector(head: str = "retinanet", classes: int = 5, seed: int = 1):
    torch.manual_seed(seed)
    backbone = create_backbone("dat_atto", img_size=64, outs=outs(head))
    return create_detector(backbone, head, classes, norm="group", channels=16)


def classifier(img_size: int = 64, seed: int = 0):
    torch.manual_seed(seed)
    return create("dat_atto", num_classes=10, img_size=img_size).eval()


def check_complete(report, model, source) -> None:
    """Every tensor of the model and of the source is in the report once."""
    names = Counter(entry.name for entry in report.entries)
    assert set(names.values()) == {1}
    dropped = set(report.names("dropped"))
    assert set(names) - dropped == set(model.state_dict())
    dense = any(name.startswith("backbone.") for name in source)
    mapped = {
        name if name in dropped or name.startswith(("backbone.", "head.levels", "head.neck", "head.cl")) or dense
        else f"backbone.body.{name}"
        for name in source
    }  # fmt: skip
    assert mapped <= set(names)


def test_from_a_classification_run():
    source, model = classifier(), segmenter().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = initialise(model, source.state_dict(), keep_head=True)  # it has no head that could be kept
    check_complete(report, model, source.state_dict())
    assert set(report.names("dropped")) == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}
    new = set(report.names("new"))
    assert new == {name for name in before if not name.startswith("backbone.body.")}
    assert all(torch.equal(before[name], model.state_dict()[name]) for name in new)
    x = torch.randn(1, 3, 64, 96)
    expected = source.forward_intermediates(x, intermediates_only=True)
    for found, each in zip(model.backbone(x), expected):
        bare = torch.nn.functional.layer_norm(each.permute(0, 2, 3, 1), each.shape[1:2])
        torch.testing.assert_close(found, bare.permute(0, 3, 1, 2))


def test_tables_of_another_size_are_resized_or_sampled():
    source = classifier(96).state_dict()
    table = "stages.2.blocks.1.attn.bias_table"
    resized, sampled = segmenter(), segmenter()
    shape = tuple(resized.state_dict()[f"backbone.body.{table}"].shape)
    report = initialise(resized, source, bias_table="resize")
    assert tuple(resized.state_dict()[f"backbone.body.{table}"].shape) == shape
    assert f"backbone.body.{table}" in report.names("resized")
    report = initialise(sampled, source, bias_table="sample")
    assert torch.equal(sampled.state_dict()[f"backbone.body.{table}"], source[table])
    assert f"backbone.body.{table}" in report.names("kept")


@pytest.mark.parametrize("name", ["dat_atto", "pvt_v2_b0"])
def test_from_a_dense_run(name):
    source = segmenter(name=name, seed=0).state_dict()
    for value in source.values():
        value.add_(1)  # buffers and output norms, too, differ from what is drawn
    model = segmenter(name=name)
    report = initialise(model, source, keep_head=True)
    check_complete(report, model, source)
    assert report.names("kept") == [entry.name for entry in report.entries]
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())

    model = segmenter("upernet", name=name)
    drawn = {name: value.clone() for name, value in model.state_dict().items()}
    report = initialise(model, source)
    check_complete(report, model, source)
    for each, value in model.state_dict().items():
        assert torch.equal(value, source[each] if each.startswith("backbone.") else drawn[each]), each
    assert {each.split(".")[0] for each in report.names("new")} == {"head", "aux_head"}
    assert {each.split(".")[0] for each in report.names("dropped")} == {"head"}


@pytest.mark.parametrize("head", ["retinanet", "cascade_mask_rcnn"])
def test_a_detector_from_a_classification_run(head):
    source, model = classifier().state_dict(), detector(head)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = initialise(model, source)
    check_complete(report, model, source)
    for name, value in model.state_dict().items():
        body = name.removeprefix("backbone.body.")
        assert torch.equal(value, before[name] if body == name else source[body]), name
    assert set(report.names("new")) == {name for name in before if not name.startswith("backbone.body.")}
    assert set(report.names("dropped")) == {"norm.weight", "norm.bias", "head.fc.weight", "head.fc.bias"}


def test_a_detector_from_a_detector():
    """All of the same one; of another, or with ``init.head=new``, the backbone and the norms of its outputs."""
    source = {name: value + 1 for name, value in detector("mask_rcnn", seed=0).state_dict().items()}
    model = detector("mask_rcnn")
    report = initialise(model, source, keep_head=True)
    check_complete(report, model, source)
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())

    for head in ("mask_rcnn", "retinanet"):
        model = detector(head, classes=7)
        drawn = {name: value.clone() for name, value in model.state_dict().items()}
        report = initialise(model, source)
        check_complete(report, model, source)
        for name, value in model.state_dict().items():
            assert torch.equal(value, source[name] if name.startswith("backbone.") else drawn[name]), name
    assert "backbone.norms.0.weight" in report.names("dropped")  # of a map that RetinaNet does not take
    report = initialise(detector("faster_rcnn"), detector().state_dict())
    assert "backbone.norms.0.weight" in report.names("new")


@pytest.mark.parametrize(
    ("source", "head", "message"),
    [
        (
            lambda: detector("retinanet", classes=6),
            "retinanet",
            "head.classes.weight is .* choose init.head=new",
        ),
        (lambda: detector("mask_rcnn"), "retinanet", "neck.lateral.0.weight is .* choose init.head=new"),
        (
            lambda: detector("mask_rcnn"),
            "faster_rcnn",
            "has no place for: .*mask_heads.*choose init.head=new",
        ),
        (lambda: segmenter(), "faster_rcnn", "choose init.head=new"),
    ],
)
def test_a_head_that_is_another_s_is_refused(source, head, message):
    model = detector(head)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        initialise(model, source().state_dict(), keep_head=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("source", "keep", "message"),
    [
        (lambda: segmenter(classes=6), True, "head.classifier.conv.weight is .* choose init.head=new"),
        (lambda: segmenter("upernet"), True, "choose init.head=new"),
        (lambda: segmenter(blocks=("L", "S", "LD", "L")), False, "the source lacks stages.3"),
        (
            lambda: segmenter(name="pvt_v2_b0"),
            False,
            r"patch_embed.proj.weight is \(32, 3, 7, 7\) in the source",
        ),
        (lambda: classifier().head, False, "the source lacks"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(source, keep, message):
    model = segmenter()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        initialise(model, source().state_dict(), keep_head=keep)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def body_of(model) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {name.removeprefix("backbone.body."): value for name, value in state.items() if ".body." in name}


def test_timm_networks_take_their_own_weights_alone():
    model = segmenter(name="pvt_v2_b0")
    state = body_of(model)
    report = initialise(model, {**state, "head.weight": torch.zeros(10, 256), "head.bias": torch.zeros(10)})
    assert set(report.names("dropped")) == {"head.weight", "head.bias"}
    with pytest.raises(UserError, match="not the weights of this backbone"):
        initialise(model, classifier().state_dict())
    state["patch_embed.proj.weight"] = torch.zeros(1)
    with pytest.raises(UserError, match=r"patch_embed.proj.weight is \(1,\) in the source"):
        initialise(model, state)


def test_names_of_swin_s_authors_are_read():
    """Theirs end stages with the downsampling that begins timm's, and hold buffers."""
    tiny = {"name": "swin_tiny_patch4_window7_224", "embed_dim": 24, "depths": (1, 1, 1, 2)}
    source, model = body_of(segmenter(seed=0, **tiny)), segmenter(**tiny)
    theirs = {
        f"layers.{int(name[7]) - 1}{name[8:]}" if "downsample" in name else name: value
        for name, value in source.items()
    }
    assert "layers.0.downsample.reduction.weight" in theirs
    buffer = "layers.0.blocks.0.attn.relative_position_index"
    report = initialise(model, {**theirs, buffer: torch.zeros(49, 49), "norm.weight": torch.zeros(192)})
    assert set(report.names("dropped")) == {buffer, "norm.weight"}
    assert all(torch.equal(value, source[name]) for name, value in body_of(model).items())
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    with pytest.raises(UserError, match=rf"{table} is \(529, 3\) in the source, \(169, 3\) in the model"):
        initialise(model, {**source, table: torch.zeros(23 * 23, 3)})
