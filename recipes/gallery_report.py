"""What the runs of a gallery say, as plain values, as tables and as a figure."""

import json
from collections import Counter
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from recipes.comparison import Group, final_loss
from recipes.figures import COLORS, DRAWING, GREY, LOSS, WIDTH
from recipes.files import write_json, write_text
from recipes.findings import DASH
from recipes.study_results import LEARNING_RATE, PLACEMENT, ArmCurves, StudyCurves

Method = tuple[str, str]  # placement, norm
Values = dict[str, Any]
# With what all others are compared.
REFERENCE: Method = ("pre", "layer_norm")
# What is further above the unigram cross-entropy than this share of the figure is drawn at its edge.
ROOM = 0.35
FILLED = {"linestyle": "", "color": COLORS[0], "markersize": 4}
HOLLOW = {"linestyle": "", "color": COLORS[1], "markerfacecolor": "none"}
KEPT = "Kept: by a forward pass for its backward pass, parameters not counted; the same in every round."


def summarise(curves: StudyCurves) -> Values:
    """What the runs say; None for what was no number or is not there yet."""
    found = methods_of(curves)
    reference = _tuned(found.get(REFERENCE, [])).best
    methods = [_method(key, arms, reference) for key, arms in found.items()]
    methods.sort(key=lambda method: method["best"]["mean"] if method["best"] else np.inf)
    others = [m for m in methods if (m[PLACEMENT], m["norm_type"]) != REFERENCE]
    spreads = [np.ptp(list(m["difference"].values())) for m in others if len(m["difference"]) > 1]
    unfinished = [(arm, run) for arm in curves.arms for run in arm.runs if not run.finished]
    return {
        "runs": len(curves.runs),
        "missing": [f"{arm.label}, seed {run.seed}: {run.status}" for arm, run in unfinished],
        "seeds": curves.seeds,
        "unigram_cross_entropy": _number(curves.unigram_cross_entropy),
        "median_spread": float(median(spreads)) if spreads else None,
        "methods": methods,
        "common": curves.common,
    }


def methods_of(curves: StudyCurves) -> dict[Method, list[ArmCurves]]:
    """The arms of each placement and norm, in the order of the study."""
    found: dict[Method, list[ArmCurves]] = {}
    for arm in curves.arms:
        found.setdefault((arm.placement, (curves.common | arm.options)["norm_type"]), []).append(arm)
    return found


def _tuned(arms: list[ArmCurves]) -> Group:
    """The arms with warm-up by rising learning rate: of two equally good ones the first is the best."""
    warm = [arm for arm in arms if arm.options.get("warmup_steps") != 0]
    return Group("", "", sorted(warm, key=lambda arm: arm.options[LEARNING_RATE]))


def _method(key: Method, arms: list[ArmCurves], reference: ArmCurves | None) -> Values:
    tuned = _tuned(arms)
    rates = {arm.options[LEARNING_RATE]: _outcome(arm) for arm in tuned.arms}
    best = rates[tuned.best.options[LEARNING_RATE]] if tuned.best else None
    without = [arm for arm in arms if arm not in tuned.arms]
    cold = _outcome(max(without, key=lambda arm: arm.options[LEARNING_RATE])) if without else None
    return {
        PLACEMENT: key[0],
        "norm_type": key[1],
        "best": best,
        "note": tuned.note,
        "difference": _differences(best, _outcome(reference) if reference else None),
        "rates": list(rates.values()),
        "without_warmup": cold,
        "lost_without_warmup": _differences(cold, rates.get(cold[LEARNING_RATE]) if cold else None),
    }


def _outcome(arm: ArmCurves) -> Values:
    """How the runs of an arm ended, by seed; those that have not are left out."""
    return {
        LEARNING_RATE: arm.options[LEARNING_RATE],
        "mean": _number(final_loss(arm).mean),
        "losses": {run.seed: _number(run.final_loss) for run in arm.finished},
        "diagnoses": {run.seed: run.diagnosis for run in arm.finished},
    }


