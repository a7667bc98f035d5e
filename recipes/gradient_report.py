"""What the gradient probe found: means and intervals over seeds, tables and figures beside theory.

Gradient norms are averaged in the logarithm (geometric means, and the t-interval of the logarithms): after
warm-up they differ by orders of magnitude between seeds. Everything else has an arithmetic mean.
"""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no screen is needed
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from recipes.files import write_json
from recipes.gradient_arguments import GradientArguments
from recipes.gradient_study import CHECKPOINT, WARMUP
from recipes.intervals import mean_interval
from recipes.theory import POST_LAYER_FACTOR, THEORY, exponent, exponents_of_lemma_2

# Entries of a legend that stands inside its panel.
FEW = 6
GRADIENTS = ("w1_gradient", "w2_gradient", "w1_batch_gradient", "w2_batch_gradient", "stream_gradient")
TITLES = {
    "bert": "BERT's initialisation",
    "xavier": "Xavier initialisation",
    "theory": "the paper's simplified setting",
    WARMUP: "after warm-up",
    CHECKPOINT: "checkpoints",
}
DIGITS = 4

Group = dict[str, Any]
Interval = dict[str, Any]


def write_report(args: GradientArguments, measurements: list[dict[str, Any]]) -> str:
    """Write gradients.json, summary.json, report.md and the figures; return the essential table."""
    folder = Path(args.pretraining().output_dir)
    settings = json.loads((folder / "settings.json").read_text())
    write_json(folder / "gradients.json", {"settings": settings, "measurements": _finite(measurements)})
    layers = args.pretraining().model["num_hidden_layers"]
    summary = {"settings": settings, "num_hidden_layers": layers, **summarise(measurements)}
    text = json.dumps(_finite(summary, DIGITS), allow_nan=False)
    (folder / "summary.json").write_text(text + "\n", encoding="utf-8")
    # Figures and tables show what the file holds.
    summary = json.loads(text)
    figures = draw_figures(summary, folder)
    report = report_text(summary, figures)
    (folder / "report.md").write_text(report, encoding="utf-8")
    return f"\n{essential_table(summary)}\n\nwrote {folder / 'report.md'}, summary.json, gradients.json"


# -------------------------------------------------------------------- numbers


