"""The validation loss of a run against updates, as its model card shows it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

FIGURE = "validation_loss.png"


def draw_loss(lines: Iterable[dict[str, Any]], file: Path) -> bool:
    """Draw the validation losses among the lines of a metrics.jsonl, if there is a curve; whether it was."""
    measured = [line for line in lines if line.get("validation_loss") is not None]
    if len(measured) < 2:
        return False
    try:
        _draw(measured, file)
    except Exception:  # no matplotlib, or a broken one: a picture is no reason to fail
        return False
    return True


def _draw(measured: list[dict[str, Any]], file: Path) -> None:
    from matplotlib.figure import Figure

    steps, losses = [line["step"] for line in measured], [line["validation_loss"] for line in measured]
    figure = Figure(figsize=(6, 3.4), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    axes.plot(steps, losses, marker=".", label="validation loss")
    unigram = losses[-1] + measured[-1]["below_unigram_cross_entropy"]
    axes.axhline(unigram, color="0.5", linestyle="--", linewidth=1, label="unigram cross-entropy")
    axes.set(xlabel="update", ylabel="nats a masked token")
    axes.legend(frameon=False)
    figure.savefig(file)