def _differences(one: Values | None, other: Values | None) -> dict[int, float]:
    """Losses of one less those of the other by seed: the same seed means the same data in the same order."""
    mine, theirs = (outcome["losses"] if outcome else {} for outcome in (one, other))
    both = [seed for seed in mine if mine[seed] is not None and theirs.get(seed) is not None]
    return {seed: mine[seed] - theirs[seed] for seed in both}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def kept_costs(folder: Path) -> list[Values]:
    """The costs that an earlier report in the folder holds; none where there is no report."""
    file = folder / "gallery.json"
    return json.loads(file.read_text(encoding="utf-8"))["costs"] if file.exists() else []


def write_gallery(summary: Values, folder: Path) -> list[Path]:
    """Write gallery.json, gallery.md and gallery.png; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"gallery.{kind}" for kind in ("json", "md", "png")]
    write_json(files[0], summary)
    write_text(files[1], "\n\n".join(report_blocks(summary)) + "\n")
    with rc_context(DRAWING):
        draw(summary).savefig(files[2], dpi=150, metadata={"Software": None})
    return files


def panels(summary: Values) -> dict[str, dict[str, Values]]:
    """The methods with the norm, and those with the placement, of the reference, by name; the best first."""
    placement, norm = REFERENCE
    return {
        f"placement, with {norm}": {m[PLACEMENT]: m for m in summary["methods"] if m["norm_type"] == norm},
        f"norm, in {placement}": {m["norm_type"]: m for m in summary["methods"] if m[PLACEMENT] == placement},
    }


# -------------------------------------------------------------------- tables


def report_blocks(summary: Values) -> list[str]:
    """Paragraphs and tables, as Markdown."""
    blocks, missing, runs = [], summary["missing"], summary["runs"]
    if missing:
        ended = (
            f"**Unfinished, all of this is provisional: {runs - len(missing)} of {runs} runs have ended.**"
        )
        blocks.append(f"{ended} Missing: {'; '.join(missing)}.")
    for reference, (title, methods) in zip(REFERENCE, panels(summary).items(), strict=True):
        blocks.append(_loss_table(title, reference, methods, summary["seeds"]))
    for note in dict.fromkeys(m["note"] for m in summary["methods"] if m["note"]):
        names = [_name(m) for m in summary["methods"] if m["note"] == note]
        blocks.append(f"{note[0].upper()}{note[1:]} ({len(names)}): {', '.join(names)}.")
    if summary["median_spread"] is not None:
        spread = f"{summary['median_spread']:.4f}, median over the methods"
        blocks.append(
            f"How far a method's differences to {_pair(REFERENCE)} lie apart over the seeds: {spread}."
        )
    return blocks + (_cost_blocks(summary["costs"]) if summary["costs"] else [])


def _pair(method: Method) -> str:
    return f"{method[0]} with {method[1]}"


def _name(method: Values) -> str:
    return method[PLACEMENT] if method["norm_type"] == REFERENCE[1] else method["norm_type"]


def _loss_table(title: str, reference: str, methods: dict[str, Values], seeds: list[int]) -> str:
    rates = sorted({rate[LEARNING_RATE] for m in methods.values() for rate in m["rates"]})
    cold = {m["without_warmup"][LEARNING_RATE] for m in methods.values() if m["without_warmup"]}
    head = [title, f"best, seeds {', '.join(map(str, seeds))}", f"less {reference}"]
    head += [f"{rate:g}" for rate in rates] + [f"{rate:g}, no warm-up (change)" for rate in sorted(cold)[-1:]]
    return _table(head, [_loss_row(name, method, rates)[: len(head)] for name, method in methods.items()])


def _loss_row(name: str, method: Values, rates: list[float]) -> list[str]:
    best, tried = method["best"], {rate[LEARNING_RATE]: rate for rate in method["rates"]}
    losses = ", ".join(map(_loss, best["losses"].values())) if best else DASH
    cells = [_words(tried.get(rate), bold=bool(best) and rate == best[LEARNING_RATE]) for rate in rates]
    change = f" ({_mean(method['lost_without_warmup'])})" if method["lost_without_warmup"] else ""
    return [name, losses, _mean(method["difference"]), *cells, _words(method["without_warmup"]) + change]


def _words(outcome: Values | None, bold: bool = False) -> str:
    """Mean loss of the seeds, and in how many of them there was trouble."""
    if not outcome or not outcome["losses"]:
        return DASH
    troubles = Counter(filter(None, outcome["diagnoses"].values()))
    loss = _loss(outcome["mean"])
    words = [f"{trouble} in {n} of {len(outcome['losses'])}" for trouble, n in troubles.items()]
    return ", ".join([f"**{loss}**" if bold else loss, *words])


def _loss(loss: float | None) -> str:
    return DASH if loss is None else f"{loss:.4f}"


def _mean(differences: dict[int, float]) -> str:
    return f"{mean(differences.values()):+.4f}" if differences else DASH


def _cost_blocks(costs: list[Values]) -> list[str]:
    head = ["placement", "norm", "parameters", "tokens/s, ratio", "lowest and highest", "kept, MiB", "ratio"]
    reference = next(cost for cost in costs if (cost[PLACEMENT], cost["norm_type"]) == REFERENCE)
    speeds = reference["tokens_per_second"]
    speed = f"{median(speeds):,.0f} tokens/s ({min(speeds):,.0f} to {max(speeds):,.0f})"
    rounds = f"{len(speeds)} rounds, {reference['circumstances']} each, random ids"
    return [f"{_pair(REFERENCE)}: {speed}; {rounds}. {KEPT}", _table(head, map(_cost_row, costs))]


def _cost_row(cost: Values) -> list[str]:
    ratios = cost["speed_ratios"]
    return [
        cost[PLACEMENT],
        cost["norm_type"],
        f"{cost['parameters']:,}",
        f"{median(ratios):.3f}",
        f"{min(ratios):.3f}, {max(ratios):.3f}",
        f"{cost['kept_bytes'] / 2**20:.1f}",
        f"{cost['memory_ratio']:.3f}",
    ]


def _table(head: list[str], rows: Any) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


# -------------------------------------------------------------------- figure


def draw(summary: Values) -> Figure:
    """A row a method, a point a seed: filled at the best rate, hollow without warm-up at the highest."""
    best = [m["best"] for m in summary["methods"] if m["best"]]
    losses = [loss for outcome in best for loss in outcome["losses"].values()]
    unigram = summary["unigram_cross_entropy"] or max(losses, default=1.0)
    low = min(losses, default=unigram - 1.0)
    edge = unigram + ROOM * (unigram - low)
    rows = [max(1, len(methods)) for methods in panels(summary).values()]
    figure = Figure(figsize=(WIDTH, 1.6 + 0.25 * sum(rows)), layout="constrained")
    axes = figure.subplots(len(rows), sharex=True, height_ratios=rows)
    for panel, (title, methods) in zip(axes, panels(summary).items(), strict=True):
        _draw_panel(panel, list(methods.values()), edge)
        panel.axvline(unigram, color=GREY, linestyle="--", linewidth=1)
        panel.set_yticks(range(len(methods)), [_label(name, m["best"]) for name, m in methods.items()])
        panel.set(ylim=(len(methods) - 0.5, -0.5), title=f"{title} (best learning rate)")
    room = 0.03 * (edge - low)
    axes[-1].set(xlabel=f"final {LOSS}", xlim=(low - room, edge + room))
    handles = [
        Line2D([], [], **FILLED, marker="o", label="a seed at the best rate, with warm-up"),
        Line2D([], [], **HOLLOW, marker="o", label="a seed at the highest rate, without warm-up"),
        Line2D([], [], **HOLLOW, marker=">", label="the same, diverged or beyond the figure"),
        Line2D([], [], color=GREY, linestyle="--", linewidth=1, label="unigram cross-entropy"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_panel(axes: Axes, methods: list[Values], edge: float) -> None:
    for row, method in enumerate(methods):
        for loss in (method["without_warmup"] or {"losses": {}})["losses"].values():
            inside = loss is not None and loss <= edge
            axes.plot([loss if inside else edge], [row], **HOLLOW, marker="o" if inside else ">")
        for loss in (method["best"] or {"losses": {}})["losses"].values():
            axes.plot([loss], [row], **FILLED, marker="o")


def _label(name: str, best: Values | None) -> str:
    return f"{name} ({best[LEARNING_RATE]:g})" if best else name
