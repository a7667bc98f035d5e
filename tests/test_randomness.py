"""Numbers from keys: uniform, independent, and permutations that are permutations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recipes.randomness import permute, random_bits, uniform


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63))
def test_permute_is_a_permutation(size, seed):
    assert sorted(permute(np.arange(size), size, seed)) == list(range(size))


def test_permute_moves_everything_about():
    # In a uniform permutation the mean distance of an element from its place is size / 3.
    size = 10_000
    moved = np.abs(permute(np.arange(size), size, 1) - np.arange(size)).mean()
    assert moved == pytest.approx(size / 3, rel=0.05)
    other = permute(np.arange(size), size, 2)
    assert (permute(np.arange(size), size, 1) == other).mean() < 0.01


def test_permute_with_a_size_for_each_element():
    sizes = np.array([5, 5, 5, 5, 5, 1000])
    result = permute(np.array([0, 1, 2, 3, 4, 999]), sizes, 7)
    assert sorted(result[:5]) == [0, 1, 2, 3, 4]
    assert list(result) == [int(permute(np.array([i]), n, 7)[0]) for i, n in zip([0, 1, 2, 3, 4, 999], sizes)]


def test_huge_ranges_cost_nothing():
    index = np.array([0, 10**12 - 1])
    result = permute(index, 10**12, 3)
    assert len(set(result)) == 2
    assert (result < 10**12).all()


def test_uniform_is_uniform_and_uncorrelated():
    u = uniform(5, np.arange(200)[:, None], np.arange(1000)[None])
    counts = np.histogram(u, bins=20, range=(0, 1))[0]
    chi_square = ((counts - 10_000) ** 2 / 10_000).sum()
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(u[:, 1:].ravel(), u[:, :-1].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(u[1:].ravel(), u[:-1].ravel())[0, 1]) < 0.01


def test_a_number_depends_on_its_key_only():
    alone = [int(random_bits(1, 2, i)) for i in range(10)]
    assert list(random_bits(1, 2, np.arange(10))) == alone
    assert len({int(random_bits(*key)) for key in [(1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (3,)]}) == 5
