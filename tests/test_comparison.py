"""Final losses, steps ratios and best learning rates, against hand calculation and brute force."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from recipes.comparison import (
    MANY_SEEDS,
    best_of_methods,
    chance_of_exclusion,
    eligible,
    final_loss,
    groups,
    paired_difference,
    steps_ratio,
    steps_to_reach,
)
from recipes.intervals import resamples
from recipes.study_results import read_runs, read_study_curves
from tests.study_fixtures import make_study, write_run

STEPS = np.array([100.0, 200.0, 300.0])


@pytest.fixture
def arms(tmp_path):
    """Makes arms from losses: {(placement, learning rate): [losses of seed 0, losses of seed 1, ...]}."""

    def make(table, **options):
        folders = [
            write_run(
                tmp_path / f"{placement}-{rate}-{seed}", seed, losses,
                diagnosis="diverged" if losses[-1] is None else None,
                norm_placement=placement, learning_rate=rate, **options,
            )
            for (placement, rate), runs in table.items()
            for seed, losses in enumerate(runs)
        ]  # fmt: skip
        return read_runs(folders)

    return make


@pytest.mark.parametrize(
    ("losses", "target", "step"),
    [
        ([3.0, 2.0, 1.0], 1.5, 250.0),
        ([3.0, 2.0, 1.0], 2.0, 200.0),
        ([3.0, 2.0, 1.0], 3.5, 100.0),
        ([3.0, 2.0, 1.0], 1.0, 300.0),
        ([3.0, 2.0, 1.0], 0.9, None),
        ([3.0, 1.0, 2.0], 1.5, 175.0),  # the first crossing, not the last
        ([np.nan, 2.0, 1.0], 2.5, 200.0),
        ([3.0, np.nan, np.nan], 1.0, None),
    ],
)
def test_updates_to_reach_a_loss(losses, target, step):
    assert steps_to_reach(STEPS, np.array(losses), target) == step


def test_the_ratio_is_above_one_for_the_arm_that_needs_fewer_updates(arms):
    # As in the paper: 1.4, with pre at the loss 1.69 after 500 updates and post after 700.
    pre = [2.6, 2.3, 2.0, 1.8, 1.69, 1.6, 1.55]
    post = [2.6, 2.5, 2.4, 2.2, 2.0, 1.8, 1.69]
    post, pre = arms({("post", 1e-4): [post], ("pre", 1e-4): [pre]}).arms
    ratio = steps_ratio(fast=pre, slow=post)
    assert ratio.ratio == pytest.approx(1.4)
    assert (ratio.target, ratio.slow_steps, ratio.n) == (1.69, 700, 1)
    assert np.isnan(ratio.low)
    assert np.isnan(ratio.high)
    back = steps_ratio(fast=post, slow=pre)
    assert (back.ratio, back.bound, back.not_reached) == (None, 1.0, 1.0)


def test_the_bootstrap_is_that_of_brute_force_over_pairs_of_seeds(arms):
    rng = np.random.default_rng(0)
    falls = np.linspace(3, 1, 8)
    slow_losses = [list(falls + 0.3 + rng.normal(0, 0.1, 8)) for _ in range(3)]
    fast_losses = [list(falls + rng.normal(0, 0.1, 8)) for _ in range(3)]
    slow, fast = arms({("post", 1e-4): slow_losses, ("pre", 1e-4): fast_losses}).arms
    steps = np.arange(100.0, 900.0, 100.0)
    ratios = []
    for chosen in product(range(3), repeat=3):
        slow_mean = np.mean([slow_losses[i] for i in chosen], axis=0)
        fast_mean = np.mean([fast_losses[i] for i in chosen], axis=0)
        reached = steps_to_reach(steps, fast_mean, slow_mean.min())
        ratios.append(steps[slow_mean.argmin()] / reached)
    ratio = steps_ratio(fast, slow)
    # Few seeds: the range of the resamples.
    assert (ratio.low, ratio.high) == pytest.approx((min(ratios), max(ratios)))
    assert ratio.low <= ratio.ratio <= ratio.high


@pytest.mark.parametrize(("seeds", "tail"), [(5, 0), (6, 0.025)])
def test_only_with_six_seeds_the_ends_are_percentiles(arms, seeds, tail):
    # Fast takes 100 updates a nat; the slow arm's loss is 2 at update 300: ratio 300 / (100 (4 - 2 + x)).
    shifts = np.linspace(-0.5, 0.5, seeds)
    fast_losses = [[3 + x, 2 + x, 1 + x] for x in shifts]
    fast, slow = arms({("pre", 1e-4): fast_losses, ("post", 1e-4): [[4, 3, 2]] * seeds}).arms
    means = shifts[resamples(seeds)].mean(axis=1)
    expected = 300 / (200 + 100 * np.quantile(means, [1 - tail, tail]))
    ratio = steps_ratio(fast, slow)
    assert ratio.few == (tail == 0)
    assert (ratio.low, ratio.high) == pytest.approx(expected, rel=1e-2)
    assert (ratio.high < 300 / 151) == (tail > 0)


def test_the_chance_that_the_range_of_few_seeds_leaves_out_the_truth_is_as_simulated():
    rng = np.random.default_rng(0)
    for n in range(2, MANY_SEEDS):
        draws = rng.normal(size=(2000, n))
        means = draws[:, resamples(n)].mean(axis=2)  # [draws, resamples]; the truth is 0
        excluded = ((means.min(axis=1) > 0) | (means.max(axis=1) < 0)).mean()
        assert chance_of_exclusion(n) == pytest.approx(excluded, abs=0.04)


def test_resamples_that_never_get_there_are_counted_and_censor_the_interval(arms):
    # Seed 0 of fast reaches the slow loss 1, seed 1 does not, their mean does.
    fast, slow = arms({("pre", 1e-4): [[3, 0.5], [3, 1.2]], ("post", 1e-4): [[3, 1], [3, 1]]}).arms
    ratio = steps_ratio(fast, slow)
    assert ratio.not_reached == 0.25
    assert ratio.low is None
    assert ratio.high == pytest.approx(200 / 180)


def test_only_seeds_that_both_have_are_paired(tmp_path):
    study = make_study(
        tmp_path, {"post": {"norm_placement": "post"}, "pre": {"norm_placement": "pre"}}, [0, 1]
    )
    post, pre = study.arms
    write_run(study.folder(post, 0), 0, [3.0, 2.0])
    write_run(study.folder(post, 1), 1, [3.0, 9.0])
    write_run(study.folder(pre, 0), 0, [2.0, 1.5])
    post, pre = read_study_curves(study).arms
    assert steps_ratio(pre, post).n == 1
    assert steps_ratio(pre, post).target == 2.0
    assert paired_difference(post, pre).mean == 0.5


def test_no_common_seed_gives_no_ratio(tmp_path):
    runs = [write_run(tmp_path / p, s, [3.0, 2.0], norm_placement=p) for s, p in enumerate(("post", "pre"))]
    assert steps_ratio(*read_runs(runs).arms) is None


def test_final_loss_leaves_out_what_diverged(arms):
    (arm,) = arms({("pre", 1e-4): [[3, 1.0], [3, 2.0], [3, None]]}).arms
    final = final_loss(arm)
    # t with one degree of freedom, 12.706, times sqrt(1/2) / sqrt(2).
    assert (final.mean, final.n) == (1.5, 2)
    assert final.high - final.mean == pytest.approx(12.706 / 2, rel=1e-3)
    assert len(arm.diverged) == 1


def test_a_rate_at_which_a_seed_diverged_is_not_the_best(arms):
    curves = arms(
        {
            ("post", 1e-4): [[3, 2.0], [3, 2.2]],
            ("post", 3e-4): [[3, 1.0], [3, None]],
            ("pre", 1e-4): [[3, 2.0], [3, 2.0]],
            ("pre", 3e-4): [[3, 1.5], [3, 1.5]],
            ("pre", 1e-3): [[3, 1.8], [3, 1.8]],
        }
    )
    best = best_of_methods(curves)
    assert {placement: arm.options["learning_rate"] for placement, arm in best.items()} == {
        "Post-LN": 1e-4,
        "Pre-LN": 3e-4,
    }
    assert not eligible(curves.arms[1])
    post, pre = groups(curves)
    assert pre.edge is None
    assert post.edge.startswith("the lowest learning rate tried")


@pytest.fixture
def uneven(tmp_path):
    """Makes groups from final losses by seed: {(placement, learning rate): {seed: loss}}."""

    def make(table):
        folders = [
            write_run(tmp_path / f"{p}{r}{seed}", seed, [5, loss], norm_placement=p, learning_rate=r)
            for (p, r), losses in table.items()
            for seed, loss in losses.items()
        ]
        return read_runs(folders)

    return make


def test_the_best_rate_is_chosen_on_seeds_that_all_its_rates_have_finished(uneven):
    # Seed 1 is hard. The lower rate is the better one on seed 0; its mean is the worse for seed 1.
    curves = uneven({("pre", 1e-4): {0: 2.0, 1: 4.0}, ("pre", 3e-4): {0: 2.5}})
    (group,) = groups(curves)
    assert group.best is curves.arms[0]
    assert best_of_methods(curves)["Pre-LN"] is curves.arms[0]
    assert group.note.endswith("chosen on the seeds that all have finished: 0")


def test_nothing_is_chosen_between_different_seeds(uneven):
    curves = uneven({("pre", 1e-4): {0: 2.0}, ("pre", 3e-4): {1: 2.5}})
    (group,) = groups(curves)
    assert group.best is None
    assert group.note == "its arms have no finished seed in common"
    assert best_of_methods(curves) == {}


def test_rates_without_a_finished_run_are_not_tried(tmp_path):
    runs = [
        write_run(tmp_path / f"{r}", 0, [5, r * 1e4], finished=r > 1e-4, learning_rate=r)
        for r in (1e-4, 3e-4, 1e-3)
    ]
    (group,) = groups(read_runs(runs))
    assert [arm.options["learning_rate"] for arm in group.tried] == [3e-4, 1e-3]
    assert group.edge.startswith("the lowest learning rate tried")


def test_groups_differ_in_more_than_the_learning_rate(tmp_path):
    runs = [
        write_run(tmp_path / f"{p}{w}{r}", 0, [3, 2], norm_placement=p, warmup_steps=w, learning_rate=r)
        for p, w, r in product(("post", "pre"), (0, 100), (1e-3, 2e-5))
    ]
    found = groups(read_runs([Path(run) for run in runs]))
    assert [group.label for group in found] == [
        "Post-LN, warmup_steps 0",
        "Post-LN, warmup_steps 100",
        "Pre-LN, warmup_steps 0",
        "Pre-LN, warmup_steps 100",
    ]
    assert all([arm.options["learning_rate"] for arm in group.arms] == [2e-5, 1e-3] for group in found)


def test_one_rate_is_no_choice(arms):
    (group,) = groups(arms({("pre", 1e-4): [[3, 2.0]]}))
    assert group.edge == "only one learning rate was tried"
