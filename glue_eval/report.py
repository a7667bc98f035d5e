"""What people see of results: lines, tables, and the figure of score against pre-training step."""

import json
import platform
from collections.abc import Iterable, Iterator
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glue_eval.arguments import Setting
from glue_eval.encoding import load_split
from glue_eval.tasks import TASKS
from recipes.errors import UserError
from recipes.figures import COLORS, LINES, save_figure
from recipes.files import write_json, write_text
from recipes.findings import DASH
from recipes.glue_results import MEASURES, Track, draw_tracks, trajectories

if TYPE_CHECKING:
    from glue_eval.arguments import GlueArguments
    from glue_eval.finetuning import Job
    from glue_eval.jobs import Workers
    from glue_eval.models import Model

FORMAT = 1
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "scikit-learn", "scipy")
SHORT = {
    "matthews_correlation": "Matthews",
    "accuracy": "accuracy",
    "accuracy_mm": "accuracy (mismatched)",
    "f1": "F1",
    "pearson": "Pearson",
    "spearmanr": "Spearman",
    "score": "score",
    "validation_loss": "validation loss",
}
EXPLANATION = """
Mean over seeds with its 95 % *t*-interval; std: standard deviation of the runs. Score: mean of the task's
metrics, as in GLUE's own average. Validation loss: cross-entropy in nats, for stsb squared error. Every
example of the validation split counts once. A run is degenerate if it predicts one class only (MRPC: accuracy
0.684, F1 0.812), and diverged if its loss became no number.
"""
BEST_EPOCH = """
Of each run the epoch with the best validation score is reported: chosen on the split that is reported, which
flatters.
"""
CHOSEN = """
Best of {n} settings, chosen on the validation split on which it is reported: that flatters.
"""


def screen(
    models: list["Model"],
    jobs: list["Job"],
    missing: list["Job"],
    again: int,
    precision: str,
    workers: "Workers",
    args: "GlueArguments",
) -> Iterator[str]:
    """What is about to happen."""
    for model in models:
        size = f"{model.parameters / 1e6:.1f} M parameters"
        yield f"model       {model.source.name} ({size}, fingerprint {model.fingerprint})"
    first = models[0]
    new = ", ".join(first.new_parameters) or "nothing: the head that it brings is kept"
    new = "everything" if first.source.from_scratch else new
    yield f"initialised {new}"
    yield f"input       at most {first.max_length} tokens"
    yield f"data        {args.data_dir or 'nyu-mll/glue'}"
    for job in {job.task.name: job for job in jobs}.values():
        cut = load_split(job.data, "train").truncated
        longer = f", {cut:,} of them longer than the input and cut" if cut else ""
        yield f"task        {job.task.name}: {job.train_examples:,} training examples{longer}"
    settings = list(dict.fromkeys(job.setting for job in jobs))
    yield f"settings    {len(settings)}: {_axes(settings)}"
    yield f"reported    the {'best' if args.load_best_model_at_end else 'last'} epoch of each run"
    yield f"runs        {len(jobs)}: {_count(args.seeds, 'seed')} a setting; {workers.describe()}"
    if done := len(jobs) - len(missing):
        yield f"finished    {done} of them are there already"
    if again:
        yield f"again       {again} of them lack predictions or a model; they are trained again for these"
    yield f"precision   {precision}"


def _axes(settings: list[Setting]) -> str:
    """What a grid varies and its values; of a single setting its label."""
    if len(settings) == 1:
        return settings[0].label
    values = {f.name: dict.fromkeys(getattr(s, f.name) for s in settings) for f in fields(Setting)}
    return "; ".join(f"{name} {', '.join(map(str, v))}" for name, v in values.items() if len(v) > 1)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def result_line(result: dict[str, Any]) -> str:
    """How one run ended."""
    task = TASKS[result["task"]]
    words = [f"{SHORT[name]} {number(result[name])}" for name in task.metrics]
    words.append(f"loss {number(result['validation_loss'])}")
    flag = "  DIVERGED" if result["diverged"] else "  degenerate" if result["degenerate"] else ""
    run = f"{result['model']['name']}, {Setting(**result['setting']).label}, seed {result['seed']}"
    return f"{task.name:<6}{run}: {', '.join(words)}{flag}"


def table_lines(entries: list[dict[str, Any]]) -> Iterator[str]:
    """The selected results, a line each, for a terminal."""
    for entry in (entry for entry in entries if entry["selected"]):
        metrics = TASKS[entry["task"]].metrics
        words = [f"{SHORT[name]} {estimate(entry, name)}" for name in metrics]
        notes = "; ".join(_notes(entry))
        yield f"{entry['task']:<6}{entry['model']['name']}: {', '.join(words)} ({notes})"


def _notes(entry: dict[str, Any]) -> Iterator[str]:
    yield f"{entry['n']} seed{'s' if entry['n'] > 1 else ': no interval'}"
    if entry["settings_tried"] > 1:
        yield f"best of {entry['settings_tried']} settings"
    for flag in ("degenerate", "diverged"):
        if entry[flag]:
            yield f"{entry[flag]} {flag}"


def number(value: float | None) -> str:
    """A metric or loss; a dash where it is not defined."""
    return DASH if value is None else f"{value:.4f}"


