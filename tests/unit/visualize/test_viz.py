"""Pictures of deformable attention: what is drawn is what the model did."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch
from fashion_images import fashion
from matplotlib.figure import Figure
from PIL import Image

from dattrain import ops
from dattrain.cli import main as cli
from dattrain.cli import viz
from dattrain.errors import UserError
from dattrain.models import create
from dattrain.models.deformable import DeformableAttention
from dattrain.ops.deformable_attention.backend_reference import sampled_bias
from dattrain.pretrained import preprocess
from dattrain.visualize import draw, sampling_points
from dattrain.visualize.draw_points import draw_points
from dattrain.visualize.picture import picture_of


@pytest.fixture(scope="module")
def batch(cfg):
    images = [preprocess.prepare(preprocess.from_array(image), cfg) for image in fashion(2)[0]]
    return preprocess.normalise(torch.stack(images), cfg)


def test_positions_and_attention_are_the_models_own(atto, batch):
    wanted: dict[str, tuple[torch.Tensor, ...]] = {}
    handles = []
    for name, module in atto.named_modules():
        if isinstance(module, DeformableAttention):
            handles.append(
                module.q.register_forward_hook(lambda _m, _i, q, n=name: wanted.__setitem__(n, (q,)))
            )
            handles.append(
                module.kv.register_forward_hook(
                    lambda _m, _i, kv, n=name: wanted.__setitem__(n, (*wanted[n], kv))
                )
            )
            handles.append(
                module.offset.register_forward_hook(
                    lambda _m, _i, p, n=name: wanted.__setitem__(n, (*wanted[n], p))
                )
            )
    before = atto(batch)
    for handle in handles:
        handle.remove()
    captured = sampling_points.capture(atto, batch, attention=True)
    torch.testing.assert_close(atto(batch), before)
    assert [len(blocks) for blocks in captured] == [2, 2]
    for place, (name, tensors) in enumerate(wanted.items()):
        module = atto.get_submodule(name)
        q, p, kv = tensors
        heads, (_, height, width, dim) = module.heads, q.shape
        query = q.reshape(2, height * width, heads, -1).transpose(1, 2)
        key = kv.reshape(2, -1, 2, heads, dim // heads)[:, :, 0].transpose(1, 2)
        bias = sampled_bias(module.bias_table, p.flatten(2, 3), height, width, "center")
        weights = ((query @ key.transpose(-1, -2)) * (dim // heads) ** -0.5 + bias).softmax(-1)
        for image in range(2):
            block = captured[image][place]
            assert (block.stage, block.map_size) == (int(name.split(".")[1]) + 1, (height, width))
            np.testing.assert_allclose(block.positions, p[image].detach().numpy(), atol=1e-6)
            np.testing.assert_allclose(block.attention, weights[image].detach().numpy(), atol=1e-6)
            assert block.received(0).sum() == pytest.approx(1, abs=1e-5)


def test_pixels_put_the_corner_token_half_a_token_inside():
    block = sampling_points.Deformed(1, 0, np.zeros((1, 2, 2, 2)), np.zeros((2, 2, 2)), (4, 8), None)
    corners = block.pixels(np.array([[-1, -1], [1, 1], [0, 0]]), (64, 64))
    np.testing.assert_allclose(corners, [[8, 4], [56, 60], [32, 32]])
    assert draw.query_index(block, (0.0, 0.0)) == 0 and draw.query_index(block, (1.0, 1.0)) == 31


def test_a_picture_is_drawn_whole_and_its_points_where_the_network_saw_them(cfg):
    """A landscape of 200 x 100 at a model of 64: what is seen is the square in the middle."""
    image = torch.zeros(3, 100, 200, dtype=torch.uint8)
    shown = picture_of(image, cfg)
    assert shown.pixels.shape == (100, 200, 3) and not shown.whole
    np.testing.assert_allclose(shown.window, (0, 50, 100, 100), atol=1)
    block = sampling_points.Deformed(
        3, 1, np.array([[[[-1.0, -1.0], [1.0, 1.0]]]]), np.zeros((1, 2, 2)), (4, 4), None
    )
    axis = Figure().add_subplot()
    draw.points(axis, shown, block)
    drawn = np.asarray(axis.collections[0].get_offsets())  # x, y
    np.testing.assert_allclose(drawn, [[50 + 12.5, 12.5], [50 + 87.5, 87.5]], atol=1)
    assert axis.get_xlim() == (0, 200) and len(axis.patches) == 4  # what it did not see is dimmed
    huge = picture_of(torch.zeros(3, 1600, 3200, dtype=torch.uint8), cfg)
    assert huge.pixels.shape == (800, 1600, 3)
    np.testing.assert_allclose(huge.window, (0, 400, 800, 800), atol=2)


def test_what_is_said_below_a_picture(tmp_path):
    classes, probabilities = ["bag", "boot"], torch.tensor([0.25, 0.75])
    said = {
        name: viz.caption(tmp_path / name / "x.png", probabilities, classes)
        for name in ("bag", "boot", "new")
    }
    assert said["bag"] == "label bag, predicted boot, 75.0 % (wrong; 25.0 % bag)"
    assert said["boot"] == "label boot, predicted boot, 75.0 % (right)"
    assert said["new"] == "predicted boot, 75.0 %"


def test_select_names_what_there_is(atto, batch):
    blocks = sampling_points.capture(atto, batch)[0]
    assert [b.stage for b in sampling_points.select(blocks)] == [3, 4]
    with pytest.raises(UserError, match="stage 3 block 1"):
        sampling_points.select(blocks, stage=1)
    assert blocks[0].attention is None


def test_models_without_deformable_attention_are_refused(batch):
    model = create("dat_atto", num_classes=10, img_size=64, blocks=("L", "S", "LS", "L"))
    with pytest.raises(UserError, match="no deformable attention"):
        sampling_points.capture(model, batch)


def test_draw_points_takes_arrays_and_tensors(atto, cfg):
    image = fashion(1)[0][0]
    drawn = []
    for each in (image, np.repeat(image[..., None], 3, 2), torch.from_numpy(image.copy()).expand(3, -1, -1)):
        axis = Figure().add_subplot()
        draw_points(atto, each, cfg=cfg, axis=axis)
        drawn.append([np.asarray(c.get_offsets()) for c in axis.collections])
    assert len(drawn[0]) == 2 and all(len(group) == 16 for group in drawn[0])
    for other in drawn[1:]:
        np.testing.assert_allclose(drawn[0], other)
    with pytest.raises(UserError, match="groups 1 to 2"):
        draw_points(atto, image, cfg=cfg, axis=Figure().add_subplot(), group=3)


@pytest.mark.parametrize("kind", viz.KINDS)
def test_pictures_and_one_page_that_needs_nothing_else(tmp_path, weights_file, kind):
    for i, image in enumerate(fashion(2)[0]):
        Image.fromarray(image).save(tmp_path / f"img{i}.png")
    out = tmp_path / "out"
    command = ["viz", kind, str(tmp_path), "--checkpoint", str(weights_file), "--out", str(out), "--every"]
    assert cli.main(command) == 0
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [f"img0.{kind}.png", f"img1.{kind}.png", f"{kind}.html"]
    )
    text = (out / f"{kind}.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']?http", text)
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])
    assert data["kind"] == kind and len(data["views"]) == 2
    block = data["views"][0]["blocks"][0]
    weights = np.frombuffer(base64.b64decode(block["groups"][0]["attention"]), np.uint8).reshape(16, 16)
    assert (weights.max(1) == 255).all()


def test_names_that_end_a_script_are_harmless(atto, batch):
    from dattrain.visualize import html

    block = sampling_points.capture(atto, batch, attention=True)[0][:1]
    text = html.render(
        [html.View("</script><b>", np.zeros((8, 8, 3), np.uint8), block)],
        title="<i>",
        kind="points",
        query=(0.5, 0.5),
    )
    assert "</script><b>" not in text and "&lt;i&gt;" in text


def test_datpp_and_any_backend_can_be_looked_at(cfg):
    model = create("dat_pp_tiny", num_classes=10, img_size=64, blocks=("ND", "D", "D", "D"))
    x = torch.randn(1, 3, 64, 96)
    (blocks,) = sampling_points.capture(model, x, attention=True)
    with ops.use_backend("reference"):
        (again,) = sampling_points.capture(model, x, attention=True)
    for a, b in zip(blocks, again):
        np.testing.assert_allclose(a.attention, b.attention, atol=1e-5)
        np.testing.assert_allclose(a.attention.sum(-1), 1, atol=1e-5)


def test_usage_errors(tmp_path, weights_file, capsys):
    assert cli.main(["viz", "points", "none.png", "--checkpoint", str(weights_file)]) == 1
    assert "none.png" in capsys.readouterr().err
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert (
        cli.main(
            [
                "viz",
                "points",
                str(tmp_path / "bad.png"),
                "--checkpoint",
                str(weights_file),
                "--out",
                str(tmp_path),
            ]
        )
        == 1
    )
    assert "bad.png" in capsys.readouterr().err
    arguments = ["--checkpoint", str(weights_file), "--query", "2", "0"]
    assert cli.main(["viz", "attention", str(tmp_path / "bad.png"), *arguments]) == 1
    assert "--query" in capsys.readouterr().err
    assert cli.main(["viz", "points", *arguments[:2], str(tmp_path), "--out", "picture.png"]) == 2
    assert "--out picture.png: must be a folder" in capsys.readouterr().err
