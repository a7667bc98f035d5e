"""The order of blocks: every block once an epoch, weights respected, nothing but arithmetic."""

from collections import Counter

import numpy as np
import pytest

from recipes.sampling import SampleOrder


def pairs(samples):
    return list(zip(samples.corpus.tolist(), samples.block.tolist()))


def test_every_block_once_an_epoch_in_a_new_order():
    order = SampleOrder([37, 11], [1.0, 1.0], 42, 0)
    first, second = order(np.arange(48)), order(np.arange(48, 96))
    everything = {(0, b) for b in range(37)} | {(1, b) for b in range(11)}
    assert set(pairs(first)) == set(pairs(second)) == everything
    assert pairs(first) != pairs(second)
    assert set(first.epoch) == {0}
    assert set(second.epoch) == {1}


@pytest.mark.parametrize(("weight", "epochs"), [(2.0, 1), (0.5, 2), (0.25, 4)])
def test_weights_are_passes_per_epoch(weight, epochs):
    order = SampleOrder([40, 20], [1.0, weight], 3)
    samples = order(np.arange(epochs * order.samples_per_epoch))
    seen = Counter(block for corpus, block in pairs(samples) if corpus == 1)
    assert seen == {block: round(weight * epochs) for block in range(20)}
    # A block seen again is another epoch, so that it is masked anew.
    triples = zip(samples.corpus, samples.block, samples.epoch)
    assert len(set(triples)) == len(samples.block)


def test_any_slice_is_the_same_as_the_whole_walk():
    order = SampleOrder([100], [1.0], 9)
    whole = order(np.arange(250)).block
    pieces = np.concatenate([order(np.arange(a, a + 25)).block for a in range(0, 250, 25)])
    assert (whole == pieces).all()


def test_seeds_differ():
    a, b = (SampleOrder([1000], [1.0], seed)(np.arange(1000)).block for seed in (1, 2))
    assert (a == b).mean() < 0.02