def estimate(entry: dict[str, Any], metric: str) -> str:
    """Mean and 95 % interval."""
    low, high = entry["interval"][metric]
    interval = "" if low is None else f" [{number(low)}, {number(high)}]"
    return number(entry["mean"][metric]) + interval


def write_report(entries: list[dict[str, Any]], settings: dict[str, Any], output_dir: Path) -> list[Path]:
    """Write results.md, where there are checkpoints of a run their figure, and results.json last.

    Args:
        entries: Everything that the folder holds.
        settings: What all of them share.
        output_dir: The folder. Where its results.json says the same, nothing is written.

    Returns:
        The files that were written.

    Raises:
        UserError: The disk is full, or the folder cannot be written to.
    """
    content = {
        "format": FORMAT,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "settings": settings,
        "results": entries,
    }
    tracks = trajectories(entries)
    file, text = output_dir / "results.json", output_dir / "results.md"
    if text.exists() and _results_in(file) == entries:
        return []
    try:
        figures = _draw(tracks, entries, output_dir) if tracks else []
        write_text(text, "\n".join(_markdown(entries, settings, tracks)) + "\n")
        write_json(file, content)
    except OSError as error:
        raise UserError(f"output_dir {output_dir}: cannot be written ({error.strerror})") from error
    return [file, text, *figures]


def _results_in(file: Path) -> Any:
    """What the last report said; None where there is none that can be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))["results"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _markdown(entries: list[dict[str, Any]], settings: dict[str, Any], tracks: list[Track]) -> Iterator[str]:
    epoch = BEST_EPOCH if settings.get("load_best_model_at_end") else "The last epoch is reported."
    yield from ("# GLUE", "", " ".join((EXPLANATION + epoch).split()), "")
    if "max_seq_length" in settings:
        precision = "bfloat16 autocast" if settings["bf16"] else "float32"
        yield from (f"Inputs of at most {settings['max_seq_length']} tokens; trained in {precision}.", "")
    selected = [entry for entry in entries if entry["selected"]]
    tasks = [name for name in TASKS if any(entry["task"] == name for entry in selected)]
    models = dict.fromkeys((e["model"]["name"], e["model"]["fingerprint"]) for e in selected)
    yield from _table(
        ["model", *tasks],
        ([name, *(_cell(selected, task, name, mark) for task in tasks)] for name, mark in models),
    )
    if tracks:
        yield from ("", "## Against pre-training step", "")
        yield from (f"- {line}" for line in trajectory_lines(tracks))
        yield from ("", "![score and validation loss against pre-training step](trajectory.png)")
    yield from ("", "## Metrics", "")
    if any(entry["settings_tried"] > 1 for entry in entries):
        yield from (CHOSEN.format(n=max(e["settings_tried"] for e in entries)).strip(), "")
    header = [
        "task",
        "model",
        "setting",
        "metric",
        "mean",
        "95 % interval",
        "std",
        "range",
        "n",
        "degenerate",
    ]
    yield from _table(header, (row for entry in entries for row in _metric_rows(entry)))


def _cell(entries: list[dict[str, Any]], task: str, name: str, fingerprint: str) -> str:
    for entry in entries:
        model = entry["model"]
        if (entry["task"], model["name"], model["fingerprint"]) == (task, name, fingerprint):
            mark = f" ({entry['degenerate']} of {entry['n']} degenerate)" if entry["degenerate"] else ""
            return estimate(entry, "score") + mark
    return DASH


def _metric_rows(entry: dict[str, Any]) -> Iterator[list[str]]:
    bold = "**" if entry["selected"] and entry["settings_tried"] > 1 else ""
    for name in (*TASKS[entry["task"]].metrics, "validation_loss"):
        low, high = entry["interval"][name]
        interval = DASH if low is None else f"[{number(low)}, {number(high)}]"
        flags = f"{entry['degenerate']} of {entry['n']}"
        flags += f", {entry['diverged']} diverged" if entry["diverged"] else ""
        mean = f"{bold}{number(entry['mean'][name])}{bold}"
        head = [entry["task"], entry["model"]["name"], Setting(**entry["setting"]).label, SHORT[name]]
        spread = [number(entry["std"][name]), " to ".join(map(number, entry["range"][name]))]
        yield [*head, mean, interval, *spread, str(entry["n"]), flags]


def _table(header: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def trajectory_lines(tracks: list[Track]) -> Iterator[str]:
    """Whether the last checkpoint of a run scores above the first."""
    for track in tracks:
        first, last = (estimate(entry, "score") for entry in (track.entries[0], track.entries[-1]))
        yield (
            f"{track.task}, {track.run}: score {first} after {track.steps[0]:,} updates, {last} after "
            f"{track.steps[-1]:,}: {track.verdict}"
        )


def _draw(tracks: list[Track], entries: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Score and validation loss against pre-training step; returns the files."""
    runs = {track.run: track.norm_placement for track in tracks}
    styles = {
        run: {"color": COLORS[i % len(COLORS)], "linestyle": LINES[i % len(LINES)], "marker": "o"}
        for i, run in enumerate(runs)
    }
    labels = {run: f"{run} ({placement})" if placement else run for run, placement in runs.items()}
    baselines = {
        (entry["task"], measure): entry["mean"][measure]
        for entry in entries
        for measure in MEASURES
        if entry["selected"] and entry["model"]["from_scratch"]
    }
    return save_figure(draw_tracks(tracks, styles, labels, baselines), folder, "trajectory")