def summarise(measurements: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Means and 95 % t-intervals over seeds: of each group, and of what is fitted to groups."""
    identity = ("kind", "norm_placement", "num_hidden_layers", "checkpoint")
    groups = {}
    for one in measurements:
        groups.setdefault(tuple(one[name] for name in identity), []).append(one)
    sweeps = {}
    for (kind, placement, depth, _), ones in groups.items():
        if kind not in (WARMUP, CHECKPOINT) and _has_gradients(ones):
            sweeps.setdefault((kind, placement), {})[depth] = ones
    return {
        "groups": [dict(zip(identity, key, strict=True)) | _summary(ones) for key, ones in groups.items()],
        "depth_exponents": [
            _depth_exponent(*key, by_depth) for key, by_depth in sweeps.items() if len(by_depth) > 1
        ],
        "layer_factors": [
            dict(zip(identity, key, strict=True)) | _layer_factors(ones)
            for key, ones in groups.items()
            if len(ones[0]["w2_gradient"]) > 1 and _has_gradients(ones)
        ],
    }


def _has_gradients(ones: list[dict[str, Any]]) -> bool:
    """Whether powers can be fitted: where branches start switched off (ReZero), gradients inside are 0."""
    return all(min(one[name]) > 0 for one in ones for name in GRADIENTS)


def _summary(ones: list[dict[str, Any]]) -> dict[str, Any]:
    """One group: its seeds are the rows."""
    names = list(ones[0]["norm_inputs"])
    return {
        "seeds": len(ones),
        "loss": _interval([one["loss"] for one in ones]),
        **{name: _log_interval([one[name] for one in ones]) for name in GRADIENTS},
        **{name: _interval([one[name] for one in ones]) for name in ("hidden_state", "straight_through")},
        "norms": names,
        "norm_inputs": _interval([[one["norm_inputs"][name] for name in names] for one in ones]),
    }


def _depth_exponent(kind: str, placement: str, by_depth: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """The power of the depth in the last layer's W2 gradient: fitted for each seed, then the interval."""
    depths = sorted(by_depth)
    seeds = sorted(set.intersection(*({one["seed"] for one in ones} for ones in by_depth.values())))

    def last(name: str) -> np.ndarray:
        values = {(depth, one["seed"]): one[name][-1] for depth in depths for one in by_depth[depth]}
        return np.array([[values[depth, seed] for depth in depths] for seed in seeds])

    result = {"kind": kind, "norm_placement": placement, "depths": depths, "seeds": len(seeds)}
    result |= _interval(exponent(depths, last("w2_gradient")))
    result["single_batches"] = _interval(exponent(depths, last("w2_batch_gradient")))
    # Lemma 3: a norm divides the gradient by the norm of its input.
    result["from_hidden_state"] = _interval(exponent(depths, last("hidden_state") ** -0.5))
    if placement in THEORY:
        result["theory"] = THEORY[placement].depth_exponent
        result["lemma_2"] = list(exponents_of_lemma_2(placement, depths))
    return result


def _layer_factors(ones: list[dict[str, Any]]) -> dict[str, Any]:
    """By which factor gradients change from a layer to the one before it (fit of the logarithm)."""
    factors = {}
    for name in ("w1_gradient", "w2_gradient", "stream_gradient"):
        values = np.log([one[name] for one in ones])  # [seeds, layers]
        slope = np.polynomial.polynomial.polyfit(np.arange(values.shape[1]), values.T, 1)[1]
        factors[name] = _interval(np.exp(-slope))
    factors["straight_through"] = _interval([np.mean(one["straight_through"]) for one in ones])
    return {"seeds": len(ones), **factors}


def _interval(rows: Sequence[Any]) -> Interval:
    mean, low, high = (np.asarray(values).tolist() for values in mean_interval(np.asarray(rows)))
    return {"mean": mean, "low": low, "high": high}


def _log_interval(rows: Sequence[Any]) -> Interval:
    """Geometric mean, its interval, and the extremes over seeds; for a gradient of 0 the mean is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        geometric = {name: np.exp(values).tolist() for name, values in _interval(np.log(rows)).items()}
    return geometric | {"lowest": np.min(rows, axis=0).tolist(), "highest": np.max(rows, axis=0).tolist()}


def _finite(value: Any, digits: int | None = None) -> Any:
    """The same for JSON: numbers that are none become None, others are cut to significant digits."""
    if isinstance(value, dict):
        return {name: _finite(v, digits) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v, digits) for v in value]
    if isinstance(value, float):
        return (float(f"{value:.{digits}g}") if digits else value) if math.isfinite(value) else None
    return value


# -------------------------------------------------------------------- figures


def draw_figures(summary: dict[str, Any], folder: Path) -> list[str]:
    """Draw every figure for which there are measurements, as PNG and SVG; return their names."""
    figures = {
        "gradient_by_layer": _draw_by_layer,
        "gradient_by_depth": _draw_by_depth,
        "hidden_states": _draw_hidden_states,
        "towards_the_input": _draw_towards_the_input,
    }
    drawn = []
    for name, draw in figures.items():
        figure = draw(summary)
        if figure is not None:
            _move_long_legends(figure)
            figure.savefig(folder / f"{name}.png", dpi=110)
            figure.savefig(folder / f"{name}.svg")
            plt.close(figure)
            drawn.append(name)
    return drawn


def _move_long_legends(figure: Figure) -> None:
    """Put what would hide the curves below the figure, each label once."""
    long = [axes for axes in figure.axes if axes.get_legend() and len(axes.get_legend().texts) > FEW]
    handles = {}
    for axes in long:
        axes.get_legend().remove()
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if handles:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.2 * len(handles) / 4)
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize="small")


def _panels(summary: dict[str, Any]) -> list[tuple[str, list[Group]]]:
    """For each panel its title and its groups: initialisations at the depth where layers are compared; what
    has been warmed up joins the initialisation that it started from."""
    at_depth = [
        group
        for group in summary["groups"]
        if group["kind"] == CHECKPOINT or group["num_hidden_layers"] == summary["num_hidden_layers"]
    ]
    kinds = list(dict.fromkeys(group["kind"] for group in at_depth))
    panels = {kind: [g for g in at_depth if g["kind"] == kind] for kind in kinds}
    if "bert" in panels and WARMUP in panels:
        panels["bert"] += panels.pop(WARMUP)
    return [(TITLES[kind], groups) for kind, groups in panels.items()]


def _grid(rows: int, titles: list[str]) -> tuple[Any, np.ndarray] | None:
    """A figure of `rows` x panels; None where there is nothing to show."""
    if not titles:
        return None
    columns = len(titles)
    size = (4.6 * columns, 3.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for column, title in enumerate(titles):
        axes[0, column].set_title(title)
    for one in axes.flat:
        one.grid(alpha=0.3, which="both")
        one.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _draw_by_layer(summary: dict[str, Any]) -> Any:
    panels = _panels(summary)
    if (grid := _grid(2, [title for title, _ in panels])) is None:
        return None
    figure, axes = grid
    for row, name in enumerate(("w1_gradient", "w2_gradient")):
        for column, (_, groups) in enumerate(panels):
            for group in groups:
                _band(axes[row, column], _layers(group), group[name], summary, group)
            matrix = name[:2].upper()
            _log_axes(axes[row, column], xlabel="layer", ylabel=f"gradient norm of {matrix}")
            axes[row, column].yaxis.set_minor_formatter("{x:g}" if len(groups) < 3 else NullFormatter())
            axes[row, column].legend(fontsize="small")
    return figure


def _draw_by_depth(summary: dict[str, Any]) -> Any:
    fits = summary["depth_exponents"]
    kinds = list(dict.fromkeys(fit["kind"] for fit in fits))
    if (grid := _grid(1, [TITLES[kind] for kind in kinds])) is None:
        return None
    figure, axes = grid
    for fit in fits:
        one = axes[0, kinds.index(fit["kind"])]
        groups = [g for depth in fit["depths"] for g in summary["groups"] if _is_of(g, fit, depth)]
        values = {k: [_nan(g["w2_gradient"][k][-1]) for g in groups] for k in ("mean", "low", "high")}
        color, depths = _color(summary, fit), np.array(fit["depths"])
        errors = np.abs(np.array([values["low"], values["high"]]) - values["mean"])
        label = f"{fit['norm_placement']}: exponent {_number(fit, '.2f')}"
        one.errorbar(depths, values["mean"], errors, marker="o", ls="", capsize=3, color=color, label=label)
        _line(one, depths, values["mean"], fit["mean"], color, "-")
        if "theory" in fit:
            _line(one, depths, values["mean"], fit["theory"], color, ":", f"theory: {fit['theory']:g}")
        one.set(xscale="log", yscale="log", xlabel="layers", ylabel="gradient norm of the last W2")
    ticks = sorted({depth for fit in fits for depth in fit["depths"]})
    for one in axes.flat:
        one.set_xticks(ticks, map(str, ticks))
        one.xaxis.minorticks_off()
        low, high = one.get_ylim()
        one.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
        # Room for the legend below the values.
        one.set_ylim(bottom=0.5 * one.get_ylim()[0])
        one.legend(fontsize="small", loc="lower left")
    return figure


def _line(
    axes: Axes, depths: np.ndarray, values: list[float], power: float, color: str, style: str, label: str = ""
) -> None:
    """depths ** power, through the middle of the values."""
    scale = np.exp(np.mean(np.log(values)) - power * np.mean(np.log(depths)))
    axes.plot(depths, scale * depths**power, color=color, ls=style, lw=1, label=label or None)


def _draw_hidden_states(summary: dict[str, Any]) -> Any:
    panels = _panels(summary)
    if (grid := _grid(2, [title for title, _ in panels])) is None:
        return None
    figure, axes = grid
    for column, (_, groups) in enumerate(panels):
        top, bottom = axes[:, column]
        for group in groups:
            _bounds(top, group, summary)
            _band(top, _layers(group), group["hidden_state"], summary, group)
            order = np.arange(1, len(group["norms"]) + 1)
            _band(bottom, order, group["norm_inputs"], summary, group)
        _log_axes(top, xlabel="layer", ylabel=r"hidden state $\|x_l\|^2 / d$")
        _log_axes(bottom, xlabel="norm, in the order of use", ylabel=r"norm input $\|x\|^2 / d$")
        top.legend(fontsize="small")
    return figure


def _bounds(axes: Axes, group: Group, summary: dict[str, Any]) -> None:
    """Lemma 2, for a new model."""
    if group["kind"] in (WARMUP, CHECKPOINT) or group["norm_placement"] not in THEORY:
        return
    low, high = THEORY[group["norm_placement"]].hidden_state(_layers(group))
    color = _color(summary, group)
    axes.fill_between(_layers(group), low, high, color=color, alpha=0.12)
    axes.plot(_layers(group), low, color=color, ls=":", lw=1, label=f"Lemma 2, {group['norm_placement']}")
    axes.plot(_layers(group), high, color=color, ls=":", lw=1)


def _draw_towards_the_input(summary: dict[str, Any]) -> Any:
    panels = _panels(summary)
    if (grid := _grid(2, [title for title, _ in panels])) is None:
        return None
    figure, axes = grid
    for column, (_, groups) in enumerate(panels):
        for group in groups:
            for one, values in zip(axes[:, column], _relative_to_last(group), strict=True):
                one.plot(_layers(group), values, marker=".", **_style(summary, group))
        depth = max(group["num_hidden_layers"] for group in groups)
        layers = np.arange(1, depth + 1)
        label = r"$(2/3)^{(L-l)/2}$"
        for one in axes[:, column]:
            one.plot(layers, POST_LAYER_FACTOR ** (depth - layers), "k:", lw=1, label=label)
            _log_axes(one, xlabel="layer l")
        axes[0, column].set_ylabel("W2 gradient / that of layer L")
        axes[1, column].set_ylabel("part of layer L's gradient\nthat comes straight through to l")
        axes[0, column].legend(fontsize="small")
    return figure


def _log_axes(axes: Axes, **labels: str) -> None:
    """Label the axes; y goes by powers where there is anything above 0."""
    has_values = any((np.asarray(line.get_ydata(), float) > 0).any() for line in axes.lines)
    axes.set(yscale="log" if has_values else "linear", **labels)


def _relative_to_last(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """W2 gradients over that of the last layer, and the product of the layers' straight-through parts."""
    gradients = np.array(group["w2_gradient"]["mean"])
    parts = np.append(group["straight_through"]["mean"], 1.0)
    with np.errstate(invalid="ignore"):
        gradients = gradients / gradients[-1]
    return gradients, np.cumprod(parts[::-1])[::-1]


def _band(axes: Axes, x: np.ndarray, values: Interval, summary: dict[str, Any], group: Group) -> None:
    style = _style(summary, group)
    axes.plot(x, values["mean"], marker=".", **style)
    low, high = ([_nan(v) for v in values[name]] for name in ("low", "high"))
    axes.fill_between(x, low, high, color=style.get("color"), alpha=0.25, lw=0)


def _style(summary: dict[str, Any], group: Group) -> dict[str, Any]:
    if group["kind"] == CHECKPOINT:
        return {"label": _label(group)}
    dashes = "--" if group["kind"] == WARMUP else "-"
    return {"label": _label(group), "color": _color(summary, group), "ls": dashes}


def _color(summary: dict[str, Any], group: Group) -> str:
    placements = list(dict.fromkeys(g["norm_placement"] for g in summary["groups"]))
    number = placements.index(group["norm_placement"])
    return f"C{number}" if len(placements) <= 10 else to_hex(colormaps["tab20"](number % 20))


def _label(group: Group) -> str:
    placement = group["norm_placement"]
    if group["kind"] == CHECKPOINT:
        return f"{'/'.join(Path(group['checkpoint']).parts[-2:])} ({placement})"
    return f"{placement}, after warm-up" if group["kind"] == WARMUP else placement


def _layers(group: Group) -> np.ndarray:
    return np.arange(1, group["num_hidden_layers"] + 1)


def _is_of(group: Group, fit: dict[str, Any], depth: int) -> bool:
    mine = (group["kind"], group["norm_placement"], group["num_hidden_layers"])
    return mine == (fit["kind"], fit["norm_placement"], depth)


def _nan(value: float | None) -> float:
    return math.nan if value is None else value


# -------------------------------------------------------------------- tables


def report_text(summary: dict[str, Any], figures: list[str]) -> str:
    """report.md: figures and tables."""
    captions = {
        "gradient_by_layer": "Norm of the expected gradient of the FFN matrices by layer.",
        "gradient_by_depth": "The last layer's W2 gradient against the number of layers, fit and theory.",
        "hidden_states": "Mean squares of hidden states beside Lemma 2, and of the input of every norm.",
        "towards_the_input": "Gradients of W2 relative to the last layer's, and what of a token's gradient "
        "comes straight through the residual stream, beside appendix F.",
    }
    pictures = [f"![{name.replace('_', ' ')}]({name}.png)\n\n{captions[name]}" for name in figures]
    sections = [
        "# Gradients and norms beside theory",
        "Means (of gradient norms geometric ones) and 95 % t-intervals over seeds. A gradient is averaged "
        "over all batches before its norm is taken; float32, dropout off.",
        *pictures,
        *tables(summary),
    ]
    return "\n\n".join(sections) + "\n"


def tables(summary: dict[str, Any]) -> list[str]:
    """Every table, each under its heading."""
    return [
        "## The last layer's W2 gradient against depth",
        essential_table(summary),
        "## From a layer to the one before it\n\nThe factor of a gradient's norm (fit over all layers), and "
        "the part of a token's gradient that comes straight through the stream, which theory bounds.",
        _factor_table(summary),
        "## Layer by layer",
        *(_layer_table(title, groups) for title, groups in _panels(summary)),
    ]


def essential_table(summary: dict[str, Any]) -> str:
    """The last layer's gradient at the ends of the sweep, its fitted exponent, that of single batches' own
    norms, what Lemma 3 makes of the measured hidden state (x_L), and theory's exponent."""
    head = ["initialisation", "placement", "seeds", "layers", "gradient", "layers", "gradient", "exponent"]
    rows = []
    for fit in summary["depth_exponents"]:
        ends = [
            g for d in (fit["depths"][0], fit["depths"][-1]) for g in summary["groups"] if _is_of(g, fit, d)
        ]
        row = [fit["kind"], fit["norm_placement"], str(fit["seeds"])]
        for group in ends:
            row += [str(group["num_hidden_layers"]), _number(_last(group["w2_gradient"]), ".3g")]
        others = [_number(fit[name], ".3f") for name in ("single_batches", "from_hidden_state")]
        rows.append([*row, _number(fit, ".3f"), *others, _theory_of_exponent(fit)])
    parts = [_table([*head, "of single batches", "of 1/‖x_L‖", "theory"], rows)] if rows else []
    return "\n\n".join([*parts, _mean_table(summary)])


def _theory_of_exponent(fit: dict[str, Any]) -> str:
    if "theory" not in fit:
        return ""
    low, high = fit["lemma_2"]
    # Post-LN's bounds do not depend on L, whatever the depths.
    finite = "" if low == high else f" (at these L {low:.2f} to {high:.2f})"
    return f"{fit['theory']:g}{finite}"


def _mean_table(summary: dict[str, Any]) -> str:
    """Gradients averaged over the layers: what warm-up changes."""
    rows = []
    for _, groups in _panels(summary):
        for group in groups:
            means = [f"{np.mean(group[name]['mean']):.3g}" for name in ("w1_gradient", "w2_gradient")]
            ends = [f"{group['w2_gradient']['mean'][i]:.3g}" for i in (0, -1)]
            loss = f"{group['loss']['mean']:.3f}"
            counts = [str(group[name]) for name in ("seeds", "num_hidden_layers")]
            rows.append([group["kind"], _label(group), *counts, *means, *ends, loss])
    head = [
        "kind",
        "placement",
        "seeds",
        "layers",
        "mean W1",
        "mean W2",
        "W2, first layer",
        "W2, last layer",
        "loss",
    ]
    return _table(head, rows)


def _factor_table(summary: dict[str, Any]) -> str:
    rows = []
    for factors in summary["layer_factors"]:
        names = ("w1_gradient", "w2_gradient", "stream_gradient", "straight_through")
        numbers = [_number(factors[name], ".3f") for name in names]
        known = _theory_of_factor(factors)
        rows.append([factors["kind"], _label(factors), str(factors["num_hidden_layers"]), *numbers, known])
    head = ["kind", "placement", "layers", "W1", "W2", "token's gradient", "straight through", "theory"]
    return _table(head, rows)


def _theory_of_factor(factors: dict[str, Any]) -> str:
    """Appendix F assumes the simplified setting."""
    theory = THEORY.get(factors["norm_placement"])
    if theory is None or factors["kind"] != "theory":
        return ""
    return f"at most {theory.layer_factor:.3f}" if theory.layer_factor < 1 else f"{theory.layer_factor:g}"


def _layer_table(title: str, groups: list[Group]) -> str:
    names = {"w1_gradient": "W1", "w2_gradient": "W2", "hidden_state": "hidden state"}
    head = ["layer", *(f"{_label(group)}: {label}" for group in groups for label in names.values())]
    depth = max(group["num_hidden_layers"] for group in groups)
    rows = []
    for layer in range(depth):
        cells = [_cell(group[name], layer) for group in groups for name in names]
        rows.append([str(layer + 1), *cells])
    return f"### {title[0].upper()}{title[1:]}\n\n{_table(head, rows)}"


def _cell(values: Interval, layer: int) -> str:
    if layer >= len(values["mean"]):
        return ""
    return _number({name: values[name][layer] for name in values}, ".3g")


def _last(values: Interval) -> Interval:
    return {name: numbers[-1] for name, numbers in values.items()}


def _number(value: Interval, form: str) -> str:
    """A mean with its interval, where more than one seed gives one."""
    if value["mean"] is None:
        return "not finite"
    if value["low"] is None:
        return f"{value['mean']:{form}}"
    return f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
