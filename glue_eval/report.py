"""What people see of results: lines, tables, and the figure of score against pre-training step."""

import json
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glue_eval.encoding import load_split
from glue_eval.tasks import TASKS
from recipes.files import write_json

if TYPE_CHECKING:
    from glue_eval.arguments import GlueArguments
    from glue_eval.finetuning import Job
    from glue_eval.jobs import Workers
    from glue_eval.models import Model

FORMAT = 1
DASH = "–"
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
CHOSEN = """
Best of {n} settings, chosen on the validation split on which it is reported: that flatters.
"""


def screen(
    models: list["Model"],
    jobs: list["Job"],
    missing: list["Job"],
    precision: str,
    workers: "Workers",
    args: "GlueArguments",
) -> Iterator[str]:
    """What is about to happen."""
    for model in models:
        size = f"{model.parameters / 1e6:.1f} M parameters"
        yield f"model       {model.source.name} ({size}, fingerprint {model.fingerprint})"
    first = models[0]
    new = "all" if first.source.from_scratch else ", ".join(first.new_parameters) or "none"
    yield f"new         {new}"
    yield f"input       at most {first.max_length} tokens"
    yield f"data        {args.data_dir or 'nyu-mll/glue'}"
    for job in {job.task.name: job for job in jobs}.values():
        cut = load_split(job.data, "train").truncated
        longer = f", {cut:,} of them longer than the input and cut" if cut else ""
        yield f"task        {job.task.name}: {job.train_examples:,} training examples{longer}"
    settings = dict.fromkeys(job.setting.label for job in jobs)
    yield f"settings    {len(settings)}: {next(iter(settings))}{', ...' if len(settings) > 1 else ''}"
    chosen = "the best on the validation split" if args.load_best_model_at_end else "the last"
    yield f"epoch       {chosen} is reported"
    done = f"; {len(jobs) - len(missing)} are there already" if len(missing) < len(jobs) else ""
    yield f"runs        {len(jobs)}, {args.seeds} seeds a setting{done}; {workers.describe()}"
    yield f"precision   {precision}"


def result_line(result: dict[str, Any]) -> str:
    """How one run ended."""
    task = TASKS[result["task"]]
    words = [f"{SHORT[name]} {number(result[name])}" for name in task.metrics]
    words.append(f"loss {number(result['validation_loss'])}")
    flag = "  DIVERGED" if result["diverged"] else "  degenerate" if result["degenerate"] else ""
    setting = result["setting"]
    return (
        f"{task.name:<6}{result['model']['name']}  lr {setting['learning_rate']:g} "
        f"batch {setting['train_batch_size']} epochs {setting['num_train_epochs']} seed {result['seed']}: "
        f"{', '.join(words)}{flag}"
    )


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


def write_report(entries: list[dict[str, Any]], output_dir: Path) -> list[Path]:
    """Write results.json, results.md and, where there are checkpoints of a run, their figure.

    Files that would not change are left as they are.

    Returns:
        The files that were written.
    """
    content = {
        "format": FORMAT,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "results": entries,
    }
    file = output_dir / "results.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")).get("results") == content["results"]:
        return []
    tracks = trajectories(entries)
    figures = draw_trajectories(tracks, entries, output_dir) if tracks else []
    write_json(file, content)
    text = output_dir / "results.md"
    text.write_text("\n".join(_markdown(entries, tracks)) + "\n", encoding="utf-8")
    return [file, text, *figures]


Track = list[dict[str, Any]]


def trajectories(entries: list[dict[str, Any]]) -> dict[tuple[str, str], Track]:
    """The selected results of the checkpoints of each run in the order of steps, by (task, run).

    Only where a run has at least two checkpoints.
    """
    tracks: dict[tuple[str, str], Track] = {}
    for entry in entries:
        model = entry["model"]
        if entry["selected"] and model["run"] and model["step"] is not None and not model["from_scratch"]:
            tracks.setdefault((entry["task"], model["run"]), []).append(entry)
    return {key: track for key, track in tracks.items() if len(track) > 1}


def _markdown(entries: list[dict[str, Any]], tracks: dict[tuple[str, str], Track]) -> Iterator[str]:
    yield from ("# GLUE", "", " ".join(EXPLANATION.split()), "")
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
    header = ["task", "model", "setting", "metric", "mean", "95 % interval", "std", "n", "degenerate"]
    yield from _table(header, (row for entry in entries for row in _metric_rows(entry)))


def _cell(entries: list[dict[str, Any]], task: str, name: str, fingerprint: str) -> str:
    for entry in entries:
        model = entry["model"]
        if (entry["task"], model["name"], model["fingerprint"]) == (task, name, fingerprint):
            return estimate(entry, "score")
    return DASH


