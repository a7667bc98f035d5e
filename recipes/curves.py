"""Draw the validation loss of runs against the step, and print it as a table.

    python recipes/curves.py output/pre output/post --output output/curves.png

Runs that were validated on other masks are refused: their losses do not compare.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no screen is needed
from matplotlib import pyplot as plt

from recipes.arguments import UserError
from recipes.run_record import Metrics


def main() -> int:
    """Parse, call, done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of pre-training runs")
    parser.add_argument("--output", type=Path, default=Path("output/curves.png"), help="figure, .png or .svg")
    arguments = parser.parse_args()
    try:
        runs = read_runs(arguments.runs)
        draw(runs, arguments.output)
        print(table(runs))
        print(f"\nwrote {arguments.output}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def read_runs(folders: list[Path]) -> dict[str, dict[str, Any]]:
    """For each run, by the name of its folder: validation loss by step, and unigram cross-entropy.

    Raises:
        UserError: A folder is no run, has no validation yet, or has other masks than the first.
    """
    runs, fingerprints = {}, {}
    for folder in folders:
        if not (folder / "run.json").exists():
            raise UserError(f"runs {folder}: holds no run.json; give the output_dir of a run")
        lines = [line for line in Metrics(folder / "metrics.jsonl").lines() if "validation_loss" in line]
        if not lines:
            raise UserError(f"runs {folder}: has not been validated yet")
        fingerprints[folder] = lines[-1]["mask_fingerprint"]
        if fingerprints[folder] != fingerprints[folders[0]]:
            raise UserError(f"runs {folder}: was validated on other masks than {folders[0]}")
        entropy = json.loads((folder / "run.json").read_text())["unigram_cross_entropy"]
        losses = {line["step"]: line["validation_loss"] for line in lines}
        runs[folder.name] = {"losses": losses, "unigram_cross_entropy": entropy}
    return runs


def draw(runs: dict[str, dict[str, Any]], file: Path) -> None:
    """Validation loss against step, a line a run, and the level of a model without context."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, run in runs.items():
        axes.plot(list(run["losses"]), list(run["losses"].values()), marker=".", label=name)
    entropy = next(iter(runs.values()))["unigram_cross_entropy"]
    axes.axhline(entropy, color="grey", linestyle="--", label="unigram cross-entropy")
    axes.set(xlabel="update", ylabel="validation loss (nats a masked token)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def table(runs: dict[str, dict[str, Any]]) -> str:
    """The same numbers in Markdown: a row a step, a column a run."""
    steps = sorted({step for run in runs.values() for step in run["losses"]})
    rows = [["update", *runs], ["---:"] * (len(runs) + 1)]
    for step in steps:
        losses = [run["losses"].get(step) for run in runs.values()]
        rows.append([str(step), *("" if loss is None else f"{loss:.3f}" for loss in losses)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
