"""The figures of a report: the same colour, line and marker for an arm in all of them.

Colour says the options besides the norm placement, the line says the placement: what differs in placement
only has the same colour. Colours are those of Okabe and Ito, which the colour-blind can tell apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from recipes.comparison import best_of_methods, final_loss, groups, placement_name
from recipes.study_results import LEARNING_RATE, PLACEMENT, ArmCurves, StudyCurves

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", (0, (5, 1.6)), (0, (1, 1.2)), (0, (5, 1.2, 1, 1.2)))
MARKERS = ("", "o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
LOSS = "validation loss (nats a masked token)"
WIDTH = 9.0  # inches
# What makes the same figure the same file; text in SVG stays text.
DRAWING: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.facecolor": "white",
}
# Above the loss of a model without context nothing is learnt: what happens there is cut off.
HEADROOM = 0.04


@dataclass(frozen=True)
class Style:
    """How an arm is drawn, everywhere."""

    color: str
    linestyle: Any
    marker: str

    def line(self, **more: Any) -> dict[str, Any]:
        """As keyword arguments of `Axes.plot`."""
        return {
            "color": self.color,
            "linestyle": self.linestyle,
            "marker": self.marker,
            "markersize": 4,
            "markevery": 0.1,
            "linewidth": 1.6,
            **more,
        }


def arm_styles(curves: StudyCurves) -> dict[str, Style]:
    """The style of each arm, by name."""
    placements = list(dict.fromkeys(arm.placement for arm in curves.arms))
    others = list(dict.fromkeys(_other_options(arm) for arm in curves.arms))
    return {
        arm.name: Style(
            color=COLORS[others.index(_other_options(arm)) % len(COLORS)],
            linestyle=LINES[placements.index(arm.placement) % len(LINES)],
            marker=MARKERS[others.index(_other_options(arm)) // len(COLORS) % len(MARKERS)],
        )
        for arm in curves.arms
    }


def _other_options(arm: ArmCurves) -> str:
    return str({name: value for name, value in arm.options.items() if name != PLACEMENT})


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as NAME.svg and NAME.png, the same bytes each time; returns both files."""
    svg, png = folder / f"{name}.svg", folder / f"{name}.png"
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with rc_context(DRAWING | {"svg.hashsalt": name}):
        figure.savefig(svg, metadata=nothing)
        figure.set_layout_engine("none")  # the same again: half of the time goes there
        figure.savefig(png, dpi=150, metadata={"Software": None})
    return [svg, png]


def draw_loss(curves: StudyCurves) -> Figure:
    """Validation loss against update: whole in the upper row, its end enlarged below; a panel a placement."""
    placements = list(dict.fromkeys(arm.placement for arm in curves.arms))
    last = max(run.last_step for run in curves.runs)
    with rc_context(DRAWING):
        figure, rows = _panels(2, len(placements), 3.1, sharex="row", sharey="row")
        for column, placement in enumerate(placements):
            arms = [arm for arm in curves.arms if arm.placement == placement]
            for axes in rows[:, column]:
                _loss_curves(axes, curves, arms)
            _mark_divergences(rows[0, column], curves, arms)
            rows[0, column].set_title(placement_name(placement))
            rows[1, column].set_xlabel("update")
        rows[0, 0].set(xlim=(0, 1.02 * last), ylim=_whole_range(curves), ylabel=LOSS)
        rows[1, 0].set(xlim=(last / 2, 1.01 * last), ylim=_end_range(curves), ylabel="second half, enlarged")
        _legend(figure, curves, curves.arms, crosses=True)
    return figure


def _loss_curves(axes: Axes, curves: StudyCurves, arms: list[ArmCurves]) -> None:
    """Mean and min-max band of each arm; thin lines for the runs that the mean leaves out."""
    for arm in arms:
        style = arm_styles(curves)[arm.name]
        for run in arm.runs:
            if not any(run is other for other in arm.mean_runs):
                axes.plot(run.steps, run.losses, **style.line(linewidth=0.8, marker=""))
        if len(arm.steps):
            _mean_and_band(axes, arm.steps, arm, style)
    _unigram(axes, curves)


def _mean_and_band(axes: Axes, x: np.ndarray, arm: ArmCurves, style: Style, linewidth: float = 1.6) -> None:
    """Mean of an arm's losses at x, [steps], and the band from the smallest to the largest seed."""
    axes.plot(x, arm.losses.mean(0), **style.line(linewidth=linewidth))
    low, high = arm.losses.min(0), arm.losses.max(0)
    axes.fill_between(x, low, high, color=style.color, alpha=0.18, linewidth=0)


def _mark_divergences(axes: Axes, curves: StudyCurves, arms: list[ArmCurves]) -> None:
    for arm in arms:
        for run in arm.diverged:
            _cross(axes, run.diagnosis_step, arm_styles(curves)[arm.name])


