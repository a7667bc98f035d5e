"""What a comparison found, in sentences with the doubts that belong to them."""

from itertools import permutations

from recipes.comparison import (
    MANY_SEEDS,
    Estimate,
    StepsRatio,
    best_of_methods,
    chance_of_exclusion,
    final_loss,
    groups,
    method_name,
    paired_difference,
    steps_ratio,
)
from recipes.study_results import LEARNING_RATE, ArmCurves, RunCurves, StudyCurves

DASH = "–"
# So many methods are compared each with each.
FEW = 3
DIAGNOSES = {
    "diverged": "diverged",
    "plateau": "did not get below the loss of a model without context (plateau)",
    "over-fitting": "over-fitted",
}


def short_answer(curves: StudyCurves) -> list[str]:
    """Completeness, the best of each placement, how far they differ, trouble, reserve: a sentence each."""
    best = best_of_methods(curves)
    return [
        _completeness(curves),
        *(_best_sentence(curves, arm) for arm in best.values()),
        *_difference_sentences(best),
        *_ratio_sentences(list(best.values())),
        *_trouble_sentences(curves),
        *_reserve(best),
    ]


def _completeness(curves: StudyCurves) -> str:
    ended = sum(run.finished for run in curves.runs)
    begun = sum(bool(run.record) for run in curves.runs)
    parts = [
        f"{ended} of {_count(len(curves.runs), 'run')} have ended "
        f"({_count(len(curves.arms), 'arm')}, {_count(len(curves.seeds), 'seed')})",
        f"{begun - ended} unfinished" if begun > ended else "",
        f"{len(curves.runs) - begun} not there" if len(curves.runs) > begun else "",
        "all of this is provisional" if ended < len(curves.runs) else "",
    ]
    return "; ".join(filter(None, parts)) + "."


