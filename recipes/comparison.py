"""What the curves of a comparison say: final losses, steps ratios, best learning rate of each setting.

Steps ratio: updates at which the slow arm reaches its own best loss, divided by the updates at which the fast
arm reaches that loss. More than 1: the fast arm needs fewer. Xiong et al. 2020 (arXiv 2002.04745), section
4.2, give 700k / 500k = 1.4 for BERT-base at validation loss 1.69; the sentence as printed gives 500k to
Post-LN, against its own conclusion: the two names are swapped.
"""

import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from recipes.intervals import CONFIDENCE, mean_interval, resamples
from recipes.study import format_value
from recipes.study_results import LEARNING_RATE, PLACEMENT, ArmCurves, StudyCurves

# With fewer seeds a percentile bootstrap is far from 95 %: the range of all resamples is given in its place.
MANY_SEEDS = 6


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval; nan where there is none."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class StepsRatio:
    """How many times as many updates the slow arm needs for its own best loss as the fast arm does."""

    target: float
    """Best loss of the slow arm's mean curve, nats."""
    slow_steps: float
    """Updates at which the slow arm reaches it."""
    fast_steps: float | None
    """Updates at which the fast arm does; None: not within its run."""
    bound: float
    """What the ratio is less than where the fast arm does not reach the loss."""
    low: float | None
    """Of the 95 % percentile interval, or of the range of all resamples where seeds are `few`.

    None: the fast arm does not reach the loss. nan for one seed.
    """
    high: float | None
    """Likewise."""
    not_reached: float
    """Share of the resamples in which the fast arm does not reach the slow one's best loss."""
    n: int
    """Seeds that both arms have finished."""

    @property
    def ratio(self) -> float | None:
        """More than 1: the fast arm needs fewer updates; None: not reached, less than `bound`."""
        return None if self.fast_steps is None else self.slow_steps / self.fast_steps

    @property
    def few(self) -> bool:
        """Whether there are too few seeds for an interval that could be called one of 95 %."""
        return self.n < MANY_SEEDS


def chance_of_exclusion(n: int) -> float:
    """How often the range of all resamples of the mean of n seeds leaves out the truth, by chance.

    It does where all n lie on one side of it, which n draws from a symmetric distribution do in 2 of 2^n
    cases.
    """
    return 2.0 ** (1 - n)


@dataclass(frozen=True)
class Group:
    """Arms that differ in nothing but the learning rate."""

    label: str
    placement: str
    arms: list[ArmCurves]
    """By rising learning rate."""

    @property
    def best(self) -> ArmCurves | None:
        """The arm of the best learning rate, by `best_arm`."""
        return best_arm(self.arms)

    @property
    def tried(self) -> list[ArmCurves]:
        """Arms of the learning rates of which a run has come to its end."""
        return [arm for arm in self.arms if arm.finished]

    @property
    def note(self) -> str:
        """What is to be known of the choice, in words; empty: nothing."""
        candidates = list(filter(eligible, self.arms))
        if not candidates:
            return "no arm has ended without a diverged seed"
        seeds = common_seeds(candidates)
        if not seeds:
            return "its arms have no finished seed in common"
        most = max(final_loss(arm).n for arm in candidates)
        chosen = f"chosen on the seeds that all have finished: {', '.join(map(str, sorted(seeds)))}"
        return "; ".join(filter(None, [self.edge, chosen if len(seeds) < most else None]))

    @property
    def edge(self) -> str | None:
        """What limits the choice of the learning rate, in words; None: rates on both sides were tried."""
        if self.best is None:
            return None
        if len(self.tried) == 1:
            return "only one learning rate was tried"
        if self.best is self.tried[0] or self.best is self.tried[-1]:
            side = "lowest" if self.best is self.tried[0] else "highest"
            return f"the {side} learning rate tried: the best may lie outside the grid"
        return None


def final_loss(arm: ArmCurves, seeds: Collection[int] | None = None) -> Estimate:
    """Validation loss at the end, over the seeds that finished without diverging, or these among them."""
    runs = [run for run in arm.finished if not run.diverged]
    return _estimate([run.final_loss for run in runs if seeds is None or run.seed in seeds])


def eligible(arm: ArmCurves) -> bool:
    """Whether an arm may be called the best: a seed is finished, and none diverged."""
    return final_loss(arm).n > 0 and not arm.diverged


def common_seeds(arms: Iterable[ArmCurves]) -> set[int]:
    """Seeds that all arms have finished."""
    finished = [{run.seed for run in arm.finished} for arm in arms]
    return set.intersection(*finished) if finished else set()


def best_arm(arms: Iterable[ArmCurves]) -> ArmCurves | None:
    """The eligible arm of the lowest mean final loss, over the seeds that all eligible ones have finished.

    Seeds differ by more than learning rates may: means over different ones choose no arm.

    Returns:
        None where no arm is eligible, or those that are have no finished seed in common.
    """
    candidates = list(filter(eligible, arms))
    seeds = common_seeds(candidates)
    return min(candidates, key=lambda arm: final_loss(arm, seeds).mean) if seeds else None


def paired_difference(arm: ArmCurves, other: ArmCurves) -> Estimate:
    """Final loss of `arm` less that of `other`, over the seeds both have: same seed, same data order."""
    mine = {run.seed: run.final_loss for run in arm.finished}
    theirs = {run.seed: run.final_loss for run in other.finished}
    differences = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    return _estimate([value for value in differences if np.isfinite(value)])


def _estimate(values: list[float]) -> Estimate:
    if not values:
        return Estimate(np.nan, np.nan, np.nan, 0)
    return Estimate(*map(float, mean_interval(values)), n=len(values))