def _cross(axes: Axes, x: float, style: Style) -> None:
    """At the upper edge, where no loss can hide it."""
    axes.plot(
        [x], [0.97], "x", color=style.color, markersize=7, markeredgewidth=2,
        transform=axes.get_xaxis_transform(), clip_on=False,
    )  # fmt: skip


def _unigram(axes: Axes, curves: StudyCurves) -> None:
    if np.isfinite(curves.unigram_cross_entropy):
        axes.axhline(curves.unigram_cross_entropy, color=GREY, linestyle="--", linewidth=1)


def _finite(values: list[np.ndarray]) -> np.ndarray:
    joined = np.concatenate([np.ravel(v) for v in values]) if values else np.empty(0)
    return joined[np.isfinite(joined)]


def _whole_range(curves: StudyCurves) -> tuple[float | None, float | None]:
    """From the lowest loss to a little above the unigram cross-entropy, whatever diverged above it."""
    losses = _finite([run.losses for run in curves.runs])
    unigram = curves.unigram_cross_entropy
    if not len(losses) or not np.isfinite(unigram):
        return None, None
    if losses.min() > unigram:  # nobody has got there yet: all of it is shown
        return _range(np.append(losses, unigram))
    room = max(unigram - losses.min(), 0.2)  # where nothing is learnt yet, a fifth of a nat
    ends = [run.losses[-1] for run in curves.runs if len(run.losses) and not run.diverged]
    top = max([unigram, *(end for end in ends if end < unigram + room / 2)])
    return min(losses.min(), unigram) - HEADROOM * room, top + 2 * HEADROOM * room


def _end_range(curves: StudyCurves) -> tuple[float | None, float | None]:
    """The losses of the second half of training, of the runs that have learnt."""
    last = max(run.last_step for run in curves.runs)
    kept = [run for run in curves.runs if len(run.losses) and run.losses[-1] < _learnt(curves)]
    return _range(_finite([run.losses[run.steps >= last / 2] for run in kept])) or _whole_range(curves)


def _learnt(curves: StudyCurves) -> float:
    """Loss below which a run has left the unigram cross-entropy behind: a third of what the best has."""
    losses = _finite([run.losses for run in curves.runs])
    unigram = curves.unigram_cross_entropy
    return unigram - (unigram - losses.min()) / 3 if len(losses) else np.nan


def _range(values: np.ndarray) -> tuple[float, float] | None:
    """What shows all values; None where there are none."""
    if not len(values):
        return None
    room = max(HEADROOM * (values.max() - values.min()), 1e-3)
    return float(values.min() - room), float(values.max() + room)


def draw_best(curves: StudyCurves) -> Figure:
    """The best arm of each group against update, tokens and wall time; its end enlarged below."""
    chosen = best_arms(curves)
    with rc_context(DRAWING):
        figure, rows = _panels(2, 3, 2.7, sharey="row")
        for column, (label, abscissa) in enumerate(_ABSCISSAE.items()):
            for axes in rows[:, column]:
                _best_curves(axes, curves, chosen, abscissa)
            last = max((abscissa(arm)[-1] for arm in chosen), default=1.0)
            rows[0, column].set_xlim(0, 1.02 * last)
            rows[1, column].set(xlim=(last / 2, 1.01 * last), xlabel=label)
        rows[0, 0].set(ylim=_whole_range(curves), ylabel=LOSS)
        ends = [arm.losses[:, arm.steps >= arm.steps[-1] / 2] for arm in chosen]
        rows[1, 0].set(ylim=_range(_finite(ends)) or _whole_range(curves), ylabel="second half, enlarged")
        _legend(figure, curves, chosen, crosses=False)
    return figure


def _best_curves(
    axes: Axes, curves: StudyCurves, chosen: list[ArmCurves], abscissa: Callable[[ArmCurves], np.ndarray]
) -> None:
    bold = [arm.name for arm in best_of_methods(curves).values()]
    for arm in chosen:
        width = 2.2 if arm.name in bold else 1.1
        _mean_and_band(axes, abscissa(arm), arm, arm_styles(curves)[arm.name], width)
    _unigram(axes, curves)


_ABSCISSAE: dict[str, Callable[[ArmCurves], np.ndarray]] = {
    "update": lambda arm: arm.steps,
    "tokens (millions)": lambda arm: arm.at_steps("tokens_seen") / 1e6,
    "wall time (minutes)": lambda arm: arm.at_steps("elapsed_seconds") / 60,
}


def best_arms(curves: StudyCurves) -> list[ArmCurves]:
    """The best arm of each group, which those of the placements are among, where it has a curve."""
    return [group.best for group in groups(curves) if group.best and len(group.best.steps)]


