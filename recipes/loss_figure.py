"""The validation loss of a run against updates, as its model card shows it."""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FIGURE = "validation_loss.png"
BELOW = "below_unigram_cross_entropy"


def can_draw(lines: Iterable[dict[str, Any]]) -> bool:
    """Whether the lines of a metrics.jsonl hold a curve, and there is something to draw it with."""
    return bool(find_spec("matplotlib")) and len(_measured(lines)) > 1


def save_loss_figure(lines: Iterable[dict[str, Any]], file: Path) -> None:
    """Draw the validation losses among the lines of a metrics.jsonl."""
    from matplotlib.figure import Figure

    measured = _measured(lines)
    steps, losses = [line["step"] for line in measured], [line["validation_loss"] for line in measured]
    figure = Figure(figsize=(6, 3.4), layout="constrained", dpi=120)
    axes = figure.add_subplot()
    axes.plot(steps, losses, marker=".", label="validation loss")
    unigram = losses[-1] + measured[-1][BELOW]
    axes.axhline(unigram, color="0.5", linestyle="--", linewidth=1, label="unigram cross-entropy")
    axes.set(xlabel="update", ylabel="nats a masked token")
    axes.legend(frameon=False)
    figure.savefig(file)


def _measured(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line.get("validation_loss") is not None]