def _count(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def _trouble_sentences(curves: StudyCurves) -> list[str]:
    troubled = [arm for arm in curves.arms if any(run.diagnosis for run in arm.runs)]
    if troubled:
        return [_trouble(arm) for arm in troubled]
    if not any(len(run.steps) for run in curves.runs):
        return ["Nothing has been measured yet."]
    return [f"No run diverged or stayed at the unigram cross-entropy ({curves.unigram_cross_entropy:.4f})."]


def _trouble(arm: ArmCurves) -> str:
    """What the runs of an arm suffered from, with the updates at which it first showed."""
    parts = []
    for diagnosis, words in DIAGNOSES.items():
        runs = [run for run in arm.runs if run.diagnosis == diagnosis]
        if runs:
            parts.append(f"{words} in {len(runs)} of {_count(len(arm.begun), 'run')}, {_when(runs)}")
    return f"{arm.label}: {'; '.join(parts)}."


def _when(runs: list[RunCurves]) -> str:
    """When the diagnoses of runs showed: for no number the update by which it was noticed."""
    sudden = {run.diagnosis_step for run in runs if run.ended_in_no_number}
    others = {run.diagnosis_step for run in runs if not run.ended_in_no_number}
    by = f"by update {_steps(sudden)}" if sudden else ""
    since = f"from update {_steps(others)} on" if others else ""
    return ", ".join(filter(None, [by, since]))


def _steps(steps: set[int | None]) -> str:
    return ", ".join(f"{step:,}" for step in sorted(steps))


def _best_sentence(curves: StudyCurves, arm: ArmCurves) -> str:
    group = next(group for group in groups(curves) if group.best is arm)
    rate = "" if LEARNING_RATE in arm.label else f" (learning rate {arm.options[LEARNING_RATE]:g})"
    words = f"Best {method_name(arm)}: {arm.label}{rate}, final validation loss "
    words += estimate_words(final_loss(arm))
    return f"{words}; {group.note}." if group.note else f"{words}."


def estimate_words(value: Estimate) -> str:
    """A mean with its interval and n."""
    if not value.n:
        return DASH
    if value.n == 1:
        return f"{value.mean:.4f} (n = 1, no interval)"
    return f"{value.mean:.4f} [{value.low:.4f}, {value.high:.4f}] (n = {value.n})"


def _difference_sentences(best: dict[str, ArmCurves]) -> list[str]:
    """The placement of the lowest mean final loss against each of the others."""
    if len(best) < 2:
        return ["There are not two placements or norms with a best arm: none are compared."]
    first, *others = sorted(best.values(), key=lambda arm: final_loss(arm).mean)
    return [_difference(first, other) for other in others]


def _difference(arm: ArmCurves, other: ArmCurves) -> str:
    """How much lower one of two arms ends, over the seeds that both have finished."""
    mine, theirs, paired = final_loss(arm), final_loss(other), paired_difference(other, arm)
    name, other_name = method_name(arm), method_name(other)
    if not paired.n:
        return f"The best of {name} and of {other_name} have no finished seed in common: not compared."
    if paired.mean < 0:
        return _difference(other, arm)
    words = f"Each at its best, {name} ends {paired.mean:.4f} nats below {other_name}"
    if paired.n == 1:
        return f"{words}; with one seed in common, chance is not ruled out."
    overlap = "overlap" if mine.high >= theirs.low and theirs.high >= mine.low else "do not overlap"
    shown = "includes 0, so no difference is shown" if paired.low <= 0 else "excludes 0"
    return (
        f"{words}; the two intervals {overlap}; paired by seed the difference is {estimate_words(paired)}, "
        f"which {shown}."
    )


def _ratio_sentences(best: list[ArmCurves]) -> list[str]:
    """Steps ratios both ways; of many, those of the one that ends lowest."""
    lowest = min(best, key=lambda arm: final_loss(arm).mean, default=None)
    pairs = permutations(best, 2)
    return [_ratio_sentence(*pair) for pair in pairs if len(best) <= FEW or pair[0] is lowest]


def _ratio_sentence(fast: ArmCurves, slow: ArmCurves) -> str:
    ratio = steps_ratio(fast, slow)
    one, other = method_name(fast), method_name(slow)
    if ratio is None:
        return f"Steps ratio of {one} against {other}: no finished seed in common."
    if ratio.ratio is None:
        words = ratio_words(ratio).removeprefix("not reached; ")
        return (
            f"{one} does not reach the best loss of {other} ({ratio.target:.4f}, after "
            f"{ratio.slow_steps:,.0f} updates): steps ratio {words}; {_hedge(ratio)}."
        )
    return (
        f"{one} reaches the best loss of {other} ({ratio.target:.4f}) after {ratio.fast_steps:,.0f} updates, "
        f"{other} after {ratio.slow_steps:,.0f}: steps ratio {ratio_words(ratio)}; {_hedge(ratio)}."
    )


def _hedge(ratio: StepsRatio) -> str:
    """What the resamples of a steps ratio allow to say."""
    if ratio.n == 1:
        return "one seed, so no interval"
    missed = f"; not reached in {ratio.not_reached:.0%} of the resamples" if ratio.not_reached else ""
    name = f"the {'range of the resamples' if ratio.few else '95 % interval'} over {ratio.n} seeds"
    above = ratio.low is not None and ratio.low > 1
    below = (ratio.high is not None and ratio.high < 1) or (ratio.high is None and ratio.bound <= 1)
    if not (above or below):
        return f"{name} does not exclude 1, so no difference in updates is shown{missed}"
    chance = f"{chance_of_exclusion(ratio.n):.0%} of comparisons of equal arms"
    weak = f"; with {ratio.n} seeds it leaves 1 out by chance in about {chance}" if ratio.few else ""
    return f"{name} lies {'above' if above else 'below'} 1{weak}{missed}"


def ratio_words(ratio: StepsRatio | None) -> str:
    """A steps ratio with its interval or range; an end at which the loss is not reached is said in words."""
    if ratio is None:
        return DASH
    middle = f"not reached; < {ratio.bound:.2f}" if ratio.ratio is None else f"{ratio.ratio:.2f}"
    if ratio.n == 1 or ratio.not_reached == 1:
        return middle
    low, high = ("not reached" if end is None else f"{end:.2f}" for end in (ratio.low, ratio.high))
    return f"{middle} [{low}, {high}]"


def _reserve(best: dict[str, ArmCurves]) -> list[str]:
    """What the fewest finished seeds among the best arms forbid to say."""
    fewest = min((final_loss(arm).n for arm in best.values()), default=MANY_SEEDS)
    if fewest >= MANY_SEEDS:
        return []
    return [
        f"With {_count(fewest, 'finished seed')} of an arm, small differences cannot be told from chance."
    ]