def validated_arms(curves: StudyCurves) -> list[ArmCurves]:
    """Arms of which a run has been validated."""
    return [arm for arm in curves.arms if any(len(run.steps) for run in arm.runs)]


def trained_arms(curves: StudyCurves) -> list[ArmCurves]:
    """Arms of which a run has a training line."""
    return [arm for arm in curves.arms if any(len(run.train["step"]) for run in arm.runs)]


def ended_arms(curves: StudyCurves) -> list[ArmCurves]:
    """Arms that have a final loss or a diverged run."""
    return [arm for arm in curves.arms if final_loss(arm).n or arm.diverged]


def draw_learning_rates(curves: StudyCurves) -> Figure:
    """Final loss against learning rate, a line a group: all, and those that have learnt enlarged."""
    with rc_context(DRAWING):
        figure, rows = _panels(1, 2, 3.6)
        for axes in rows[0]:
            for index in range(len(groups(curves))):
                _learning_rate_line(axes, curves, index)
            _unigram(axes, curves)
            _learning_rate_axis(axes, curves)
        rows[0, 0].set(ylim=_whole_range(curves), ylabel=f"final {LOSS}")
        rows[0, 1].set(ylim=_final_range(curves), ylabel="enlarged")
        lines = [
            Line2D([], [], label=g.label, **_group_line(curves, i)) for i, g in enumerate(groups(curves))
        ]
        _place_legend(figure, lines, _extra_handles(curves, crosses=True))
    return figure


def _group_line(curves: StudyCurves, index: int) -> dict[str, Any]:
    placements = list(dict.fromkeys(arm.placement for arm in curves.arms))
    line = LINES[placements.index(groups(curves)[index].placement) % len(LINES)]
    return {
        "color": GREY,
        "linestyle": line,
        "marker": MARKERS[1:][index % 7],
        "linewidth": 1,
        "markersize": 5,
    }


def _learning_rate_line(axes: Axes, curves: StudyCurves, index: int) -> None:
    """Points in the colours of their arms on a grey line, beside those of the other groups."""
    found = groups(curves)
    line = _group_line(curves, index)
    finals = [final_loss(arm) for arm in found[index].arms]
    shift = 1.02 ** (index - (len(found) - 1) / 2)
    rates = [arm.options[LEARNING_RATE] * shift for arm in found[index].arms]
    axes.plot(rates, [final.mean for final in finals], **line)
    for rate, arm, final in zip(rates, found[index].arms, finals, strict=True):
        style = arm_styles(curves)[arm.name]
        if final.n:
            bar = [final.high - final.mean] if final.n > 1 else None
            point = {**line, "color": style.color, "capsize": 3, "zorder": 3}
            axes.errorbar([rate], [final.mean], yerr=bar, **point)
        if arm.diverged:
            _cross(axes, rate, style)


def _learning_rate_axis(axes: Axes, curves: StudyCurves) -> None:
    rates = sorted({arm.options[LEARNING_RATE] for arm in curves.arms})
    axes.set(xscale="log", xlabel="learning rate", xlim=(rates[0] / 1.25, rates[-1] * 1.25))
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()


def _final_range(curves: StudyCurves) -> tuple[float | None, float | None]:
    """Means of the arms that have learnt, and their intervals as far as these do not dwarf the means."""
    finals = [final for arm in curves.arms if (final := final_loss(arm)).mean < _learnt(curves)]
    if not finals:
        return _whole_range(curves)
    means = np.array([final.mean for final in finals])
    reach = max(means.max() - means.min(), 0.02)
    ends = _finite([np.array([final.low, final.high]) for final in finals])
    return _range(np.concatenate([means, ends.clip(means.min() - reach, means.max() + reach)]))


