"""Fine-tuned scores against pre-training step, from the results.json that `glue_eval/run.py` writes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes.errors import UserError
from recipes.figures import DRAWING, GREY, WIDTH

MEASURES = {"score": "score", "validation_loss": "validation loss"}


@dataclass(frozen=True)
class Track:
    """One task at the checkpoints of one run; arrays are [checkpoints]."""

    task: str
    run: str
    """Folder of the run, as it was given to the fine-tuning."""
    norm_placement: str | None
    entries: list[dict[str, Any]]
    """Elements of results.json, in the order of steps."""

    @property
    def steps(self) -> np.ndarray:
        """Updates of pre-training."""
        return np.array([entry["model"]["step"] for entry in self.entries])

    def mean(self, measure: str) -> np.ndarray:
        """Mean over seeds; nan where it is not defined."""
        return np.array([_or_nan(entry["mean"][measure]) for entry in self.entries])

    def interval(self, measure: str) -> np.ndarray:
        """95 % interval, [checkpoints, 2]; nan for one seed."""
        return np.array([list(map(_or_nan, entry["interval"][measure])) for entry in self.entries])

    @property
    def verdict(self) -> str:
        """Whether the last checkpoint's interval lies above the first's."""
        first, last = self.interval("score")[[0, -1]]
        if np.isnan([*first, *last]).any():
            return "no interval"
        if last[0] > first[1]:
            return "above"
        return "BELOW" if last[1] < first[0] else "the intervals overlap"


def trajectories(entries: list[dict[str, Any]]) -> list[Track]:
    """The tracks in a results.json: a task and run with at least two checkpoints.

    At each checkpoint the setting with the best score; models with random weights are none of a run's.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in entries:
        model = entry["model"]
        if entry["selected"] and model["run"] and model["step"] is not None and not model["from_scratch"]:
            found.setdefault((entry["task"], model["run"]), []).append(entry)
    return [
        Track(task, run, group[0]["model"]["norm_placement"], sorted(group, key=lambda e: e["model"]["step"]))
        for (task, run), group in found.items()
        if len(group) > 1
    ]


def read_tracks(file: Path, runs: list[Path]) -> list[Track]:
    """The tracks of some runs in a results.json.

    Raises:
        UserError: The file is none, or holds none of these runs.
    """
    file = file / "results.json" if file.is_dir() else file
    try:
        tracks = trajectories(json.loads(file.read_text(encoding="utf-8"))["results"])
    except OSError as error:
        raise UserError(f"glue_results {file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"glue_results {file}: is no results.json of glue_eval/run.py") from None
    wanted = {run.resolve() for run in runs}
    ours = [track for track in tracks if Path(track.run).resolve() in wanted]
    if not ours:
        there = ", ".join(dict.fromkeys(track.run for track in tracks)) or "none"
        raise UserError(
            f"glue_results {file}: holds two or more checkpoints of no run that is compared (of others: "
            f"{there}); make it with glue_eval/run.py --run_dir"
        )
    return ours


def draw_tracks(
    tracks: list[Track],
    styles: Mapping[str, dict[str, Any]],
    labels: Mapping[str, str],
    baselines: Mapping[tuple[str, str], float] | None = None,
) -> Figure:
    """Score and validation loss against pre-training step: a row a task, a line a run, seeds as points.

    A cross is a run that predicts one class.

    Args:
        tracks: What is drawn.
        styles: Arguments of `Axes.plot` by run.
        labels: Names for the legend by run.
        baselines: By task and measure, what a model without pre-training reaches.
    """
    tasks = list(dict.fromkeys(track.task for track in tracks))
    with rc_context(DRAWING):
        figure = Figure(figsize=(WIDTH, 0.5 + 2.7 * len(tasks)), layout="constrained")
        rows = figure.subplots(len(tasks), len(MEASURES), squeeze=False, sharex=True)
        for row, task in zip(rows, tasks, strict=True):
            for axes, (measure, words) in zip(row, MEASURES.items(), strict=True):
                for track in (track for track in tracks if track.task == task):
                    _draw_track(axes, track, measure, styles[track.run], labels[track.run])
                if (baseline := (baselines or {}).get((task, measure))) is not None:
                    axes.axhline(baseline, color=GREY, linewidth=1, linestyle=":", label="from scratch")
                axes.set_title(f"{task}: {words}")
                _widen(axes)
        for axes in rows[-1]:
            axes.set_xlabel("update of pre-training")
        handles = {label: handle for row in rows for handle, label in _handles(row)}
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles))
        )
    return figure


def _draw_track(axes: Axes, track: Track, measure: str, style: dict[str, Any], label: str) -> None:
    """Mean, 95 % interval as a band, seeds as points; crosses are runs that predict one class."""
    axes.plot(track.steps, track.mean(measure), label=label, **style)
    low, high = track.interval(measure).T
    axes.fill_between(track.steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    for step, entry in zip(track.steps, track.entries, strict=True):
        for marker, one_class in ((".", False), ("x", True)):
            seeds = [seed for seed in entry["seeds"] if seed["degenerate"] == one_class]
            values = [_or_nan(seed[measure]) for seed in seeds]
            axes.scatter(
                [step] * len(values), values, 22, style["color"], marker=marker, alpha=0.6, linewidths=1
            )


def _widen(axes: Axes) -> None:
    """Show at least a twentieth: an example more or less must not look like progress."""
    low, high = axes.get_ylim()
    if (lacking := 0.05 - (high - low)) > 0:
        axes.set_ylim(low - lacking / 2, high + lacking / 2)


def _handles(row: np.ndarray) -> list[tuple[Any, str]]:
    return [pair for axes in row for pair in zip(*axes.get_legend_handles_labels(), strict=True)]


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value