def _metric_rows(entry: dict[str, Any]) -> Iterator[list[str]]:
    setting, bold = entry["setting"], "**" if entry["selected"] and entry["settings_tried"] > 1 else ""
    words = [
        f"lr {setting['learning_rate']:g}, batch {setting['train_batch_size']}, "
        f"{setting['num_train_epochs']} epochs"
    ]
    for name in (*TASKS[entry["task"]].metrics, "validation_loss"):
        low, high = entry["interval"][name]
        interval = DASH if low is None else f"[{number(low)}, {number(high)}]"
        flags = f"{entry['degenerate']} of {entry['n']}"
        flags += f", {entry['diverged']} diverged" if entry["diverged"] else ""
        mean = f"{bold}{number(entry['mean'][name])}{bold}"
        head = [entry["task"], entry["model"]["name"], *words, SHORT[name]]
        yield [*head, mean, interval, number(entry["std"][name]), str(entry["n"]), flags]


def _table(header: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield f"|{' --- |' * len(header)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def trajectory_lines(tracks: dict[tuple[str, str], Track]) -> Iterator[str]:
    """Whether the last checkpoint of a run scores above the first."""
    for (task, run), track in tracks.items():
        first, last = track[0], track[-1]
        ends = [entry["interval"]["score"] for entry in (first, last)]
        words = "one seed: no interval"
        if None not in (ends[0][1], ends[1][0]):
            above, below = ends[1][0] > ends[0][1], ends[1][1] < ends[0][0]
            words = "above" if above else "BELOW" if below else "the intervals overlap"
        yield (
            f"{task}, {run}: score {estimate(first, 'score')} after {first['model']['step']:,} updates, "
            f"{estimate(last, 'score')} after {last['model']['step']:,}: {words}"
        )


def draw_trajectories(
    tracks: dict[tuple[str, str], Track], entries: list[dict[str, Any]], folder: Path
) -> list[Path]:
    """Score and validation loss against pre-training step, a row a task, a line a run; returns the files."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from recipes.figures import COLORS, DRAWING, GREY, LINES, WIDTH, save_figure

    tasks, runs = list(dict.fromkeys(t for t, _ in tracks)), list(dict.fromkeys(r for _, r in tracks))
    with rc_context(DRAWING):
        figure = Figure(figsize=(WIDTH, 0.5 + 2.8 * len(tasks)), layout="constrained")
        rows = figure.subplots(len(tasks), 2, squeeze=False, sharex=True)
        for row, task in zip(rows, tasks, strict=True):
            for axes, metric in zip(row, ("score", "validation_loss"), strict=True):
                for i, run in enumerate(runs):
                    track = tracks.get((task, run), [])
                    style = {"color": COLORS[i % len(COLORS)], "linestyle": LINES[i % len(LINES)]}
                    _draw_track(axes, track, metric, style, _run_label(run, track))
                for baseline in _baselines(entries, task, metric):
                    axes.axhline(baseline, color=GREY, linewidth=0.9, linestyle=":", label="from scratch")
                axes.set(title=f"{task}: {_axis(task, metric)}", ylabel=_axis(task, metric))
        for axes in rows[-1]:
            axes.set_xlabel("update of pre-training")
        handles, labels = rows[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return save_figure(figure, folder, "trajectory")


def _draw_track(axes: Any, track: Track, metric: str, style: dict[str, Any], label: str) -> None:
    """Mean with its 95 % interval as bars, and each run as a point."""
    steps = [entry["model"]["step"] for entry in track]
    means = [_or_nan(entry["mean"][metric]) for entry in track]
    lows, highs = zip(*(map(_or_nan, entry["interval"][metric]) for entry in track), strict=True)
    axes.plot(steps, means, marker="o", markersize=4, label=label, **style)
    axes.fill_between(steps, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
    points = [(e["model"]["step"], _or_nan(seed[metric])) for e in track for seed in e["seeds"]]
    axes.scatter(*zip(*points, strict=True), s=6, color=style["color"], alpha=0.5, linewidths=0)


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _run_label(run: str, track: Track) -> str:
    placement = next((entry["model"]["norm_placement"] for entry in track), None)
    return f"{Path(run).name} ({placement})" if placement else Path(run).name


def _baselines(entries: list[dict[str, Any]], task: str, metric: str) -> list[float]:
    return [
        entry["mean"][metric]
        for entry in entries
        if entry["task"] == task
        and entry["selected"]
        and entry["model"]["from_scratch"]
        and entry["mean"][metric] is not None
    ][:1]


def _axis(task: str, metric: str) -> str:
    if metric == "validation_loss":
        return "validation loss"
    names = [SHORT[name] for name in TASKS[task].metrics]
    return names[0] if len(names) == 1 else f"mean of {' and '.join(names)}"
