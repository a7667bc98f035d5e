"""Brings the runs of a study to their end, side by side where asked; what is finished is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from tqdm import tqdm

from recipes.errors import UserError
from recipes.files import FolderLock
from recipes.launch import usable_cores
from recipes.preparation import prepare_stores
from recipes.run_record import Metrics, check_same_run, describe_run
from recipes.stages import build_stages, remaining_tokens
from recipes.stopping import OWNER
from recipes.study import Study

PRETRAIN = Path(__file__).parent / "pretrain.py"
POLL_SECONDS = 2.0


@dataclass
class StudyRun:
    """One arm and seed: its folder, its options, its process while it runs."""

    name: str
    folder: Path
    options: dict[str, Any]
    max_steps: int
    process: subprocess.Popen | None = None

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.folder.with_suffix(".log")

    def results(self) -> dict[str, Any] | None:
        """What run.json says about how it ended; None while it has not."""
        try:
            return json.loads((self.folder / "run.json").read_text(encoding="utf-8")).get("results")
        except (OSError, ValueError):
            return None

    def updates(self) -> int:
        """Updates that need no more doing: all, where the run has ended."""
        if self.results() is not None:
            return self.max_steps
        try:
            lines = Metrics(self.folder / "metrics.jsonl").lines()
        except UserError:  # damaged: the run itself will say so
            return 0
        return max((line["step"] for line in lines), default=0)


def run_study(study: Study, parallel_runs: int) -> list[str]:
    """Bring every run of a study to its end.

    Args:
        study: What to run.
        parallel_runs: Runs at a time. They share the cores; each has GPUs of its own where there are any.

    Returns:
        A line for each run that failed; a run that diverged did not.

    Raises:
        UserError: The corpus or the tokenizer cannot be prepared, or there are too few GPUs.
    """
    _check_gpus(study, parallel_runs)
    runs = [
        StudyRun(f"{arm.label}, seed {seed}", study.folder(arm, seed), study.options(arm, seed), steps)
        for seed in study.seeds  # all arms have their first seed before any has its second
        for arm in study.arms
        for steps in [study.arguments(arm, seed).max_steps]
    ]
    waiting = [run for run in runs if run.results() is None]
    if not waiting:
        return []
    with FolderLock(study.output_dir) as lock:
        lock.acquire()
        _prepare(study)
        with _children_stopped(runs):
            return list(_run_all(runs, waiting, parallel_runs))


def check_runs(study: Study) -> None:
    """Refuse an output folder with a run of other settings than the study's, before training and reporting.

    Raises:
        UserError: Names the run and the difference.
    """
    for arm in study.arms:
        for seed in study.seeds:
            folder, args = study.folder(arm, seed), study.arguments(arm, seed)
            planned = describe_run(args, build_stages(args), args.num_processes or 1)
            if args.bf16 is None:  # decided by the machine on which the run began
                del planned["options"]["bf16"]
            if not (folder / "run.json").exists():
                continue
            try:
                check_same_run(folder, planned)
            except UserError as error:
                raise UserError(
                    f"{error}; or give the study another output_dir, or move this run away"
                ) from error


def _check_gpus(study: Study, parallel_runs: int) -> None:
    processes = max(study.arguments(arm, study.seeds[0]).num_processes or 1 for arm in study.arms)
    gpus = len(_gpus())
    if gpus and parallel_runs * processes > gpus:
        raise UserError(
            f"parallel_runs {parallel_runs}: with {processes} processes each they need "
            f"{parallel_runs * processes} GPUs, and there are {gpus}"
        )


def _prepare(study: Study) -> None:
    """Tokenizer and token stores, once, before several runs want them at the same time."""
    prepared = set()
    for arm in study.arms:
        args = study.arguments(arm, study.seeds[0])
        tokens = remaining_tokens(build_stages(args), args.num_processes or 1, 0)
        if not args.token_store and tokens not in prepared:
            prepare_stores(args, tokens)
            prepared.add(tokens)


def _run_all(runs: list[StudyRun], waiting: list[StudyRun], parallel_runs: int) -> Iterator[str]:
    """Keep `parallel_runs` places busy; yields a line for each run that failed."""
    places: list[StudyRun | None] = [None] * parallel_runs
    total = sum(run.max_steps for run in runs)
    # A log gets a line now and then, a terminal one that moves.
    pace = {} if sys.stderr.isatty() else {"mininterval": 60, "maxinterval": 60}
    begun = sum(run.updates() for run in runs)
    with tqdm(total=total, initial=begun, unit="update", smoothing=0, **pace) as bar:
        while waiting or any(places):
            for place, run in enumerate(places):
                if run and run.process.poll() is not None:
                    bar.write(_ending(run))
                    if run.results() is None:
                        yield _ending(run)
                    places[place] = None
                if places[place] is None and waiting:
                    places[place] = _start(waiting.pop(0), place, parallel_runs)
            time.sleep(POLL_SECONDS)
            bar.set_postfix_str(", ".join(run.name for run in places if run), refresh=False)
            bar.update(sum(run.updates() for run in runs) - bar.n)


def _start(run: StudyRun, place: int, parallel_runs: int) -> StudyRun:
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    config = run.folder.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(run.options, sort_keys=False), encoding="utf-8")
    processes = run.options.get("num_processes") or 1
    with run.log.open("a", encoding="utf-8") as log:
        run.process = subprocess.Popen(
            [*_launcher(processes), str(PRETRAIN), "--config", str(config)],
            env=os.environ | _resources(place, parallel_runs, processes),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return run


def _launcher(processes: int) -> list[str]:
    if processes == 1:
        return [sys.executable]
    accelerate = Path(sys.executable).with_name("accelerate")
    # A port that the system chooses: several runs may start at once.
    return [str(accelerate), "launch", "--multi_gpu", f"--num_processes={processes}", "--main_process_port=0"]


def _resources(place: int, parallel_runs: int, processes: int) -> dict[str, str]:
    """Environment that gives a place its share of the cores and GPUs of its own, and says whose it is."""
    threads = max(1, usable_cores() // (parallel_runs * processes))
    shares = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    shares[OWNER] = str(os.getpid())
    if gpus := _gpus():
        shares["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[place * processes : (place + 1) * processes])
    return shares


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def _ending(run: StudyRun) -> str:
    """How a run's process ended, in one line. A launcher gives every failure the same code: results tell."""
    results = run.results()
    if results is None:
        lines = [line for line in run.log.read_text(encoding="utf-8").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")] or lines
        return f"failed: {run.name}: {''.join(errors[-1:])} (all of it: {run.log})"
    if results["validation_loss"] is None:
        return f"diverged by update {results['step']}: {run.name}"
    what = f" ({results['diagnosis']})" if results["diagnosis"] else ""
    return f"done: {run.name}: validation loss {results['validation_loss']:.4f}{what}"


@contextmanager
def _children_stopped(runs: list[StudyRun]) -> Iterator[None]:
    """Leave no run behind when this process is stopped."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        running = [run.process for run in runs if run.process and run.process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            process.wait()
