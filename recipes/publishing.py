"""The training's side of pushing: it queues finished checkpoints, and sees to it that somebody pushes them.

Nothing here talks to the network, and nothing here may stop a run: what goes wrong is one line.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from recipes.arguments import PretrainingArguments
from recipes.checkpointing import MARKER, is_scheduled, step_of
from recipes.hub_queue import LAST_CHECKPOINT, Entry, add_entry, pending, push_command, read_status
from recipes.hub_session import words
from recipes.model_card import model_card
from recipes.run_record import Metrics, without_folders

UPLOADER = Path(__file__).with_name("hub_upload.py")
# Strategies that push the trainer's state too, so that another machine can go on, and where they put it.
STATE_FOLDERS = {"checkpoint": LAST_CHECKPOINT, "all_checkpoints": "checkpoint-{step}"}


@dataclass
class Publisher:
    """Pushes the checkpoints of one run; only the main process has one."""

    args: PretrainingArguments
    repo_id: str
    process: subprocess.Popen | None = None

    def __post_init__(self) -> None:
        self.run = Path(self.args.output_dir)

    def start(self) -> None:
        """Let a process push what waits, unless there is one, or nobody to push to."""
        is_running = self.process is not None and self.process.poll() is None
        if is_running or constants.HF_HUB_OFFLINE:
            return
        command = [sys.executable, str(UPLOADER), str(self.run), "--parent", str(os.getpid())]
        # A session of its own: an interrupt at the terminal is the training's affair.
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    def resume(self, checkpoint: Path | None) -> None:
        """Push what an earlier process of this run left, or had no time to queue when it saved."""
        self._try(lambda: self._resume(checkpoint))

    def _resume(self, checkpoint: Path | None) -> None:
        waiting = pending(self.run)
        if checkpoint and checkpoint.parent == self.run:
            name = f"step-{step_of(checkpoint)}"
            if name not in [*(read_status(self.run).pushed or {}), *(entry.name for entry in waiting)]:
                self.save(checkpoint)
        if waiting:
            self.start()

    def save(self, checkpoint: Path) -> None:
        """Queue a checkpoint that has just been saved, where the strategy wants it."""
        is_last = step_of(checkpoint) == self.args.max_steps  # it comes with the results
        # What an interruption made is no part of the trajectory, but another machine may go on from it.
        is_wanted = is_scheduled(checkpoint) or self.args.hub_strategy in STATE_FOLDERS
        if self.args.hub_strategy != "end" and is_wanted and not is_last:
            self._try(lambda: self._queue(checkpoint))

    def finish(self, results: dict[str, Any]) -> None:
        """Queue the final model."""
        self._try(lambda: self._queue(self.run / f"checkpoint-{results['step']}", results))

    def _queue(self, checkpoint: Path, results: dict[str, Any] | None = None) -> None:
        a, is_last = self.args, results is not None
        step = step_of(checkpoint)
        keep = a.hub_strategy == "all_checkpoints"
        entry = Entry(
            step, self.repo_id, a.hub_private_repo, a.hub_strategy, a.hub_min_interval, keep, is_last
        )
        queue_checkpoint(entry, checkpoint, results)
        self.start()

    def wait(self) -> None:
        """Until everything is pushed, given up, or `hub_exit_timeout` is over; says what is left."""
        self._try(self._wait)

    def _wait(self) -> None:
        end = time.monotonic() + self.args.hub_exit_timeout
        if pending(self.run) and not constants.HF_HUB_OFFLINE:
            print(f"pushing to {self.repo_id}, for at most {self.args.hub_exit_timeout:g} s ...", flush=True)
            try:
                self._wait_until(end)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                self.process.kill()
        if left := ", ".join(entry.name for entry in pending(self.run)):
            print(f"not pushed: {left}; it stays queued, send it with: {push_command(self.run)}", flush=True)

    def _wait_until(self, end: float) -> None:
        # More than one process where the last entry came just as one was leaving.
        while pending(self.run):
            self.start()
            if self.process.wait(max(0.0, end - time.monotonic())):
                return  # given up

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # a disk that is full, a process that cannot start: the run goes on
            print(f"not pushed: {type(error).__name__}: {words(error)}", flush=True)


def default_repository(run: Path) -> str:
    """The name of a run's repository where none is given, in the user's own namespace."""
    return run.resolve().name


def queue_checkpoint(entry: Entry, checkpoint: Path, results: dict[str, Any] | None = None) -> None:
    """Queue one checkpoint of a run, with its card, its metrics up to there and its description.

    Args:
        entry: Where it goes.
        checkpoint: A complete checkpoint in the folder of its run.
        results: Of a run that is finished with this checkpoint; the card is then that of the run's folder.
    """
    run = checkpoint.parent
    record = json.loads((checkpoint / "trainer" / "run.json").read_text(encoding="utf-8"))
    lines = [line for line in Metrics(run / "metrics.jsonl").lines() if line["step"] <= entry.step]
    if results is None:
        name = entry.repo_id.split("/")[-1]
        card = model_card(name, record, _results_at(checkpoint, lines), has_figure=True)
    else:
        card, record = (run / "README.md").read_text(encoding="utf-8"), record | {"results": results}
    # Where things lie on this machine is nobody else's business.
    record |= {"options": without_folders(record["options"])}
    texts = {
        "README.md": card,
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "run.json": json.dumps(record, indent=2) + "\n",
    }
    add_entry(run, entry, _files(checkpoint, entry.strategy), texts)


def _results_at(checkpoint: Path, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What was known when a checkpoint was saved."""
    state = json.loads((checkpoint / "trainer" / "state.json").read_text(encoding="utf-8"))
    measured = [line for line in lines if "validation_loss" in line] or [{}]
    return {name: measured[-1].get(name) for name in ("validation_loss", "validation_accuracy")} | state


def _files(checkpoint: Path, strategy: str) -> Iterator[tuple[Path, Path]]:
    """Files of a checkpoint, and where they lie in the repository: with the trainer's state, twice."""
    state = STATE_FOLDERS.get(strategy, "").format(step=step_of(checkpoint))
    for file in sorted(f for f in checkpoint.rglob("*") if f.is_file() and not f.is_symlink()):
        path = file.relative_to(checkpoint)
        if path.parts[0] not in ("trainer", MARKER):
            yield file, path
        if state:
            yield file, Path(state) / path
