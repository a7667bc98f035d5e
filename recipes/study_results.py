"""What the runs of a comparison measured: curves by arm and seed, from run.json and metrics.jsonl."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import numpy as np

from recipes.arguments import DataArguments, PretrainingArguments
from recipes.errors import UserError
from recipes.run_record import OPERATIONAL, Metrics, model_settings
from recipes.study import Study, arm_label

# Null in a line where they were no number.
LOSSES = ("train_loss", "validation_loss", "grad_norm")
TRAIN = ("step", "train_loss", "learning_rate", "grad_norm", "tokens_seen", "elapsed_seconds")
# Where data comes from differs between machines; fingerprints say whether it is the same.
FROM_FINGERPRINTS = set(DataArguments.__dataclass_fields__) - {"max_seq_length"}
FINGERPRINTS = {
    "corpus_fingerprints": "corpora",
    "tokenizer_fingerprint": "tokenizer",
    "mask_fingerprint": "validation masks",
}
PLACEMENT, LEARNING_RATE = "norm_placement", "learning_rate"


@dataclass(frozen=True)
class RunCurves:
    """One run, whatever became of it."""

    folder: Path
    seed: int
    record: dict[str, Any]
    """run.json; empty where the run has not begun."""
    lines: list[dict[str, Any]]
    """metrics.jsonl."""
    problem: str | None = None
    """Why the run could not be read."""

    @cached_property
    def train(self) -> dict[str, np.ndarray]:
        """A column for each name of `TRAIN`, [train lines]; nan for what was no number."""
        lines = [line for line in self.lines if "train_loss" in line]
        return {name: _column(lines, name) for name in TRAIN}

    @cached_property
    def steps(self) -> np.ndarray:
        """Updates at which the run was validated, [validations]."""
        return _column(self._validations, "step")

    @cached_property
    def losses(self) -> np.ndarray:
        """Validation losses, nats a masked token, [validations]; nan for what was no number."""
        return _column(self._validations, "validation_loss")

    @property
    def _validations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "validation_loss" in line]

    def at_validations(self, name: str) -> np.ndarray:
        """A column of the training lines at the validations, linearly between the lines, [validations].

        Tokens and seconds begin at 0 and end with what the finished run says.
        """
        steps, values = self.train["step"], self.train[name]
        if name in ("tokens_seen", "elapsed_seconds"):
            end = [self.results] if self.results.get(name) is not None else []
            end = [line for line in end if not len(steps) or line["step"] > steps[-1]]
            steps = np.concatenate([[0.0], steps, _column(end, "step")])
            values = np.concatenate([[0.0], values, _column(end, name)])
        return np.interp(self.steps, steps, values) if len(steps) else np.full(len(self.steps), np.nan)

    @property
    def results(self) -> dict[str, Any]:
        """How the run ended; empty where it has not."""
        return self.record.get("results") or {}

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end, which may be divergence."""
        return bool(self.results)

    @property
    def final_loss(self) -> float:
        """Validation loss at the end of a finished run; nan where it diverged or has not ended."""
        loss = self.results.get("validation_loss")
        return np.nan if loss is None or self.diverged else float(loss)

    @property
    def diagnosis(self) -> str | None:
        """plateau, diverged or over-fitting: of the end, or of an unfinished run so far."""
        if self.finished:
            no_number = self.results.get("validation_loss") is None
            return self.results.get("diagnosis") or ("diverged" if no_number else None)
        return self._notices[-1]["diagnosis"] if self._notices else None

    @property
    def diagnosis_step(self) -> int | None:
        """Update at which `diagnosis` first showed."""
        if self.finished:
            step = self.results.get("diagnosis_step")
            return self.results["step"] if step is None and self.diagnosis else step
        return self._notices[-1]["step"] if self.diagnosis else None

    @property
    def ended_in_no_number(self) -> bool:
        """Whether a loss or gradient that was no number is what `diagnosis_step` tells.

        That is noticed at the next line only: it happened by then, not at that update.
        """
        step = self.diagnosis_step or 0
        lines = [line for line in [*self.lines, self.results] if line and line["step"] <= step]
        return self.diverged and any(line.get(name, 0.0) is None for line in lines for name in LOSSES)

    @property
    def _notices(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "diagnosis" in line]

    @property
    def diverged(self) -> bool:
        """Whether the loss rose for good or was no number."""
        return self.diagnosis == "diverged"

    @property
    def last_step(self) -> int:
        """Last update of which anything is known; 0 before the first."""
        return max((int(line["step"]) for line in [*self.lines, self.results] if line), default=0)

    @property
    def status(self) -> str:
        """For people: how far the run came, and what it shows."""
        if self.problem or not self.record:
            return self.problem or "not started"
        stage = "finished" if self.finished else f"unfinished at update {self.last_step:,}"
        if self.diagnosis is None:
            return stage
        when = "by" if self.ended_in_no_number else "at"
        trouble = f"{self.diagnosis} {when} update {self.diagnosis_step:,}"
        # Divergence may be the end.
        return trouble if self.finished and self.diverged else f"{stage}, {trouble}"