def draw_training(curves: StudyCurves) -> Figure:
    """Training loss, gradient norm, learning rate against update, means over seeds; a column a placement."""
    placements = list(dict.fromkeys(arm.placement for arm in curves.arms))
    columns = {"train_loss": "training loss", "grad_norm": "gradient norm", "learning_rate": "learning rate"}
    with rc_context(DRAWING):
        figure, rows = _panels(3, len(placements), 2.2, sharex=True, sharey="row")
        for arm in curves.arms:
            for axes, name in zip(rows[:, placements.index(arm.placement)], columns, strict=True):
                _training_curve(axes, arm, name, arm_styles(curves)[arm.name])
        rows[0, 0].set_ylim(_training_range(curves))
        if any((run.train["grad_norm"] > 0).any() for run in curves.runs):
            rows[1, 0].set_yscale("log")
        rows[2, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        for axes, words in zip(rows[:, 0], columns.values(), strict=True):
            axes.set_ylabel(words)
        for axes, placement in zip(rows[0], placements, strict=True):
            axes.set_title(placement_name(placement))
            _unigram(axes, curves)
        for axes in rows[2]:
            axes.set_xlabel("update")
        _legend(figure, curves, curves.arms, crosses=False)
    return figure


def _training_curve(axes: Axes, arm: ArmCurves, name: str, style: Style) -> None:
    """Mean over the seeds; a thin line for each run that the mean leaves out."""
    steps, values = arm.training(name)
    if len(steps):
        axes.plot(steps, values.mean(0), **style.line(linewidth=1.2))
    for run in arm.runs:
        if not any(run is other for other in arm.mean_runs):
            axes.plot(run.train["step"], run.train[name], **style.line(linewidth=0.7, marker=""))


def _training_range(curves: StudyCurves) -> tuple[float | None, float | None]:
    low, high = _whole_range(curves)
    losses = _finite([run.train["train_loss"] for run in curves.runs])
    if low is None or high is None or not len(losses):
        return None, None
    return min(low, losses.min()), high + 0.1 * (high - low)


def draw_against_bands(
    run: tuple[np.ndarray, np.ndarray],
    bands: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    unigram_cross_entropy: float,
    run_label: str,
) -> Figure:
    """A run on the 95 % prediction bands of reference arms.

    Args:
        run: Updates and validation losses, each [validations].
        bands: By the arm's label: updates, mean, low and high, each [steps]; low and high nan for one seed.
        unigram_cross_entropy: Nats.
        run_label: What the run is called in the legend.
    """
    with rc_context(DRAWING):
        figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
        axes = figure.add_subplot()
        for index, (label, (steps, mean, low, high)) in enumerate(bands.items()):
            color = COLORS[index % 6]
            line = LINES[index // 6 % len(LINES)]
            # Judged at the markers only; what lies between two of them is drawn, not known.
            axes.plot(steps, mean, color=color, linestyle=line, marker=".", linewidth=1.2, label=label)
            axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(*run, color="black", marker="o", markersize=3, linewidth=1.4, label=run_label)
        axes.axhline(
            unigram_cross_entropy, color=GREY, linestyle="--", linewidth=1, label="unigram cross-entropy"
        )
        losses = _finite([run[1], *(mean for _, mean, _, _ in bands.values())])
        if len(losses):
            room = max(unigram_cross_entropy - losses.min(), 0.2)
            bottom = min(losses.min(), unigram_cross_entropy) - HEADROOM * room
            axes.set_ylim(bottom, unigram_cross_entropy + 2 * HEADROOM * room)
        axes.set(xlabel="update", ylabel=LOSS)
        figure.legend(loc="outside lower center", ncols=2)
    return figure


def _panels(rows: int, columns: int, height: float, **sharing: Any) -> tuple[Figure, np.ndarray]:
    """A figure and its axes, [rows, columns]."""
    figure = Figure(figsize=(WIDTH, rows * height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    return figure, figure.subplots(rows, columns, squeeze=False, **sharing)


def _legend(figure: Figure, curves: StudyCurves, arms: list[ArmCurves], crosses: bool) -> None:
    """Arms by their labels, and what else there is to see."""
    styles = arm_styles(curves)
    handles = [Line2D([], [], label=_legend_label(arm), **styles[arm.name].line(markevery=1)) for arm in arms]
    _place_legend(figure, handles, _extra_handles(curves, crosses))


def _place_legend(figure: Figure, handles: list[Line2D], extra: list[Line2D]) -> None:
    """Below the panels; the figure grows by what the legend needs."""
    columns = 2 if max((len(handle.get_label()) for handle in handles), default=0) <= 62 else 1
    half = -(-len(handles) // columns)  # of two placements, each has a column of its own
    handles = [*handles[:half], *extra[:1], *handles[half:], *extra[1:]]
    figure.set_figheight(figure.get_figheight() + 0.2 * -(-len(handles) // columns) + 0.1)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=3.4, frameon=False)


def _legend_label(arm: ArmCurves) -> str:
    """The label, and what makes the arm's line end or be absent."""
    if not any(len(run.steps) for run in arm.runs):
        return f"{arm.label} (no validation yet)"
    return f"{arm.label} ({len(arm.diverged)} of {len(arm.begun)} diverged)" if arm.diverged else arm.label


def _extra_handles(curves: StudyCurves, crosses: bool) -> list[Line2D]:
    handles = []
    if np.isfinite(curves.unigram_cross_entropy):
        label = "unigram cross-entropy"
        handles.append(Line2D([], [], color=GREY, linestyle="--", linewidth=1, label=label))
    if crosses and any(arm.diverged for arm in curves.arms):
        handles.append(Line2D([], [], color=GREY, linestyle="", marker="x", label="a seed diverged here"))
    return handles
