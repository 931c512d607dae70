"""Finding images that are there twice, by a hash of their bytes."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dattrain.data.source.dataset import BadSample, Dataset, locate
from dattrain.data.source.index import to_json, write_atomically
from dattrain.data.workers import Workers

_CHUNK = 1024


def find_duplicates(source: Dataset, folder: Path, *, jobs: int = 1) -> NDArray[np.bool_]:
    """Which samples repeat the bytes of an earlier one: one bool per sample, numbered through the whole source.

    What repeats what is written to ``_duplicates.json`` in ``folder``. Reads every image once, in ``jobs`` processes;
    memory is 16 bytes a sample.
    """
    total = int(source.counts.sum())
    hashes = np.zeros((total, 16), dtype=np.uint8)

    def work(number: int) -> tuple[int, NDArray[np.uint8]]:
        out = []
        for item in range(number * _CHUNK, min(total, (number + 1) * _CHUNK)):
            try:
                data = source.read(*locate(source, item)).data
            except BadSample:
                data = b"bad %d" % item  # packing itself will report it
            out.append(blake2b(data, digest_size=16).digest())
        return number, np.frombuffer(b"".join(out), dtype=np.uint8).reshape(-1, 16)

    with Workers(work, count=-(-total // _CHUNK), workers=jobs if jobs > 1 else 0, in_order=False) as workers:
        for number, found in workers:
            hashes[number * _CHUNK : number * _CHUNK + len(found)] = found
    _, first, back = np.unique(hashes.view("V16").reshape(-1), return_index=True, return_inverse=True)
    original = first[back.reshape(-1)]
    repeated: NDArray[np.bool_] = original != np.arange(total)
    rows = []
    for item in np.flatnonzero(repeated).tolist():
        a, b = locate(source, item), locate(source, int(original[item]))
        rows.append(
            {
                "key": source.key(*a),
                "repeats": source.key(*b),
                "same_label": source.label(*a) == source.label(*b),
            }
        )
    write_atomically(folder / "_duplicates.json", to_json(rows, indent=1))
    return repeated
