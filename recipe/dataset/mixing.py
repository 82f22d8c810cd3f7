"""The rows of an epoch, drawn from several sources in proportion to their weights."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from recipe.console import UserError


class Mixture:
    """Draws rows from sources in proportion to weights, and none again before its source is used up.

    Each source is an endless series of random orders of its rows. An epoch has as many rows as the dataset, and takes
    from each source the next rows of its series, as many as its weight says. So an epoch follows from its number and the
    seed alone: it is the same on every rank and after a resume.

    Args:
        source_of_row: int64 [rows], number of the source of each row of a dataset.
        weights: of each source; they need not sum to 1.
        names: of the sources, for messages.
    Attributes:
        counts: rows that an epoch takes from each source.
        available: rows that each source has.
    Raises:
        UserError: a source has no row.
    """

    def __init__(self, source_of_row: np.ndarray, weights: Sequence[float], names: Sequence[str]):
        self._rows = [np.flatnonzero(source_of_row == number) for number in range(len(weights))]
        self.available = [len(rows) for rows in self._rows]
        for name, available in zip(names, self.available, strict=True):
            if not available:
                raise UserError(f"{name}: has a weight and no row that can be used; leave it out.")
        exact = np.asarray(weights, dtype=float) / sum(weights) * len(source_of_row)
        counts = np.floor(exact).astype(int)
        largest = np.argsort(counts - exact, kind="stable")[: len(source_of_row) - counts.sum()]
        counts[largest] += 1  # those with the largest remainder, so that the sum is exact
        self.counts = counts.tolist()

    def order(self, epoch: int, seed: int) -> torch.Tensor:
        """Return the rows of an epoch (counted from 0) in their order, int64 [rows]."""
        drawn = []
        for source, (rows, count) in enumerate(zip(self._rows, self.counts, strict=True)):
            start, end = epoch * count, (epoch + 1) * count
            for series in range(start // len(rows), -(-end // len(rows))):
                shuffled = np.random.default_rng([seed, source, series]).permutation(rows)
                first = series * len(rows)
                drawn.append(shuffled[max(start - first, 0) : end - first])
        return torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(np.concatenate(drawn)))


def epoch_order(dataset: Any, epoch: int, seed: int) -> torch.Tensor:
    """Return a random order of the rows of a dataset, int64 [rows], or that of its `mixture` if it has one."""
    mixture = getattr(dataset, "mixture", None)
    if mixture is not None:
        return mixture.order(epoch, seed)
    return torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed + epoch))
