"""What a resume by many ranks opens and reads, counted at the operating system's calls: nothing grows as ranks x ranks."""

from __future__ import annotations

import dataclasses
import errno
import shutil
from unittest import mock

import pytest
import torch
from many_ranks import Group, Local, counted, save, write
from state_fakes import write_shard

from dattrain.errors import UserError
from dattrain.state import checkpointer, gather
from dattrain.state.format import checkpoint, rank_file, retention
from dattrain.state.format.manifest import MANIFEST, rank_file_name, read_manifest
from dattrain.state.format.rank_file import Piece
from dattrain.state.writer import Staged, Writer

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


def test_a_save_costs_rank_0_a_few_calls_for_each_rank_and_the_others_nothing_more(tmp_path):
    found = {}
    for world in (8, 16):
        write(tmp_path / str(world), SHAPES, world, 2, value)
        found[world] = save(tmp_path / str(world), SHAPES, world, 2, retention.Policy(keep_last=1))
        assert [e.step for e in checkpoint.list_all(tmp_path / str(world) / "checkpoints")] == [8]
    for counts in found.values():
        for count in counts[1:]:
            assert (count.writes, count.synced, count.renamed, count.opens, count.stats) == (3, 1, 1, 0, 0)
    few, more = found[8][0], found[16][0]
    assert few.writes == more.writes and few.synced == more.synced and few.renamed == more.renamed
    # A marker is looked for, read and removed, and a file's size asked for, in the new checkpoint and in the old one.
    for name, most in {"opens": 1, "looked": 1, "stats": 2, "removed": 3}.items():
        assert getattr(more, name) - getattr(few, name) <= 8 * most, name


def test_a_rank_that_cannot_save_looks_at_nobodys_files(tmp_path, monkeypatch):
    """A full disk fails on all ranks at once: each file of each checkpoint, asked for by each of them, is ranks squared."""
    folder = write(tmp_path, SHAPES, 8, 2, value)
    monkeypatch.setattr(rank_file, "write", mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
    layout, manifest = rank_file.layout([Piece("param", "w", 0, 4)]), read_manifest(folder)
    staged = Staged(layout, memoryview(bytearray(layout.size)), mock.Mock())
    for rank in (3, 0):
        writer = Writer(folder.parent, rank, 8, 1.0, lambda: None)
        with counted() as count, pytest.raises(UserError, match="step 7 could not be written"):
            writer.write(folder.parent / ".new-x", manifest, staged)
        assert (count.opens, count.stats) == (0, 0) if rank else count.stats > 8


def test_verifying_opens_each_file_once(tmp_path):
    folder = write(tmp_path, SHAPES, 16, 2, value)
    with counted() as count:
        checkpoint.verify(folder)
    assert sorted(count.names) == sorted([MANIFEST, *map(rank_file_name, range(16))])


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