def steps_to_reach(steps: np.ndarray, losses: np.ndarray, target: float) -> float | None:
    """Updates at which a curve first reaches a loss, linearly between two validations.

    Args:
        steps: [validations], rising.
        losses: [validations]; what is no number reaches nothing.
        target: Loss to reach.

    Returns:
        None where the curve does not reach it. The first validation where that is low enough already.
    """
    step = _crossings(steps, losses[None], np.array([target]))[0]
    return None if np.isnan(step) else float(step)


def _crossings(steps: np.ndarray, losses: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """First crossing of each row of losses [rows, steps] with its target [rows]; nan where there is none."""
    losses = np.where(np.isfinite(losses), losses, np.inf)
    reached = losses <= targets[:, None]
    after = reached.argmax(axis=1)
    before = np.maximum(after - 1, 0)
    row = np.arange(len(losses))
    above, below = losses[row, before], losses[row, after]
    # From no number to a number there is no line: the validation itself counts.
    known = (after > 0) & np.isfinite(above)
    share = np.ones(len(losses))
    share[known] = (above[known] - targets[known]) / (above[known] - below[known])
    crossing = steps[before] + share * (steps[after] - steps[before])
    return np.where(reached.any(axis=1), crossing, np.nan)


def steps_ratio(fast: ArmCurves, slow: ArmCurves) -> StepsRatio | None:
    """The steps ratio of two arms over the seeds that both have finished.

    Mean curves over seeds; bootstrap over pairs of runs with the same seed, which see the same data in the
    same order. A resample in which `fast` never gets there counts as less than every ratio.

    Returns:
        None where they have no finished seed in common.
    """
    seeds = sorted({run.seed for run in fast.mean_runs} & {run.seed for run in slow.mean_runs})
    if not (seeds and fast.finished and slow.finished and len(fast.steps) and len(slow.steps)):
        return None
    fast_losses, slow_losses = _of_seeds(fast, seeds), _of_seeds(slow, seeds)
    target, slow_at, fast_at = _race(fast, slow, fast_losses.mean(0)[None], slow_losses.mean(0)[None])
    if not np.isfinite(target[0]):
        return None
    chosen = resamples(len(seeds))  # [resamples, seeds]
    # [resamples, seeds, steps] -> [resamples, steps]
    _, slow_all, fast_all = _race(fast, slow, fast_losses[chosen].mean(1), slow_losses[chosen].mean(1))
    low, high = _ends(slow_all / fast_all, len(seeds)) if len(seeds) > 1 else (np.nan, np.nan)
    return StepsRatio(
        target=float(target[0]),
        slow_steps=float(slow_at[0]),
        fast_steps=None if np.isnan(fast_at[0]) else float(fast_at[0]),
        bound=float(slow_at[0] / fast.steps[-1]),
        low=low,
        high=high,
        not_reached=float(np.isnan(fast_all).mean()),
        n=len(seeds),
    )


def _of_seeds(arm: ArmCurves, seeds: list[int]) -> np.ndarray:
    order = [run.seed for run in arm.mean_runs]
    return arm.losses[[order.index(seed) for seed in seeds]]


def _race(
    fast: ArmCurves, slow: ArmCurves, fast_means: np.ndarray, slow_means: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Best loss of each slow curve, and the updates at which slow and fast reach it, each [rows]."""
    slow_means = np.where(np.isfinite(slow_means), slow_means, np.inf)
    targets = slow_means.min(axis=1)
    return targets, slow.steps[slow_means.argmin(axis=1)], _crossings(fast.steps, fast_means, targets)


def _ends(ratios: np.ndarray, n: int) -> tuple[float | None, float | None]:
    """95 % percentile interval of resampled ratios, or their range with few seeds.

    What is nan is less than every number; None for such an end.
    """
    ordered = np.where(np.isnan(ratios), -np.inf, ratios)
    tail = (1 - CONFIDENCE) / 2 if n >= MANY_SEEDS else 0.0
    ends = np.quantile(ordered, [tail, 1 - tail], method="inverted_cdf")
    low, high = (float(end) if np.isfinite(end) else None for end in ends)
    return low, high


def groups(curves: StudyCurves) -> list[Group]:
    """Arms by all that may tell them apart but the learning rate, in the order of the arms."""
    found: dict[str, list[ArmCurves]] = {}
    for arm in curves.arms:
        found.setdefault(json.dumps(_group_options(arm), sort_keys=True), []).append(arm)
    return [
        Group(
            label=_group_label(_group_options(arms[0])),
            placement=arms[0].placement,
            arms=sorted(arms, key=lambda arm: arm.options[LEARNING_RATE]),
        )
        for arms in found.values()
    ]


def _group_options(arm: ArmCurves) -> dict[str, Any]:
    return {name: value for name, value in arm.options.items() if name != LEARNING_RATE}


def _group_label(options: dict[str, Any]) -> str:
    words = [f"{n} {format_value(v)}" for n, v in options.items() if n != PLACEMENT]
    return ", ".join([placement_name(options[PLACEMENT]), *words])


def placement_name(placement: str) -> str:
    """The literature's name of a norm placement."""
    return {"post": "Post-LN", "pre": "Pre-LN"}.get(placement, placement)


def method_name(arm: ArmCurves) -> str:
    """The placement's name, and the norm where a study has several."""
    norm = arm.options.get("norm_type")
    return placement_name(arm.placement) + (f" with {norm}" if norm else "")


def best_of_methods(curves: StudyCurves) -> dict[str, ArmCurves]:
    """The best among the best arms of each placement and norm that has one, in the order of the arms."""
    best = {}
    for method in dict.fromkeys(method_name(arm) for arm in curves.arms):
        arms = [group.best for group in groups(curves) if group.best and method_name(group.best) == method]
        if (chosen := best_arm(arms)) is not None:
            best[method] = chosen
    return best
