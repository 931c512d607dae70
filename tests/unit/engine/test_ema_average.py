from __future__ import annotations

import torch

from dattrain.engine.ema import update_average


def test_an_average_of_shards_equals_that_of_the_whole():
    g = torch.Generator().manual_seed(0)
    whole, target = torch.randn(1001, generator=g), torch.randn(1001, generator=g)
    parts = [t.clone() for t in whole.split([3, 500, 498])]
    reference = [whole.clone()]
    for _ in range(5):
        update_average(reference, [target], 0.999)
        update_average(parts, list(target.split([3, 500, 498])), 0.999)
    assert torch.equal(torch.cat(parts), reference[0])
