from __future__ import annotations

import itertools
import os
import random
import zlib

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from state_fakes import write_shard

from dattrain.errors import Damaged
from dattrain.state.format import rank_file
from dattrain.state.format.prefetch import Span, prefetch
from dattrain.state.format.rank_file import BLOCK, Piece, Reader, layout


def sample(seed=0, big=BLOCK // 4 * 2 + 123):
    g = torch.Generator().manual_seed(seed)
    return {
        Piece("param", "a.weight", 5, big): torch.randn(big, generator=g),
        Piece("param", "b", 0, 7): torch.randn(7, generator=g),
        Piece("ema", "b", 0, 7): torch.randn(7, generator=g),
        Piece("param", "empty", 0, 0): torch.empty(0),
        Piece("buffer", "n", 0, 1, "I64", ()): torch.tensor(3),
        Piece("buffer", "flags", 0, 3, "BOOL", (3,)): torch.tensor([True, False, True]),
    }


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    tensors = sample()
    write_shard(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == {p.key for p in tensors}
    for piece, tensor in tensors.items():
        assert torch.equal(loaded[piece.key], tensor.reshape(loaded[piece.key].shape)), piece
    assert loaded["buffer/0/n"].shape == ()


def test_every_tensor_is_aligned_and_the_file_has_no_holes():
    made = layout(sample())
    assert len(made.header) % rank_file.PAGE == 0
    at = len(made.header)
    for piece, offset in zip(made.pieces, made.offsets):
        assert offset == at
        width = {"I64": 8, "F32": 4, "BOOL": 1}[piece.dtype]
        assert offset % width == 0
        at += piece.nbytes
    assert at == made.size


def test_digest_is_crc32_of_each_mebibyte(tmp_path):
    digest = write_shard(tmp_path / "x", sample())
    data = (tmp_path / "x").read_bytes()
    assert digest.size == len(data)
    for i in range(0, len(data), BLOCK):
        assert digest.block(i // BLOCK) == f"{zlib.crc32(data[i : i + BLOCK]):08x}"
    assert rank_file.Digest.from_json(digest.to_json()) == digest


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    "size",
    [
        rank_file.PAGE,
        rank_file.PAGE + 1,
        rank_file.CHUNK,
        rank_file.CHUNK + rank_file.PAGE - 1,
        3 * BLOCK + 5,
    ],
)
def test_write_of_any_length_is_exact(tmp_path, direct, size):
    import mmap

    area = mmap.mmap(-1, size)
    area[:] = os.urandom(size)
    digest = rank_file.write(tmp_path / "x", memoryview(area), 8, direct=direct)
    assert (tmp_path / "x").read_bytes() == area[:]
    assert digest.blocks == rank_file.checksums(memoryview(area))


def test_write_does_not_overwrite(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        rank_file.write(tmp_path / "x", memoryview(bytearray(10)), 8)
    assert (tmp_path / "x").read_text() == "mine"


def test_unaligned_memory_is_written_too(tmp_path):
    data = memoryview(bytearray(os.urandom(3 * rank_file.PAGE)))[1:]
    rank_file.write(tmp_path / "x", data, 8)
    assert (tmp_path / "x").read_bytes() == bytes(data)


def test_reader_ranges(tmp_path):
    digest = write_shard(tmp_path / "x", sample())
    data = (tmp_path / "x").read_bytes()
    rng = random.Random(0)
    with Reader(tmp_path / "x", digest) as reader:
        for _ in range(50):
            a = rng.randrange(len(data))
            b = rng.randrange(a, len(data))
            assert reader.read(a, b - a) == data[a:b]
        assert reader.pieces()[("param", "a.weight")][0][0].start == 5


def read_spans(files, *spans, **options):
    """(tag, offset, bytes) of the same ``spans`` of every file."""
    with prefetch(files, lambda _: spans, **options) as found:
        return [(tag, offset, bytes(part)) for _, parts in found for tag, offset, part in parts]


def test_reading_ahead_reads_every_block_once_and_in_pieces_of_at_most_one(tmp_path, monkeypatch):
    digests = [write_shard(tmp_path / f"x{i}", sample(i)) for i in range(2)]
    files = [(tmp_path / f"x{i}", d) for i, d in enumerate(digests)]
    data = [p.read_bytes() for p, _ in files]
    seen = []
    real = rank_file.read_block
    monkeypatch.setattr(
        rank_file,
        "read_block",
        lambda fd, path, d, i, **k: seen.append((path.name, i)) or real(fd, path, d, i, **k),
    )
    cuts = [0, 10, BLOCK - 3, BLOCK + 9, 2 * BLOCK, len(data[0]) - 1, len(data[0])]
    chosen = [Span(a, b, (a, b)) for a, b in itertools.pairwise(cuts)]
    with prefetch(files, lambda _: [*chosen[::-1], Span(17, 17, "empty")], depth=2) as found:
        for number, (spans, parts) in enumerate(found):
            assert spans == chosen
            out: dict[tuple[int, int], bytearray] = {}
            for tag, offset, part in parts:
                assert len(part) <= BLOCK
                assert len(out.setdefault(tag, bytearray())) == offset
                out[tag] += part
            assert out == {(a, b): data[number][a:b] for a, b in out} and len(out) == len(chosen)
    assert len(seen) == len(set(seen)) == 2 * -(-len(data[0]) // BLOCK)


def test_a_file_that_is_not_used_up_does_not_shift_the_next(tmp_path):
    files = [(tmp_path / f"x{i}", write_shard(tmp_path / f"x{i}", sample(i))) for i in range(2)]
    size = files[0][1].size
    with prefetch(files, lambda _: [Span(0, size, 0)]) as found:
        next(next(found)[1])
        _, parts = next(found)
        assert b"".join(p for _, _, p in parts) == files[1][0].read_bytes()


def test_reading_ahead_ends_its_thread_when_the_consumer_stops(tmp_path):
    import threading

    digest = write_shard(tmp_path / "x", sample())
    before = threading.active_count()
    with prefetch([(tmp_path / "x", digest)], lambda _: [Span(0, digest.size, 0)], depth=1) as found:
        next(found)
    assert threading.active_count() == before


@pytest.mark.parametrize("where", ["header", "middle", "last"])
def test_one_flipped_bit_is_noticed_with_its_place(tmp_path, where):
    path = tmp_path / "x"
    digest = write_shard(path, sample())
    at = {"header": 3, "middle": BLOCK + 1000, "last": digest.size - 1}[where]
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    block = at // BLOCK * BLOCK
    with pytest.raises(Damaged, match=f"x: bytes {block}-"):
        read_spans([(path, digest)], Span(0, digest.size, 0))
    if where != "header":
        # What is not read is not checked: whoever wants a part pays for its blocks and the header's alone.
        read_spans([(path, digest)], Span(0, 100, 0))
        read_spans([(path, digest)], Span(0, digest.size, 0), verify=False)


@pytest.mark.parametrize("size", [0, 1, 100, BLOCK, -1])
def test_a_truncated_or_longer_file_is_noticed_when_opened(tmp_path, size):
    digest = write_shard(tmp_path / "x", sample())
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data[:size] if size >= 0 else data + b"!")
    with pytest.raises(Damaged, match=f"bytes, not {digest.size}"):
        Reader(tmp_path / "x", digest)


def test_links_folders_and_pipes_are_not_shards(tmp_path):
    digest = write_shard(tmp_path / "x", sample())
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "folder", "pipe", "missing"):
        with pytest.raises(Damaged, match=name):
            Reader(tmp_path / name, digest)


def test_a_header_that_points_outside_the_file_is_refused(tmp_path):
    path = tmp_path / "x"
    write_shard(path, {Piece("param", "a", 0, 4): torch.ones(4)})
    data = path.read_bytes().replace(b'"data_offsets":[0,16]', b'"data_offsets":[8,24]')
    path.write_bytes(data)
    lying = rank_file.Digest(len(data), rank_file.PAGE, rank_file.checksums(memoryview(data)))
    with Reader(path, lying) as reader, pytest.raises(Damaged, match="outside the file"):
        reader.pieces()


@pytest.mark.parametrize(
    "header",
    [b"[]", b"{", b'{"a": 1}', b'{"noslash": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'],
)
def test_a_foreign_header_is_refused(tmp_path, header):
    text = header.ljust(64)
    data = len(text).to_bytes(8, "little") + text + bytes(4)
    (tmp_path / "x").write_bytes(data)
    digest = rank_file.Digest(len(data), 8 + len(text), rank_file.checksums(memoryview(data)))
    with Reader(tmp_path / "x", digest) as reader, pytest.raises(Damaged):
        reader.pieces()


def test_safe_open_slices_agree(tmp_path):
    tensors = sample()
    write_shard(tmp_path / "x", tensors)
    piece = next(iter(tensors))
    with safe_open(tmp_path / "x", "np") as file:
        assert np.array_equal(file.get_slice(piece.key)[10:20], tensors[piece][10:20].numpy())
