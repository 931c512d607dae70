"""What frozen features are worth: weighted nearest neighbours, and a linear classifier on top of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dattrain.errors import UserError


def knn(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    *,
    classes: int,
    k: int,
) -> Tensor:
    """Class votes of the k nearest training features by cosine, weighted exp(similarity / temperature).

    Wu et al. 2018 (arXiv 1805.01978); the temperature is DINO's (Caron et al. 2021).

    Args:
        train: N x C, test: M x C, any scale.
        train_labels: N int64.

    Returns:
        M x classes float32, rows sum to one.
    """
    bank = F.normalize(train, dim=1)
    k = min(k, len(bank))
    out = []
    for part in F.normalize(test, dim=1).split(1024):
        near = (part @ bank.T).topk(k, dim=1)
        weight = ((near.values - 1) / 0.07).exp()
        votes = torch.zeros(len(part), classes).scatter_add_(1, train_labels[near.indices], weight)
        out.append(votes / votes.sum(1, keepdim=True))
    return torch.cat(out)


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    *,
    classes: int,
) -> tuple[torch.nn.Linear, float]:
    """Multinomial logistic regression on standardised features, by L-BFGS.

    The weight decay is chosen from 1e-6 to 1e-2 on a tenth of the training set that is held out, then all of it is used.

    Args:
        train: N x C float32; train_labels: N int64.

    Returns:
        The classifier, for features as they come, and the weight decay chosen.

    Raises:
        UserError: fewer than two classes in the training set.
    """
    if len(train_labels.unique()) < 2:
        raise UserError("a linear probe needs training images of two classes at least")
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    x = (train - mean) / std
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    validation, rest = order[: len(x) // 10], order[len(x) // 10 :]
    decays = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    best = decays[0]
    if len(validation):

        def accuracy(decay: float) -> float:
            fit = _regress(x[rest], train_labels[rest], classes, decay)
            return float((fit(x[validation]).argmax(1) == train_labels[validation]).float().mean())

        best = max(decays, key=accuracy)
    fit = _regress(x, train_labels, classes, best)
    # Fold the standardisation in, so that the classifier takes raw features.
    with torch.no_grad():
        fit.weight.div_(std)
        fit.bias.sub_(fit.weight @ mean)
    return fit, best


def _regress(x: Tensor, labels: Tensor, classes: int, decay: float) -> torch.nn.Linear:
    layer = torch.nn.Linear(x.shape[1], classes)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=100, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(())
        for part, answers in zip(x.split(65536), labels.split(65536)):
            loss = F.cross_entropy(layer(part), answers, reduction="sum") / len(x)
            loss.backward()
            total += loss.detach()
        penalty = decay / 2 * layer.weight.square().sum()
        penalty.backward()
        return total + penalty.detach()

    optimizer.step(closure)
    return layer
