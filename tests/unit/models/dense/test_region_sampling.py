"""The choice of candidates: a function of the image's own number, of exact size, and evenly spread."""

from __future__ import annotations

import pytest
import torch

from dattrain.models.dense.sampling import choose, hashes, key_of, sample


def key(value: float) -> torch.Tensor:
    return key_of(torch.tensor(value))


def test_keys_are_the_24_bits_of_a_uniform():
    noise = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24])
    assert key_of(noise).tolist() == [0, 1, 1 << 23, (1 << 24) - 1]


def test_hashes_are_those_of_integers_of_any_size():
    """In Python's integers, which never overflow."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
        x = ((x ^ (x >> 15)) * 0x735A2D97) % 2**32
        return x ^ (x >> 15)

    indices = [0, 1, 2, 269_999, 2**31, 2**32 - 1]
    for number in (0, 1, (1 << 24) - 1):
        expected = [mix(mix(index ^ mix(number)) ^ mix(number ^ (2**32 - 1))) for index in indices]
        assert hashes(torch.tensor(indices), torch.tensor(number)).tolist() == expected


def test_no_two_hashes_are_equal_and_they_spread_evenly():
    chosen = torch.zeros(2000)
    for number in range(400):
        found = hashes(torch.arange(2000), torch.tensor(number))
        assert len(found.unique()) == 2000
        chosen[found.topk(500, largest=False).indices] += 1
    # Each a binomial of 400 draws at 1/4: mean 100, standard deviation 8.66.
    assert float(chosen.mean()) == 100
    assert float(chosen.std()) == pytest.approx(8.66, rel=0.1)
    assert float((chosen - 100).abs().max()) < 5 * 8.66
    # Neighbouring keys choose independently: a quarter of a quarter in common.
    common = [
        len(set(choose(torch.arange(2000), 500, torch.tensor(n)).tolist()) & set(choose(torch.arange(2000), 500, torch.tensor(n + 1)).tolist()))
        for n in range(40)
    ]  # fmt: skip
    assert sum(common) / 40 == pytest.approx(125, abs=8)


def test_counts_are_exact_and_indices_are_of_their_kind():
    matched = torch.full((1000,), -1)
    matched[::10] = torch.arange(100) % 3
    matched[5::10] = -2
    positive, negative = sample(matched, key(0.3), total=128, positive_share=0.25)
    assert (len(positive), len(negative)) == (32, 96)
    assert bool((matched[positive] >= 0).all()) and bool((matched[negative] == -1).all())
    for found in (positive, negative):
        assert found.tolist() == sorted(set(found.tolist()))
    again = sample(matched, key(0.3), total=128, positive_share=0.25)
    assert torch.equal(positive, again[0]) and torch.equal(negative, again[1])
    other = sample(matched, key(0.3 + 2**-24), total=128, positive_share=0.25)
    assert not torch.equal(positive, other[0]) and not torch.equal(negative, other[1])


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [(3, 500, (3, 125)), (500, 20, (64, 20)), (0, 500, (0, 128)), (500, 0, (64, 0)), (2, 3, (2, 3)), (0, 0, (0, 0))],
)  # fmt: skip
def test_negatives_fill_what_positives_leave(positives, negatives, expected):
    matched = torch.cat([torch.zeros(positives), torch.full((negatives,), -1), torch.full((4,), -2)]).long()
    found = sample(matched, key(0.7), total=128, positive_share=0.5)
    assert tuple(len(each) for each in found) == expected
