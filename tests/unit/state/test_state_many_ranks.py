"""What a resume by many ranks opens and reads, counted at the operating system's calls: nothing grows as ranks x ranks."""

from __future__ import annotations

import dataclasses
import shutil
from unittest import mock

import pytest
import torch
from many_ranks import Group, Local, counted, write
from state_fakes import write_shard

from dattrain.errors import UserError
from dattrain.state import checkpointer, gather
from dattrain.state.format import checkpoint, retention
from dattrain.state.format.manifest import MANIFEST, rank_file_name, read_manifest
from dattrain.state.format.rank_file import Piece

SHAPES = {"stem.weight": (48, 3, 4, 4), "stem.bias": (48,), "odd": (7,), "fc.weight": (300, 501), "scale": ()}


def value(state, name, start, numel):
    """Every element of the checkpoint is another number."""
    base = 1000 * ["param", "exp_avg", "exp_avg_sq", "ema"].index(state) + 100 * list(SHAPES).index(name)
    return base + torch.arange(start, start + numel, dtype=torch.float32) / 2**17


def resumed(tmp_path, before, after):
    """(counts by rank, bytes of the checkpoint, messages sent) of a resume from one (world, stage) at another; the state is right."""
    folder = write(tmp_path, SHAPES, *before, value)
    group = Group(tmp_path, SHAPES, *after)
    counts, _, states = group.resume(sorted({0, after[0] // 2, after[0] - 1}))
    for local in states:
        local.check(value)
    return counts, sum(p.stat().st_size for p in folder.iterdir()), sum(map(len, group.sent.values()))


@pytest.mark.parametrize("stage", [2, 3])
def test_on_the_same_ranks_a_rank_opens_its_own_shard(tmp_path, stage):
    counts, size, sent = resumed(tmp_path, (64, stage), (64, stage))
    assert sent == 0
    for rank, count in enumerate(counts[1:], 1):
        assert count.names == [rank_file_name(rank)]
    assert counts[0].opens <= 3, counts[0].names
    assert sum(c.nbytes for c in counts) <= 1.1 * size


@pytest.mark.parametrize(
    "before, after",
    [((64, 2), (64, 3)), ((16, 3), (7, 2)), ((16, 2), (1, 0)), ((5, 3), (16, 1)), ((16, 0), (16, 0))],
    ids=str,
)
def test_on_another_layout_a_shard_is_opened_once_in_all(tmp_path, before, after):
    counts, size, sent = resumed(tmp_path, before, after)
    assert sent == 3 * before[0], "the number of pieces, the table and the data of each shard"
    names = [name for count in counts for name in count.names if name != MANIFEST]
    # Rank 0 reads the buffers, wherever the rest of that shard goes.
    assert sorted(names) == sorted([rank_file_name(r) for r in range(before[0])] + names[:1])
    assert sum(c.nbytes for c in counts) <= 1.2 * size


def test_looking_for_checkpoints_opens_manifests_alone(tmp_path):
    write(tmp_path, SHAPES, 64, 2)
    for look in (checkpoint.find, lambda root: retention.prune(root, retention.Policy())):
        with counted() as count:
            look(tmp_path / "checkpoints")
        assert count.names == [MANIFEST]


def replaced(folder, files):
    """Make ``files`` those of the checkpoint."""
    manifest = read_manifest(folder)
    (folder / MANIFEST).write_bytes(dataclasses.replace(manifest, files=files).render())


def hole(folder):
    files = dict(read_manifest(folder).files)
    del files[rank_file_name(1)]
    replaced(folder, files)


def overlap(folder):
    files = dict(read_manifest(folder).files)
    shutil.copy(folder / rank_file_name(1), folder / rank_file_name(3))
    replaced(folder, {**files, rank_file_name(3): files[rank_file_name(1)]})


def overlap_in_one_file(folder):
    pieces = {Piece("param", n, 0, 1): torch.zeros(1) for n in SHAPES if n != "odd"}
    pieces |= {Piece("param", "odd", at, n): torch.zeros(n) for at, n in ((0, 5), (3, 4))}
    pieces[Piece("buffer", "calls", 0, 1, "I64", ())] = torch.tensor(7)
    (folder / rank_file_name(0)).unlink()
    digest = write_shard(folder / rank_file_name(0), pieces)
    replaced(folder, {rank_file_name(0): digest})


@pytest.mark.parametrize("world, harm", [(3, hole), (3, overlap), (1, overlap_in_one_file)])
def test_a_hole_and_an_overlap_are_damage_whatever_the_checksums_say(tmp_path, world, harm):
    harm(write(tmp_path, SHAPES, world, 3, value))
    local = Local(SHAPES, 0, 1, 3)
    with (
        mock.patch.object(checkpointer, "LocalState", lambda engine: engine),
        pytest.raises(UserError, match="elements exactly once"),
    ):
        checkpointer.Checkpointer(tmp_path).resume(local, None)
    with pytest.raises(UserError, match="elements exactly once"):
        gather.load_tensors(tmp_path)


def test_whole_tensors_are_put_together_in_groups_each_in_one_pass(tmp_path, monkeypatch):
    folder = write(tmp_path, SHAPES, 64, 3, value)
    for limit, passes in ((1 << 30, 1), (4096, 4)):
        monkeypatch.setattr(gather, "GROUP", limit)
        with counted() as count:
            found = dict(gather.iter_tensors(folder, "ema"))
        assert list(found) == list(SHAPES)
        for name, tensor in found.items():
            assert torch.equal(tensor.reshape(-1), value("ema", name, 0, tensor.numel()))
        assert count.opens == 64 * passes + 2, "shards, and the manifest twice"
