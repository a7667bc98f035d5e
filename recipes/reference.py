"""Reference curves: a study's results as one small file, and whether another run lies within their band."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.arguments import MODEL_OPTIONS, nearest
from recipes.errors import UserError
from recipes.figures import draw_against_bands, save_figure
from recipes.intervals import prediction_interval
from recipes.run_record import model_settings
from recipes.study import format_value
from recipes.study_results import (
    ArmCurves,
    RunCurves,
    StudyCurves,
    check_comparable,
    settings,
)

REFERENCES = Path(__file__).parent / "references"
FORMAT = 1
# Significant digits that are kept of a column; five decimals of a loss.
DIGITS = {"train_loss": 6, "grad_norm": 4, "learning_rate": 5, "tokens_seen": 12}
# Losses are kept to five decimals: a run that repeats another bit by bit must be inside.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Band:
    """A reference arm at the updates at which it and a run were validated, and how the run lies in it."""

    label: str
    differences: list[str]
    """Options in which the run differs from the arm, a line each."""
    seeds: int
    """Runs of the reference that the band is made of."""
    diverged: int
    """Runs of the reference that diverged, which are left out."""
    steps: np.ndarray
    """Updates, [validations]."""
    losses: np.ndarray
    """Of the run, nats, [validations]; nan for what was no number."""
    mean: np.ndarray
    """Of the reference, [validations]."""
    low: np.ndarray
    """Of its 95 % prediction interval for one new run, [validations]; nan with one seed."""
    high: np.ndarray
    left_out: int = 0
    """Validations of the run at updates at which not all runs of the arm were validated."""

    @property
    def inside(self) -> np.ndarray:
        """Whether each validation is inside, [validations]; a loss that is no number is not."""
        return (self.losses >= self.low - ROUNDING) & (self.losses <= self.high + ROUNDING)


@dataclass(frozen=True)
class Verdict:
    """A run beside the arms of a reference."""

    run: RunCurves
    reference: dict[str, Any]
    bands: list[Band]
    """That of the arm with the run's own options, or those of all arms."""
    matched: bool
    """Whether there is an arm with the run's own options."""

    @property
    def lines(self) -> list[str]:
        """What is to be said, a line each."""
        lines = [f"{self.run.folder} ({self.run.status}) against reference {self.reference['name']}"]
        if not self.matched:
            lines.append("no arm of the reference has the options of this run: compared with all")
        return lines + [line for band in self.bands for line in _band_lines(band)]


def write_reference(curves: StudyCurves, file: Path, command: str = "") -> Path:
    """Keep the finished runs of a comparison as a small JSON file.

    Args:
        curves: The comparison; arms without a finished run are left out.
        file: NAME.json, replaced where it exists.
        command: What makes the study again.

    Raises:
        UserError: No run is finished, or the file exists and is no reference.
    """
    if file.exists():
        read_reference(file)
    arms = [_arm(arm) for arm in curves.arms if arm.finished]
    if not arms:
        raise UserError(f"reference {file}: no run of {curves.name} is finished")
    reference = {
        "format": FORMAT,
        "name": file.stem,
        "command": command,
        **curves.fingerprints,
        "unigram_cross_entropy": curves.unigram_cross_entropy,
        "options": curves.common,
        "arms": arms,
    }
    text = json.dumps(reference, separators=(",", ":"), allow_nan=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    # A line a run: small, and still readable where versions of the file are compared.
    file.write_text(text.replace('{"label"', '\n{"label"').replace('{"seed"', '\n{"seed"') + "\n", "utf-8")
    return file


def _arm(arm: ArmCurves) -> dict[str, Any]:
    return {"label": arm.label, "options": arm.options, "runs": [_run(run) for run in arm.finished]}


def _run(run: RunCurves) -> dict[str, Any]:
    """Every validation of a run; columns of equal length."""
    columns = {name: _rounded(run.at_validations(name), digits) for name, digits in DIGITS.items()}
    return {
        "seed": run.seed,
        "diagnosis": run.diagnosis,
        "step": [int(step) for step in run.steps],
        "validation_loss": [_or_null(round(loss, 5)) for loss in run.losses],
        **columns,
    }


def _rounded(values: np.ndarray, digits: int) -> list[float | int | None]:
    numbers = [float(f"{value:.{digits}g}") for value in values]
    return [_or_null(int(x) if x.is_integer() else x) for x in numbers]


def _or_null(value: float) -> float | None:
    return value if np.isfinite(value) else None


def read_reference(name_or_file: str | Path) -> dict[str, Any]:
    """A shipped reference by its name, or any by its file.

    Raises:
        UserError: There is none, or it is not readable.
    """
    file = Path(name_or_file)
    if not file.is_file():
        file = REFERENCES / f"{name_or_file}.json"
    if not file.is_file():
        shipped = [other.stem for other in REFERENCES.glob("*.json")]
        hint = nearest(str(name_or_file), shipped) if shipped else "none is shipped; give a file"
        raise UserError(f"against {name_or_file}: no such reference; {hint}")
    try:
        reference = json.loads(file.read_text(encoding="utf-8"))
        known = reference["format"] == FORMAT and reference["arms"]
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"against {file}: not a reference of format {FORMAT}")
    return _completed(reference)


