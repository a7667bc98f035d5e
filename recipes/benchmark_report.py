"""Tables and a figure of recipes/benchmark.py."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

Rounds = list[dict[str, Any]]


def write_benchmark(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write all values, the tables and the figures; return the files."""
    values, tables = folder / "benchmark.json", folder / "benchmark.md"
    values.write_text(json.dumps(results, indent=1) + "\n")
    tables.write_text("\n".join(_page(results)) + "\n")
    files = [values, tables]
    if "ratios" in results or "ablation" in results:
        files.append(folder / "benchmark.png")
        draw(results).savefig(files[-1], dpi=150)
    if "loss" in results:
        files.append(folder / "benchmark_loss.png")
        draw_losses(results["loss"]).savefig(files[-1], dpi=150)
    return files


def ratios(ours: Rounds, others: Sequence[Rounds], name: str = "tokens_per_second") -> list[float]:
    """Ours by the best of the others (the fastest, the smallest), round by round."""
    best = max if name == "tokens_per_second" else min
    return [
        mine[name] / best(other[name] for other in rivals)
        for mine, *rivals in zip(ours, *others, strict=True)
    ]


def exponent(numbers: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost by log number, least squares."""
    return float(np.polyfit(np.log(numbers), np.log(costs), 1)[0])


def _page(results: dict[str, Any]) -> Iterator[str]:
    yield f"`{results['command']}`: {results['circumstances']}."
    yield "Medians of the rounds; in brackets the lowest and the highest."
    for part, write in PARTS.items():
        if part in results:
            yield ""
            yield from write(results[part])


def _ratios(arms: dict[str, Rounds]) -> Iterator[str]:
    yield "| model, dropout | way | tokens/s | share of the ceiling | peak memory |"
    yield "|---|---|---|---|---|"
    for name, rounds in arms.items():
        size, dropout, kind = name.split("|")
        yield f"| {size}, {dropout} | {kind} | {_rates(rounds)} | {_shares(rounds)} | {_memory(rounds)} |"
    yield ""
    yield "| model, dropout | way | against stock | against tuned stock | memory by stock's |"
    yield "|---|---|---|---|---|"
    for pair in dict.fromkeys(name.rsplit("|", 1)[0] for name in arms):
        kinds = {name.rsplit("|", 1)[1]: rounds for name, rounds in arms.items() if name.startswith(pair)}
        tuned = [rounds for kind, rounds in kinds.items() if kind.startswith("stock bf16")]
        for kind in ("ours", "ours compiled"):
            cells = (
                spread(ratios(kinds[kind], [kinds["stock"]])),
                spread(ratios(kinds[kind], tuned)),
                spread(ratios(kinds[kind], [kinds["stock"]], "peak_bytes")),
            )
            yield f"| {pair.replace('|', ', ')} | {kind} | {' | '.join(cells)} |"


def _ablation(arms: dict[str, Rounds]) -> Iterator[str]:
    ours = arms["ours"]
    yield "| ours | tokens/s by ours | tokens/s | share of the ceiling | peak memory |"
    yield "|---|---|---|---|---|"
    for name, rounds in arms.items():
        cells = (spread(ratios(rounds, [ours])), _rates(rounds), _shares(rounds), _memory(rounds))
        yield f"| {name} | {' | '.join(cells)} |"


def _growth(arms: dict[str, Rounds]) -> Iterator[str]:
    yield "| what grows | time of a token (us), share of the ceiling | exponent |"
    yield "|---|---|---|"
    for what in dict.fromkeys(name.split("|")[0] for name in arms):
        points = {
            int(name.split("|")[1]): rounds for name, rounds in arms.items() if name.startswith(f"{what}|")
        }
        # By the ceiling of the moment, so that a machine that is slower for a while changes nothing.
        costs = [rounds[0]["ceiling"] / rounds[0]["tokens_per_second"] for rounds in points.values()]
        times = "; ".join(
            f"{number}: {1e6 / rounds[0]['tokens_per_second']:.0f}, {rounds[0]['mfu']:.0%}"
            for number, rounds in points.items()
        )
        yield f"| {what} | {times} | {exponent(list(points), costs):.2f} |"


def _data(found: dict[str, Any]) -> Iterator[str]:
    store = found["token_store"]
    rate, alone, single = (store[f"{name}_tokens_per_second"] for name in ("store", "all_cores", "one_core"))
    yield "| what | |"
    yield "|---|---|"
    yield f"| token store, tokens/s | {rate:,.0f} |"
    yield f"| share of `tokenizers` alone on all cores ({alone:,.0f}) | {rate / alone:.0%} |"
    yield f"| times `tokenizers` alone on one core ({single:,.0f}) | {rate / single:.2f} |"
    yield f"| bytes of a token | {store['bytes_per_token']:.2f} |"
    for step, seconds in found["first_batch_seconds"].items():
        yield f"| seconds to the first batch after {int(step):,} updates | {seconds:.3f} |"
    rate = found["validation_tokens_per_second"]
    yield f"| validation in float32 (4 layers x 192), tokens/s | {rate:,.0f} |"


def _loss(found: dict[str, Any]) -> Iterator[str]:
    goal = min(loss for _, _, loss in found["stock"]["curve"])
    limit = _seconds_to(goal, found["stock"])
    yield (
        f"| way | updates | training time (s) | last loss | part of stock's time to {goal:.3f} or below "
        "| bf16 product before and after (GFLOP/s) |"
    )
    yield "|---|---|---|---|---|---|"
    for name, way in found.items():
        updates, seconds, loss = way["curve"][-1]
        reached = _seconds_to(goal, way)
        part = "not reached" if reached is None else f"{reached / limit:.3f}"
        products = ", ".join(f"{rate / 1e9:.0f}" for rate in way["ceilings"])
        yield f"| {name} | {updates} | {seconds:.0f} | {loss:.3f} | {part} | {products} |"


def _seconds_to(goal: float, way: dict[str, Any]) -> float | None:
    """Training time until the loss is `goal` or less for the first time."""
    return next((seconds for _, seconds, loss in way["curve"] if loss <= goal), None)


def _scaling(found: dict[str, Any]) -> Iterator[str]:
    yield "| model | tokens/s of one process | of two | two by one | predicted |"
    yield "|---|---|---|---|---|"
    for name, size in found.items():
        one, two = size["measured"].values()
        cells = (_rates(one), _rates(two), spread(ratios(two, [one])), spread(size["predicted"]))
        yield f"| {name} | {' | '.join(cells)} |"


def _start(found: dict[str, Any]) -> Iterator[str]:
    yield "| from the command to the first update | seconds |"
    yield "|---|---|"
    yield f"| no tokenizer, no token store | {found['cold']:.1f} |"
    yield f"| both there | {found['warm']:.1f} |"
    for updates, seconds in found["resumed"].items():
        yield f"| resumed after {updates} updates | {seconds:.1f} |"


PARTS = {
    "ratios": _ratios,
    "ablation": _ablation,
    "growth": _growth,
    "data": _data,
    "loss": _loss,
    "scaling": _scaling,
    "start": _start,
}


def spread(values: Sequence[float]) -> str:
    """The median, and in brackets the lowest and the highest."""
    return f"{np.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def _rates(rounds: Rounds) -> str:
    return f"{np.median([one['tokens_per_second'] for one in rounds]):,.0f}"


def _shares(rounds: Rounds) -> str:
    shares = [one["mfu"] for one in rounds]
    return f"{np.median(shares):.0%} ({min(shares):.0%}-{max(shares):.0%})"


def _memory(rounds: Rounds) -> str:
    return f"{np.median([one['peak_bytes'] for one in rounds]) / 1e6:,.0f} MB"


def draw(results: dict[str, Any]) -> Figure:
    """A panel for each model of the ratios, and one for the ablation.

    A bar is a way, a line goes from its lowest to its highest round.
    """
    shown: dict[str, dict[str, Rounds]] = {}
    for name, rounds in results.get("ratios", {}).items():
        size, way = name.split("|", 1)
        shown.setdefault(f"{size}: dropout, way", {})[way] = rounds
    if "ablation" in results:
        shown["ablation"] = results["ablation"]
    rows = [len(arms) for arms in shown.values()]
    figure = Figure(figsize=(8, 1 + 0.3 * sum(rows)), layout="constrained")
    panels = figure.subplots(len(shown), height_ratios=rows, squeeze=False)[:, 0]
    for panel, (part, arms) in zip(panels, shown.items(), strict=True):
        _bars(panel, arms)
        panel.set_title(part, loc="left")
    return figure


def draw_losses(found: dict[str, Any]) -> Figure:
    """Validation loss against training time and against updates; dashed, the lowest loss of stock."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    by_time, by_update = figure.subplots(1, 2, sharey=True)
    for number, (way, course) in enumerate(found.items()):
        updates, seconds, losses = np.array(course["curve"]).T
        colour = "C7" if way == "stock" else f"C{number - 1}"
        by_time.plot(seconds, losses, color=colour, label=way)
        by_update.plot(updates, losses, color=colour, label=way)
    goal = min(loss for _, _, loss in found["stock"]["curve"])
    for axes, name in ((by_time, "training time (s)"), (by_update, "update")):
        axes.axhline(goal, color="C7", linestyle="--", linewidth=1)
        axes.set(xscale="log", xlabel=name)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    by_time.set_ylabel("validation loss (nats a masked token)")
    by_update.legend(frameon=False)
    return figure


def _bars(axes: Axes, arms: dict[str, Rounds]) -> None:
    rates = [[one["tokens_per_second"] for one in rounds] for rounds in arms.values()]
    middle = np.array([np.median(rate) for rate in rates])
    ends = np.array([[m - min(rate), max(rate) - m] for m, rate in zip(middle, rates, strict=True)]).T
    colours = ["C0" if name.rsplit("|", 1)[-1].startswith("ours") else "C7" for name in arms]
    axes.barh(range(len(arms)), middle, xerr=ends, color=colours)
    axes.set_yticks(range(len(arms)), [name.replace("|", ", ") for name in arms])
    axes.invert_yaxis()
    axes.set_xlabel("tokens/s")
