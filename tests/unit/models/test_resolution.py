"""Tables at another resolution still mean what they meant: a task that nothing but the table can solve.

Each image holds an anchor and a marker, an eighth of the compass apart in one of eight directions. Queries and keys are zero, so that
attention is the softmax of the bias alone; head h's table looks in direction h; values are the marker. At the anchor, the
head that sees the marker gives the class. Distances are shares of the map, as they are when one image is taken at another size.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dattrain.models import create, surgery
from dattrain.models.attention import WindowAttention
from dattrain.models.dat import DAT
from dattrain.models.deformable import DeformableAttention

TRAINED, HEADS, DISTANCE, SPOT = 128, 8, 0.3, 0.1
ANCHOR, MARKER = 0, 1
IMAGES = 64
WINDOWS, DEFORMABLE = 0, 1
"""Blocks of stage 3; its window is as large as its map wherever the image is square."""


def directions() -> Tensor:
    """heads x (y, x), unit vectors."""
    angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
    return torch.stack([angle.sin(), angle.cos()], -1)


def model(img_size, seed=0) -> DAT:
    torch.manual_seed(seed)
    return create("dat_atto", num_classes=2, img_size=img_size, blocks=("L", "L", "LD", "D")).eval()


@torch.no_grad()
def solver() -> DAT:
    """A model whose stage 3 solves the task at the size it was "trained" at."""
    solved = model(TRAINED)
    for block in (WINDOWS, DEFORMABLE):
        attention = solved.stages[2].blocks[block].attn
        assert attention.heads == HEADS
        for parameter in attention.parameters():
            parameter.zero_()
        width = attention.proj.in_features
        attention.proj.weight.copy_(torch.eye(width))
        values = attention.qkv if isinstance(attention, WindowAttention) else attention.kv
        values.weight[-width :: width // HEADS, MARKER] = 1
        rows, columns = (
            (torch.arange(entries) - entries // 2) * 2 / (entries + 1)
            for entries in attention.bias_table.shape[1:]
        )
        displacement = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        # Read at query - key: a head that looks to the right has its bias where the key lies to the right.
        away = displacement + DISTANCE * directions()[:, None, None]
        attention.bias_table.copy_(8 * (-away.square().sum(-1) / (2 * 0.12**2)).exp())
    return solved


def scenes(height: int, width: int) -> tuple[Tensor, Tensor]:
    """(B x H x W x channels maps, B classes)."""
    generator = torch.Generator().manual_seed(1)
    label = torch.arange(IMAGES) % HEADS
    anchor = 0.35 + 0.3 * torch.rand(IMAGES, 2, generator=generator)
    grid = torch.stack(
        torch.meshgrid(*((torch.arange(n) + 0.5) / n for n in (height, width)), indexing="ij"), -1
    )
    maps = torch.zeros(IMAGES, height, width, 128)
    for channel, place in ((ANCHOR, anchor), (MARKER, anchor + DISTANCE * directions()[label])):
        distance = (grid - place[:, None, None]).square().sum(-1)
        maps[..., channel] = (-distance / (2 * SPOT**2)).exp()
    return maps, label


@torch.no_grad()
def accuracy(solved: DAT, block: int) -> float:
    """Share of scenes, drawn at the model's own size, that a block of stage 3 classifies."""
    maps, label = scenes(*solved.map_sizes(solved.img_size)[2])
    seen = solved.stages[2].blocks[block].attn(maps)[..., :: maps.shape[-1] // HEADS]
    found = (maps[..., ANCHOR, None] * seen).sum((1, 2)).argmax(1)
    return float((found == label).float().mean())


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    solved = solver()
    for block in (WINDOWS, DEFORMABLE):
        assert accuracy(solved, block) == 1
    return {name: parameter.detach() for name, parameter in solved.named_parameters()}


CASES = [(WINDOWS, size, "resize") for size in (96, 160, 224, 256)] + [
    (DEFORMABLE, size, how)
    for size in (96, 160, 224, 256, (128, 256), (256, 128), (96, 160))
    for how in ("resize", "sample")
]


@pytest.mark.parametrize(("block", "img_size", "bias_table"), CASES)
def test_tables_keep_their_meaning_at_another_size(trained, block, img_size, bias_table):
    solved = model(img_size, seed=1)
    surgery.resize_for(solved, trained, bias_table=bias_table)
    assert accuracy(solved, block) >= 0.95


WRONG = {
    "as a new model draws it": lambda resized, drawn: drawn,
    # Of its own generator: what a model draws before depends on torch's release.
    "noise of the same deviation": lambda resized, drawn: (
        torch.randn(resized.shape, generator=torch.Generator().manual_seed(2)) * resized.std()
    ),
    "transposed": lambda resized, drawn: resized.transpose(1, 2),
    "mirrored": lambda resized, drawn: resized.flip(2),
    "key - query": lambda resized, drawn: resized.flip(1, 2),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("img_size", [160, pytest.param(256, marks=pytest.mark.full)])
@pytest.mark.parametrize("block", [WINDOWS, DEFORMABLE])
def test_no_other_table_would_do(trained, block, img_size, wrong):
    """A table left at random, transposed or mirrored fails the task, so the test above is one of the resize."""
    solved = model(img_size, seed=1)
    table = solved.stages[2].blocks[block].attn.bias_table
    drawn = table.detach().clone()
    surgery.resize_for(solved, trained)
    with torch.no_grad():
        table.copy_(WRONG[wrong](table.clone(), drawn))
    assert accuracy(solved, block) < 0.5


@pytest.mark.parametrize("tiles", [(2, 2), (1, 3), (3, 2)])
def test_repeating_an_image_changes_nothing_but_the_tables(tiles):
    """At a multiple of the size, windows kept, without offsets and with empty deformable tables: tiles give the logits of one."""
    fixed = {"num_classes": 10, "blocks": ("L", "L", "LD", "D"), "offsets": False, "window_size": 4}
    torch.manual_seed(0)
    one = create("dat_atto", img_size=64, **fixed).eval()
    with torch.no_grad():
        for module in one.modules():
            if isinstance(module, DeformableAttention):
                module.bias_table.zero_()
            elif isinstance(module, WindowAttention):
                module.bias_table.normal_()
    many = create("dat_atto", img_size=tuple(64 * n for n in tiles), **fixed).eval()
    report = surgery.resize_for(many, dict(one.named_parameters()))
    assert report.names("resized") == [
        "stages.2.blocks.1.attn.bias_table",
        "stages.3.blocks.0.attn.bias_table",
    ]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(many(images.tile(1, 1, *tiles)), one(images), rtol=1e-4, atol=1e-5)


def test_the_blocks_are_what_they_are_taken_for():
    first, second = model(TRAINED).stages[2].blocks
    assert isinstance(first.attn, WindowAttention) and first.attn.window == (8, 8)
    assert isinstance(second.attn, DeformableAttention) and second.attn.size == (8, 8)


@pytest.mark.parametrize("img_size, told", [(64, False), (96, True), (128, False), (160, True)])
def test_without_tables_quarters_are_told_by_the_phase_of_the_last_patches_alone(img_size, told):
    """Where the last map but one has an odd half (14 at 224), the middle of the image falls inside a 2 x 2 patch of the last
    downsampling, and which half of it a place is in tells the quarters apart: docs/benchmarks/resolution.md."""
    torch.manual_seed(0)
    model = create("dat_atto", num_classes=10, img_size=img_size, offsets=False, blocks=["L", "L", "LD", "D"])
    model = model.double().eval()
    image = torch.randn(1, 3, img_size, img_size, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "table" in name:
                parameter.zero_()
        difference = (model(image) - model(image.roll((img_size // 2,) * 2, (-2, -1)))).abs().max().item()
    assert difference > 0.01 if told else difference < 1e-14
