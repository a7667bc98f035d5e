"""How long the default run takes from its command to its first update: from nothing, prepared, resumed."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, TextIO

from recipes.errors import UserError

COMMAND = [sys.executable, str(Path(__file__).with_name("pretrain.py")), "--logging_steps", "1"]
# Updates that were done before a run is resumed, at least.
RESUMED_AFTER = (10, 100)


def start_times(options: list[str]) -> dict[str, Any]:
    """Start the default run again and again, with `options` of recipes/pretrain.py.

    Returns:
        Seconds from the command to the first update's training line: `cold` (no tokenizer and no token store
        yet), `warm` (both there), and `resumed`, by the number of updates that were done before.
    """
    with TemporaryDirectory() as folder:
        command = [*COMMAND, *options, "--cache_dir", f"{folder}/cache", "--output_dir"]
        cold, _ = _run(command, Path(folder, "run"), RESUMED_AFTER[0])
        warm, _ = _run(command, Path(folder, "other"), 1)
        resumed = {}
        for more in (*RESUMED_AFTER[1:], 1):
            seconds, done = _run(command, Path(folder, "run"), more)
            resumed[done] = seconds
    return {"cold": cold, "warm": warm, "resumed": resumed}


def _run(command: list[str], output_dir: Path, updates: int) -> tuple[float, int]:
    """Start or resume a run and end it `updates` later; return the seconds to its first, and its start.

    Raises:
        UserError: The run ended by itself.
    """
    metrics = output_dir / "metrics.jsonl"
    done = _last_step(metrics)
    start = time.perf_counter()
    with (
        TemporaryFile("w+") as log,
        subprocess.Popen([*command, str(output_dir)], stdout=log, stderr=log) as process,
    ):
        _wait(process, log, lambda: _last_step(metrics) > done)
        seconds = time.perf_counter() - start
        _wait(process, log, lambda: _last_step(metrics) >= done + updates)
        process.terminate()  # saves a checkpoint
    return seconds, done


def _wait(process: subprocess.Popen, log: TextIO, is_over: Callable[[], bool]) -> None:
    while not is_over():
        if process.poll() is not None:
            log.seek(0)
            raise UserError(f"parts start: recipes/pretrain.py ended too early: {log.read()[-500:]}")
        time.sleep(0.01)


def _last_step(metrics: Path) -> int:
    """The update of the last whole line, 0 where there is none."""
    text = metrics.read_text() if metrics.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return json.loads(lines[-1])["step"] if lines else 0