@dataclass(frozen=True)
class ArmCurves:
    """The runs of one setting, a run a seed."""

    name: str
    label: str
    options: dict[str, Any]
    """What may tell it from other arms, norm placement and learning rate always included."""
    runs: list[RunCurves]

    @property
    def placement(self) -> str:
        """Where its norms sit."""
        return self.options[PLACEMENT]

    @property
    def begun(self) -> list[RunCurves]:
        """Runs that have begun: what their troubles are counted out of."""
        return [run for run in self.runs if run.record]

    @property
    def finished(self) -> list[RunCurves]:
        """Runs that have come to their end."""
        return [run for run in self.runs if run.finished]

    @property
    def diverged(self) -> list[RunCurves]:
        """Runs that diverged, whether or not they have come to their end."""
        return [run for run in self.runs if run.diverged]

    @cached_property
    def mean_runs(self) -> list[RunCurves]:
        """What the arm's mean curve is made of: its finished runs, or all while there are none.

        Runs that diverged are left out: a mean with them says nothing, and final losses are without them too.
        """
        started = [run for run in self.runs if len(run.steps) and not run.diverged]
        return [run for run in started if run.finished] or started

    @cached_property
    def steps(self) -> np.ndarray:
        """Validations that all of `mean_runs` have, [steps]."""
        return _shared([run.steps for run in self.mean_runs])

    @cached_property
    def losses(self) -> np.ndarray:
        """Validation losses at `steps`, [seeds, steps]; nan for what was no number."""
        return _rows([(run.steps, run.losses) for run in self.mean_runs], self.steps)

    def at_steps(self, name: str) -> np.ndarray:
        """A column of the training lines at `steps`, mean over the seeds, [steps]."""
        curves = [(run.steps, run.at_validations(name)) for run in self.mean_runs]
        return _rows(curves, self.steps).mean(axis=0) if curves else np.empty(0)

    def training(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Updates of the training lines that all runs have, [steps], and a column there, [seeds, steps]."""
        steps = _shared([run.train["step"] for run in self.mean_runs])
        return steps, _rows([(run.train["step"], run.train[name]) for run in self.mean_runs], steps)


@dataclass(frozen=True)
class StudyCurves:
    """All arms of a comparison, validated on the same masks of the same text."""

    name: str
    arms: list[ArmCurves]
    seeds: list[int]
    unigram_cross_entropy: float
    """Loss of a model that knows word frequencies only, nats; nan before the first run has begun."""
    fingerprints: dict[str, Any]
    """Of corpora, tokenizer and validation masks: those of FINGERPRINTS that are known."""
    common: dict[str, Any]
    """Options that all runs share."""

    @property
    def runs(self) -> list[RunCurves]:
        """All runs, arm by arm."""
        return [run for arm in self.arms for run in arm.runs]


def read_study_curves(study: Study) -> StudyCurves:
    """What there is of a study, whichever of its runs are missing, unfinished, diverged or damaged.

    Raises:
        UserError: Runs were validated on other masks, or are of other corpora.
    """
    arms = []
    for arm in study.arms:
        runs = [_try_read(study.folder(arm, seed), seed) for seed in study.seeds]
        planned = settings({"options": study.arguments(arm, study.seeds[0]).to_dict()})
        arms.append((arm.name, arm.label, runs, planned | arm.options))
    return _compare(study.name, arms, study.seeds)


def read_runs(folders: list[Path]) -> StudyCurves:
    """Any runs: those whose settings differ in nothing but `seed` form one arm.

    An arm is labelled by the options that differ between the arms; a single arm by its folder's name.

    Raises:
        UserError: A folder is no run, two hold the same run, or their losses do not compare.
    """
    groups: dict[str, list[RunCurves]] = {}
    for folder in folders:
        run = read_run(folder)
        group = groups.setdefault(json.dumps(settings(run.record), sort_keys=True), [])
        for other in group:
            if other.seed == run.seed:
                raise UserError(f"runs {other.folder} and {folder}: same settings and seed; give one")
        group.append(run)
    kinds = [settings(runs[0].record) for runs in groups.values()]
    varying = sorted(_differing(kinds), key=_by_importance)
    labels = [
        arm_label({n: kind[n] for n in varying if n in kind}) or runs[0].folder.resolve().name
        for kind, runs in zip(kinds, groups.values(), strict=True)
    ]
    arms = list(zip(labels, labels, groups.values(), kinds, strict=True))
    names = [folder.resolve().name for folder in folders]
    name = ", ".join(names) if len(names) < 4 else f"{len(names)} runs"
    return _compare(name, arms, sorted({run.seed for runs in groups.values() for run in runs}))


def read_run(folder: Path) -> RunCurves:
    """One run.

    Raises:
        UserError: The folder holds no run, or a damaged one.
    """
    file = folder / "run.json"
    if not file.exists():
        raise UserError(f"runs {folder}: holds no run.json; give the output_dir of a run")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return RunCurves(folder, record["options"]["seed"], record, Metrics(folder / "metrics.jsonl").lines())
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"runs {folder}: its run.json is not readable") from None


def settings(record: dict[str, Any]) -> dict[str, Any]:
    """What decides the figures of a run besides data and seed: a flat table of options, defaults included."""
    left_out = OPERATIONAL | FROM_FINGERPRINTS | {"seed", "model"}
    options = PretrainingArguments().to_dict() | record["options"]
    own = {name: value for name, value in options.items() if name not in left_out}
    return own | model_settings(options["model"]) | _batches(record.get("updates", []))


def check_comparable(ours: dict[str, Any], other: dict[str, Any], names: str) -> None:
    """Refuse losses that do not compare.

    Args:
        ours: Fingerprints, or a run.json; what is not known yet is not compared.
        other: The same of the other.
        names: Who they are, for the message.

    Raises:
        UserError: Corpora, tokenizer or validation masks differ.
    """
    for key, what in FINGERPRINTS.items():
        if key in ours and key in other and ours[key] != other[key]:
            raise UserError(
                f"{names}: other {what} ({_short(other[key])}, not {_short(ours[key])}); "
                "their losses do not compare"
            )


def _try_read(folder: Path, seed: int) -> RunCurves:
    if not (folder / "run.json").exists():
        return RunCurves(folder, seed, {}, [])
    try:
        return read_run(folder)
    except UserError:
        return RunCurves(folder, seed, {}, [], problem="not readable")


def _compare(
    name: str, arms: list[tuple[str, str, list[RunCurves], dict[str, Any]]], seeds: list[int]
) -> StudyCurves:
    """Put arms (name, label, runs, settings) beside each other."""
    begun = [run for _, _, runs, _ in arms for run in runs if run.record]
    for run in begun:
        names = f"runs {begun[0].folder} and {run.folder}"
        check_comparable(begun[0].record, run.record, names)
        for line in run.lines:
            check_comparable(begun[0].record, line, names)
    kinds = [kind for *_, kind in arms]
    varying = [*dict.fromkeys([PLACEMENT, LEARNING_RATE, *_differing(kinds)])]
    record = begun[0].record if begun else {}
    # What runs resolved says more than what was planned: bf16 null, and hardware that differs.
    resolved = [settings(run.record) for run in begun] or kinds
    differing = {*_differing(kinds), *_differing(resolved)}
    return StudyCurves(
        name=name,
        arms=[
            ArmCurves(arm, label, {n: kind[n] for n in varying if n in kind}, runs)
            for arm, label, runs, kind in arms
        ],
        seeds=seeds,
        unigram_cross_entropy=float(record.get("unigram_cross_entropy", np.nan)),
        fingerprints={key: record[key] for key in FINGERPRINTS if key in record},
        common={n: value for n, value in resolved[0].items() if n not in differing},
    )


def _differing(kinds: list[dict[str, Any]]) -> list[str]:
    """Names of what is not the same in all tables; what one does not know is not compared."""
    first: dict[str, Any] = {}
    for kind in kinds:
        first = kind | first
    return [name for name, value in first.items() if any(kind.get(name, value) != value for kind in kinds)]


def _batches(updates: list[dict[str, Any]]) -> dict[str, Any]:
    """Blocks in an update of all processes together; of each stage where they differ."""
    sizes = [stage["global_batch_size"] for stage in updates]
    return {"global_batch_size": sizes[0] if len(set(sizes)) == 1 else sizes} if sizes else {}


def _by_importance(name: str) -> int:
    return [PLACEMENT, LEARNING_RATE].index(name) if name in (PLACEMENT, LEARNING_RATE) else 2


def _short(fingerprint: Any) -> str:
    return ", ".join(f[:12] for f in fingerprint) if isinstance(fingerprint, list) else str(fingerprint)[:12]


def _column(lines: Iterable[dict[str, Any]], name: str) -> np.ndarray:
    return np.array([np.nan if line.get(name) is None else line[name] for line in lines], dtype=np.float64)


def _shared(steps: list[np.ndarray]) -> np.ndarray:
    return reduce(np.intersect1d, steps) if steps else np.empty(0)


def _rows(curves: list[tuple[np.ndarray, np.ndarray]], steps: np.ndarray) -> np.ndarray:
    """Values of curves (steps, values) at steps that all of them have, [curves, steps]."""
    rows = [values[np.searchsorted(own, steps)] for own, values in curves]
    return np.array(rows, dtype=np.float64).reshape(len(curves), len(steps))
