"""Runs of fine-tuning side by side: on the cores, on the GPUs, or on the processes of a launcher.

A run is never split: processes take whole runs, so that scores do not depend on how many there are.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from accelerate.utils import parse_flag_from_env
from tqdm import tqdm

from glue_eval.finetuning import Job, finetune
from glue_eval.results import Results
from recipes.errors import UserError
from recipes.launch import set_threads, usable_cores

POLL_SECONDS = 0.5
# What a run on CPU needs besides parameters, gradients and two moments.
BYTES_A_RUN = 2 * 2**30
BYTES_A_PARAMETER = 16


@dataclass(frozen=True)
class Workers:
    """How runs are spread."""

    number: int
    """Processes of this one's own; 1: this process itself."""
    device: torch.device
    rank: int = 0
    """Of this process among those of a launcher."""
    world_size: int = 1
    """Processes of the launcher."""

    def describe(self) -> str:
        """One line for people."""
        if self.world_size > 1:
            return f"{self.world_size} processes of the launcher on {self.device.type}, each whole runs"
        runs = "1 run" if self.number == 1 else f"{self.number} runs"
        return f"{runs} at a time on {self.device.type}"


def choose_device() -> torch.device:
    """What this process computes on: the GPU that a launcher gave it, the first one, or the CPU."""
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def plan_workers(jobs: list[Job], parallel_runs: int | None) -> Workers:
    """So many runs at a time as cores and memory, or GPUs, allow; `parallel_runs` where it is given."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device()
    on_gpu = device.type == "cuda"
    room = torch.cuda.device_count() if on_gpu else min(usable_cores(), _fit_in_memory(jobs))
    if world_size > 1:
        return Workers(1, device, rank, world_size)
    # By all jobs and not by those that are missing: a run's threads, and with them its last bits, must not
    # depend on where an earlier command was interrupted.
    return Workers(min(len(jobs), parallel_runs or room) or 1, device)


def _fit_in_memory(jobs: list[Job]) -> int:
    parameters = max((job.model.parameters for job in jobs), default=0)
    need = BYTES_A_RUN + BYTES_A_PARAMETER * parameters
    return max(1, psutil.virtual_memory().available // need)


def run_jobs(
    jobs: list[Job],
    workers: Workers,
    results: Results,
    save_model: bool,
    report: Callable[[dict[str, Any]], str],
) -> list[str]:
    """Bring runs to their end, the longest first; those that are finished are left alone.

    Args:
        jobs: All that were asked for.
        workers: How they are spread.
        results: Where each is kept as soon as it ends.
        save_model: Whether its model is kept too.
        report: Makes the line that is printed for a result.

    Returns:
        A line for each run that failed.

    Raises:
        UserError: The disk is full, or a worker was killed.
    """
    # Shared out before finished ones are dropped: processes look at the folder at different times.
    mine = sorted(jobs, key=_examples, reverse=True)[workers.rank :: workers.world_size]
    mine = [job for job in mine if not results.has(job, save_model)]
    pace = {} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 30}
    shown = {
        "disable": workers.rank > 0 or not mine,
        "unit": "example",
        "unit_scale": True,
        "smoothing": 0.05,
    }
    with tqdm(total=sum(map(_examples, mine)), **shown, **pace) as bar:
        run = _in_this_process if workers.number == 1 else _in_a_pool
        failed = []
        for job, result in run(mine, workers, results, save_model, bar):
            if isinstance(result, UserError):
                raise result
            if isinstance(result, BaseException):
                failed.append(f"failed: {_name(job)}: {type(result).__name__}: {result}")
                bar.write(failed[-1], file=sys.stderr)
            else:
                bar.write(report(result))
    return failed


def wait_for_others(jobs: list[Job], results: Results, save_model: bool) -> None:
    """Until the launcher's other processes have left their results; a file is waited for, no collective.

    If one of them fails, the launcher stops this one.
    """
    while not all(results.has(job, save_model) for job in jobs):
        time.sleep(POLL_SECONDS)


Ended = Iterator[tuple[Job, dict[str, Any] | BaseException]]


def _in_this_process(
    jobs: list[Job], workers: Workers, results: Results, save_model: bool, bar: tqdm
) -> Ended:
    set_threads()
    for job in jobs:
        try:
            yield job, results.write(job, finetune(job, workers.device, bar.update), save_model)
        except Exception as error:  # one run that fails must not cost the others
            yield job, error


def _in_a_pool(jobs: list[Job], workers: Workers, results: Results, save_model: bool, bar: tqdm) -> Ended:
    context = multiprocessing.get_context("spawn")
    done, places = context.Value("q", 0), context.Queue()
    for place in range(workers.number):
        places.put(place)
    threads = _threads(workers)
    arguments = (workers.device.type, places, done, threads, os.getpid())
    with _pool(workers.number, context, arguments) as pool:
        waiting = {pool.submit(_work, job, results, save_model): job for job in jobs}
        while waiting:
            ended, _ = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
            bar.update(done.value - bar.n)
            for future in ended:
                job = waiting.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise UserError(
                        f"parallel_runs {workers.number}: a run was killed, perhaps for want of memory; "
                        "the same command with less goes on where it stopped"
                    )
                yield job, error or future.result()


def _threads(workers: Workers) -> int:
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    return int(chosen) if chosen.isdigit() else max(1, usable_cores() // workers.number)


@contextmanager
def _pool(number: int, context: Any, arguments: tuple) -> Iterator[ProcessPoolExecutor]:
    """Workers that are gone when this process is, however it ends."""
    pool = ProcessPoolExecutor(number, context, initializer=_begin_worker, initargs=arguments)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield pool
    except BaseException:
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        pool.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _begin_worker(device: str, places: Any, done: Any, threads: int, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(threads)
    index = places.get() % torch.cuda.device_count() if device == "cuda" else None
    _worker.update(device=torch.device(device, index), done=done)


def _end_with(parent: int) -> None:
    """Stop when the parent is gone, even if it was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(job: Job, results: Results, save_model: bool) -> dict[str, Any]:
    def advance(rows: int) -> None:
        with _worker["done"].get_lock():
            _worker["done"].value += rows

    return results.write(job, finetune(job, _worker["device"], advance), save_model)


def _examples(job: Job) -> int:
    return job.setting.num_train_epochs * job.train_examples


def _name(job: Job) -> str:
    return f"{job.task.name}, {job.model.source.name}, {job.setting.label}, seed {job.seed}"
