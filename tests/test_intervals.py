"""Intervals over seeds, against closed formulas, a table of Student's t, and what intervals promise."""

from math import sqrt

import numpy as np
import pytest

from recipes.intervals import mean_interval, prediction_interval, resamples

# Two-sided 95 % quantiles of Student's t, from a printed table, by degrees of freedom.
T = {1: 12.706, 2: 4.303, 4: 2.776}


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_interval_of_a_mean_is_that_of_student(n):
    values = [float(i * i) for i in range(n)]
    mean = sum(values) / n
    half = T[n - 1] * sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    assert mean_interval(values) == pytest.approx((mean, mean - half, mean + half), rel=1e-3)


def test_each_column_is_treated_alone():
    rows = np.random.default_rng(0).normal(size=(4, 3))
    whole = np.array(mean_interval(rows))
    assert np.allclose(whole, np.array([mean_interval(column) for column in rows.T]).T)


@pytest.mark.parametrize("interval", [mean_interval, prediction_interval])
def test_one_seed_shows_no_spread(interval, recwarn):
    mean, low, high = interval([3.0])
    assert mean == 3.0
    assert np.isnan(low)
    assert np.isnan(high)
    assert not recwarn.list


def test_nineteen_of_twenty_new_draws_are_inside_the_prediction_interval():
    draws = np.random.default_rng(1).normal(size=(4, 20_000))  # three seen, one new
    _, low, high = prediction_interval(draws[:3])
    inside = ((draws[3] > low) & (draws[3] < high)).mean()
    assert inside == pytest.approx(0.95, abs=0.006)


def test_few_seeds_are_resampled_in_every_way_and_many_by_a_fixed_draw():
    assert {tuple(row) for row in resamples(3)} == {
        (a, b, c) for a in range(3) for b in range(3) for c in range(3)
    }
    assert len(resamples(5)) == 5**5
    many = resamples(8)
    assert many.shape == (10_000, 8)
    assert np.array_equal(many, resamples(8))
    assert np.bincount(many.ravel()) == pytest.approx([10_000] * 8, rel=0.05)
