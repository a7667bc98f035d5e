"""Which block is trained on when: sample = f(seed, position), so resuming is arithmetic."""

from dataclasses import dataclass

import numpy as np

from recipes.randomness import ORDER, permute


@dataclass(frozen=True)
class Samples:
    """n samples: block `block` of corpus `corpus`, seen for the `epoch`-th time; each int64 [n]."""

    corpus: np.ndarray
    block: np.ndarray
    epoch: np.ndarray


class SampleOrder:
    """A shuffled walk through one or several corpora, for ever.

    In one epoch of the mixture a corpus of B blocks and weight w gives round(w B) blocks: with w = 1 each
    block once, with w = 2 each twice, with w = 0.5 each in every second epoch.
    """

    def __init__(self, blocks: list[int], weights: list[float], *key: int) -> None:
        self.blocks = np.array(blocks, np.int64)
        self.draws = np.maximum(1, np.rint(np.array(weights) * self.blocks)).astype(np.int64)
        self.starts = np.cumsum(self.draws) - self.draws
        self.key = key

    @property
    def samples_per_epoch(self) -> int:
        """Blocks in one epoch of the mixture."""
        return int(self.draws.sum())

    def __call__(self, positions: np.ndarray) -> Samples:
        """The samples at `positions` (int64 [n], counted from the start of training)."""
        mixture_epoch, index = np.divmod(positions, self.samples_per_epoch)
        draw = permute(index, self.samples_per_epoch, ORDER, *self.key, mixture_epoch)
        corpus = np.searchsorted(self.starts, draw, side="right") - 1
        nth = mixture_epoch * self.draws[corpus] + draw - self.starts[corpus]
        epoch, index = np.divmod(nth, self.blocks[corpus])
        block = permute(index, self.blocks[corpus], ORDER, *self.key, corpus, epoch)
        return Samples(corpus, block, epoch)