def _completed(reference: dict[str, Any]) -> dict[str, Any]:
    """The reference with every option of the models: those that came after it had their defaults."""
    for arm in reference["arms"]:
        given = reference["options"] | arm["options"]
        model = model_settings({name: value for name, value in given.items() if name in MODEL_OPTIONS})
        arm["options"] |= {name: value for name, value in model.items() if name in arm["options"]}
        own = {name: value for name, value in model.items() if name not in arm["options"]}
    return reference | {"options": reference["options"] | own}


def compare_with_reference(reference: dict[str, Any], run: RunCurves) -> Verdict:
    """Say where a run lies among the runs of a reference.

    Compared with the arm that has the run's own options, or with every arm where none has. At every update
    at which both were validated: inside or outside the 95 % prediction interval of one new run. Between its
    validations a reference says nothing: losses fall in curves, which lie below their chords. The
    reference's runs that diverged are left out of its bands.

    Args:
        reference: From `read_reference`.
        run: From `read_run`; finished or not.

    Raises:
        UserError: Corpus, tokenizer or validation masks differ, or the run has not been validated at an
            update at which the reference was.
    """
    check_comparable(reference, run.record, f"reference {reference['name']} and run {run.folder}")
    ours = settings(run.record)
    named = set().union(*(arm["options"] for arm in reference["arms"]))
    own = [arm for arm in reference["arms"] if not _differences(arm["options"], ours, named)]
    bands = [_band(arm, run, reference["options"] | arm["options"]) for arm in own or reference["arms"]]
    bands = [band for band in bands if band is not None]
    if not bands:
        raise UserError(
            f"run {run.folder}: no validation at an update at which reference {reference['name']} was "
            f"validated ({_updates(reference['arms'])}); give eval_steps that fit"
        )
    return Verdict(run, reference, bands, matched=bool(own))


def _updates(arms: list[dict[str, Any]]) -> str:
    """The updates at which the runs of a reference were validated, in short."""
    steps = sorted({step for arm in arms for run in arm["runs"] for step in run["step"]})
    return ", ".join(map(str, steps if len(steps) < 5 else [*steps[:3], "...", steps[-1]]))


def _differences(theirs: dict[str, Any], ours: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Options that are known of both and differ, in words."""
    return [
        f"{name} is {format_value(ours[name])}, the reference has {format_value(theirs[name])}"
        for name in sorted(names)
        if name in ours and name in theirs and ours[name] != theirs[name]
    ]


def _band(arm: dict[str, Any], run: RunCurves, options: dict[str, Any]) -> Band | None:
    """The band of an arm at the validations that it shares with a run; None where there are none."""
    runs = [one for one in arm["runs"] if one["diagnosis"] != "diverged"]
    diverged = len(arm["runs"]) - len(runs)
    differences = _differences(options, settings(run.record), options)
    if not runs:
        return Band(arm["label"], differences, 0, diverged, *[np.empty(0)] * 5)
    kept = np.isin(run.steps, list(set.intersection(*(set(one["step"]) for one in runs))))
    if not kept.any():
        return None
    steps, losses = run.steps[kept], run.losses[kept]
    band = prediction_interval([_at(one, steps) for one in runs])
    left_out = int((~kept).sum())
    return Band(arm["label"], differences, len(runs), diverged, steps, losses, *band, left_out=left_out)


def _at(run: dict[str, Any], steps: np.ndarray) -> np.ndarray:
    """Losses of a reference run at updates at which it was validated; nan for what was no number."""
    losses = dict(zip(run["step"], run["validation_loss"], strict=True))
    return np.array([np.nan if losses[step] is None else losses[step] for step in steps])


def _band_lines(band: Band) -> list[str]:
    seeds = band.seeds + band.diverged
    diverged = f", {band.diverged} diverged" if band.diverged else ""
    return [
        f"arm {band.label}: {seeds} seed{'s' * (seeds != 1)}{diverged}",
        *(f"  other option: {difference}" for difference in band.differences),
        *(f"  {line}" for line in _place_lines(band)),
    ]


def _place_lines(band: Band) -> list[str]:
    """Where the run lies in a band."""
    if not band.seeds:
        return ["every seed of the reference diverged: there is no band"]
    loss = "no number" if np.isnan(band.losses[-1]) else f"{band.losses[-1]:.4f}"
    last = f"validation loss {loss} at update {int(band.steps[-1]):,}"
    elsewhere = (
        [f"left out: {band.left_out} at updates at which the reference was not"] if band.left_out else []
    )
    if band.seeds == 1:
        return [*elsewhere, f"{last}, reference {band.mean[-1]:.4f}; it has one seed, so there is no band"]
    side = "inside" if band.inside[-1] else "outside"
    return [
        f"inside the 95 % prediction interval of one new run at {band.inside.sum()} of {len(band.steps)} "
        "validations",
        *elsewhere,
        f"{last} is {side} [{band.low[-1]:.4f}, {band.high[-1]:.4f}], mean {band.mean[-1]:.4f}",
    ]


def draw_verdict(verdict: Verdict, folder: Path) -> Path:
    """Draw the run on the bands into FOLDER/against_NAME_RUN.png (and .svg); returns the PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    run, name = verdict.run, verdict.run.folder.resolve().name
    bands = {b.label: (b.steps, b.mean, b.low, b.high) for b in verdict.bands if b.seeds}
    label = f"this run ({name}, seed {run.seed})"
    figure = draw_against_bands(
        (run.steps, run.losses), bands, verdict.reference["unigram_cross_entropy"], label
    )
    return save_figure(figure, folder, f"against_{verdict.reference['name']}_{name}")[1]
