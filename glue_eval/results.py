"""A folder of results: one file a run, finished or absent, and what follows from all of them."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from glue_eval.finetuning import FORMAT, Job, Outcome
from glue_eval.models import load_tokenizer, quiet
from glue_eval.tasks import TASKS
from recipes.checkpointing import write_model
from recipes.errors import UserError
from recipes.files import aside_of, cached_folder, is_aside, write_json
from recipes.intervals import mean_interval
from recipes.run_record import check_writable

# Of each run in results.json, besides the metrics of its task.
KEPT = ("seed", "epoch", "score", "validation_loss", "degenerate", "diverged")
SETTINGS = "settings.json"
RUNS = "runs"


class Results:
    """What there is in an output folder."""

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir

    def check(self, settings: dict[str, Any]) -> None:
        """Refuse a folder of other settings or of other things.

        Args:
            settings: What decides the figures; tasks that are new to the folder are no difference.

        Raises:
            UserError: Names the difference.
        """
        file, where = self.output_dir / SETTINGS, f"output_dir {self.output_dir}"
        if not file.exists():
            if self._is_foreign():
                raise UserError(f"{where}: holds files but no GLUE results; choose an empty or a new folder")
            check_writable(self.output_dir)
            return
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            different = _differences(settings, found)
        except (ValueError, AttributeError, TypeError):
            raise UserError(f"{where}: its {SETTINGS} is not readable; choose another folder") from None
        if different and any(self._files()):
            raise UserError(f"{where}: holds results of other settings ({different}); choose another folder")

    def _is_foreign(self) -> bool:
        folder = self.output_dir
        return folder.exists() and not (folder.is_dir() and all(map(is_aside, folder.iterdir())))

    def begin(self, settings: dict[str, Any]) -> None:
        """Write down what the folder's figures rest on; nothing where it is there already."""
        file = self.output_dir / SETTINGS
        found = self.settings() if self._files() else {}
        merged = found | settings | {"data": found.get("data", {}) | settings["data"]}
        if merged != found:
            with self._writing():
                self.output_dir.mkdir(parents=True, exist_ok=True)
                write_json(file, merged)

    def settings(self) -> dict[str, Any]:
        """What the folder's figures rest on; empty where nothing has begun."""
        file = self.output_dir / SETTINGS
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what the disk says into an error for people: no other run would end better."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"output_dir {self.output_dir}: cannot be written ({error.strerror}); "
                "the same command goes on where it stopped"
            ) from error

    def file(self, job: Job) -> Path:
        """The file of a run."""
        model = job.model
        name = f"{Path(model.source.path).name}-{model.fingerprint[:8]}"
        name += "-scratch" if model.source.from_scratch else ""
        return self.output_dir / RUNS / name / job.task.name / job.setting.name / f"seed-{job.seed}.json"

    def has(self, job: Job, save_model: bool = False) -> bool:
        """Whether nothing of a run is missing: its result; predictions and model where they are wanted."""
        file = self.file(job)
        if not file.exists():
            return False
        if self.read(file)["diverged"]:
            return True  # and has no more to give
        found = self.predictions(job)
        predicted = all(str(found.get(f"{n}/data")) == folder.name for n, folder in job.predicted.items())
        return predicted and (not save_model or self.model_folder(job).exists())

    def model_folder(self, job: Job) -> Path:
        """Where the fine-tuned model of a run lies."""
        return self.file(job).with_name(f"seed-{job.seed}-model")

    def predictions(self, job: Job) -> dict[str, np.ndarray]:
        """Predictions that a run has left, by TASK/SPLIT, TASK/SPLIT/idx and .../data; or nothing."""
        file = _predictions_file(self.file(job))
        if not file.exists():
            return {}
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, BadZipFile):
            return {}  # damaged: they are made again

    def write(self, job: Job, outcome: Outcome, save_model: bool = False) -> dict[str, Any]:
        """Keep what a run left, its result last; a result that is there already stays. Returns the result.

        Raises:
            UserError: The disk is full, or the folder cannot be written to.
        """
        file = self.file(job)
        with self._writing():
            file.parent.mkdir(parents=True, exist_ok=True)
            if outcome.predictions:
                aside = aside_of(_predictions_file(file))
                with aside.open("wb") as stream:
                    np.savez(stream, **(self.predictions(job) | outcome.predictions))
                os.replace(aside, _predictions_file(file))
            if save_model and not outcome.result["diverged"]:
                tokenizer = load_tokenizer(job.model.source)
                with quiet():
                    cached_folder(
                        self.model_folder(job), lambda folder: write_model(folder, outcome.model, tokenizer)
                    )
            if not file.exists():
                write_json(file, _with_null(outcome.result))
        return self.read(file)

    def read(self, file: Path) -> dict[str, Any]:
        """A result file.

        Raises:
            UserError: It is damaged.
        """
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
            lacking = {
                *KEPT,
                "model",
                "setting",
                "load_best_model_at_end",
                *TASKS[result["task"]].metrics,
            } - set(result)
            if result["format"] != FORMAT or lacking:
                raise ValueError(f"format {result['format']}, without {', '.join(lacking) or 'nothing'}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"output_dir {self.output_dir}: {file} is damaged; move it away, and its run is done again"
            ) from error
        return result

    def all(self) -> list[dict[str, Any]]:
        """Every result in the folder, in a fixed order."""
        return [self.read(file) for file in self._files()]

    def _files(self) -> list[Path]:
        return sorted(self.output_dir.glob(f"{RUNS}/*/*/*/seed-*.json"))


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs that differ in their seed only, together: mean, deviation and 95 % interval of every metric.

    Of the settings of a model and task the one with the best mean score is `selected`, among those that
    have the most seeds.

    Returns:
        Entries of results.json, by task in the order of the table, then by run, step and name.
    """
    together: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        together.setdefault((*_identity(result), json.dumps(result["setting"])), []).append(result)
    entries = [_entry(sorted(runs, key=lambda run: run["seed"])) for runs in together.values()]
    tried: dict[tuple, list[dict[str, Any]]] = {}
    for entry in entries:
        tried.setdefault(_identity(entry), []).append(entry)
    for group in tried.values():
        best = max(group, key=lambda entry: (entry["n"], _or_lowest(entry["mean"]["score"])))
        for entry in group:
            entry |= {"settings_tried": len(group), "selected": entry is best}
    order = list(TASKS)
    return sorted(entries, key=lambda e: (order.index(e["task"]), *_place(e["model"]), str(e["setting"])))


def _identity(entry: dict[str, Any]) -> tuple:
    """What is compared: a task and a model, whose folder may have been given in several spellings."""
    model = entry["model"]
    return entry["task"], Path(model["path"]).name, model["fingerprint"], model["from_scratch"]


def _place(model: dict[str, Any]) -> tuple:
    """Runs of pre-training together, in the order of their steps; baselines last."""
    return model["from_scratch"], model["run"] or "", model["step"] or 0, model["name"]


def _entry(runs: list[dict[str, Any]]) -> dict[str, Any]:
    first = runs[0]
    metrics = (*TASKS[first["task"]].metrics, "score", "validation_loss")
    entry = {name: first[name] for name in ("task", "model", "setting", "load_best_model_at_end")}
    kept = dict.fromkeys((*KEPT, *metrics))
    entry |= {"seeds": [{name: run[name] for name in kept} for run in runs], "n": len(runs)}
    entry |= {"mean": {}, "std": {}, "interval": {}, "range": {}}
    for name in metrics:
        # A score that is not defined in one run is not defined for all of them.
        values = np.array([math.nan if run[name] is None else run[name] for run in runs])
        mean, low, high = map(float, mean_interval(values))
        entry["mean"][name] = mean
        entry["std"][name] = float(values.std(ddof=1)) if len(runs) > 1 else math.nan
        entry["interval"][name] = [low, high]
        entry["range"][name] = [float(values.min()), float(values.max())]
    entry |= {name: sum(run[name] for run in runs) for name in ("degenerate", "diverged")}
    return _with_null(entry)


def _or_lowest(value: float | None) -> float:
    return -math.inf if value is None else value


def _predictions_file(file: Path) -> Path:
    return file.with_name(f"{file.stem}-predictions.npz")


def _with_null(value: Any) -> Any:
    """JSON has no NaN: what is not defined is null."""
    if isinstance(value, dict):
        return {name: _with_null(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_with_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _differences(ours: dict[str, Any], found: dict[str, Any]) -> str:
    """What is not the same, in words; empty where all is."""
    words = [
        f"{name} is {json.dumps(value)}, was {json.dumps(found.get(name))}"
        for name, value in ours.items()
        if name not in ("data", "settings") and value != found.get(name)
    ]
    words += _setting_differences(ours["settings"], found.get("settings", []))
    words += [
        f"the data of {task} are others"
        for task, fingerprint in ours["data"].items()
        if found.get("data", {}).get(task, fingerprint) != fingerprint
    ]
    return "; ".join(words)


def _setting_differences(ours: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[str]:
    if ours == found:
        return []
    if len(ours) == len(found) == 1:
        return [
            f"{name} is {value}, was {found[0].get(name)}"
            for name, value in ours[0].items()
            if value != found[0].get(name)
        ]
    return [f"grid of {len(ours)} settings, was another of {len(found)}"]
