"""Starts recipes/pretrain.py so that it can be killed where one likes: forked, or with the real launcher.

Importing takes most of a small run's time. A forked run comes from a process that has imported everything
and has computed nothing; it announces the places that it enters, and whoever started it kills it there, from
outside.
"""

import contextlib
import functools
import hashlib
import importlib
import itertools
import json
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from recipes import pretrain
from recipes.training import Trainer
from tests.hub_fixtures import set_endpoint

ROOT = Path(__file__).parent.parent
# Functions of recipes/ that announce themselves, by the place that they are.
PLACES = {
    "tokenizer": ("preparation:prepare_tokenizer",),
    "token store": ("preparation:build_token_store",),
    "start-up": ("pretraining:_build_accelerator", "pretraining:Run.prepare", "pretraining:Run.build"),
    "resuming": ("pretraining:Run.resume",),
    "step": ("training:Trainer._update",),
    "evaluation": ("validation:Validation.__call__",),
    "save": ("pretraining:Run._save",),
    "push": ("publishing:Publisher.save", "publishing:Publisher.wait"),
    "finish": ("pretraining:Run.finish",),
}
# Seconds after which the launcher kills what does not end when asked to, and a run is said to hang.
PATIENCE, LONGEST = 30.0, 180.0
# What a run imports late.
for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


class Session:
    """One start of a run: its processes until they are gone."""

    hung = False
    codes: dict  # exit codes of those that have ended
    seconds: dict  # that functions took

    def processes(self, who, rank):
        """Those that a signal is meant for."""
        alive = self.running()
        ranks = [process for process in self.ranks if process in alive]
        if who == "worker":
            return children(ranks, "")[-1:]
        if who == "uploader":
            return children(ranks, "hub_upload.py")
        return {
            "all": alive,
            "rank": ranks[rank : rank + 1],
            "launcher": [p for p in alive if p == self.launcher],
        }[who]

    def wait(self):
        """Until every process has ended; the first exit code that is not 0, negative for a signal."""
        end, asked = time.monotonic() + LONGEST, False
        while self.running():
            failed = any(self.codes.values())
            if failed and not asked:
                asked, end = True, time.monotonic() + PATIENCE
                self.ask_to_end()
            if time.monotonic() > end:
                self.hung = True
                self.kill()
            self.pause()
        return next((code for code in self.codes.values() if code), 0)

    def kill(self):
        for process in self.running():
            send(process, signal.SIGKILL)

    def pause(self):
        time.sleep(0.01)


class Forked(Session):
    """Forked processes, under a launcher that does what torchrun does: one failed, all are ended."""

    launcher = None

    def __init__(self, words, processes, environment, log, samples):
        self.pipe, write = os.pipe()
        self.text, self.codes, self.seconds, self.entered = "", {}, {}, []
        port = free_port()
        self.ranks = []
        for rank in range(processes):
            if not (process := os.fork()):
                os.close(self.pipe)
                world = distributed(rank, processes, port) if processes > 1 else {}
                run_forked(words, environment | world, log, samples, rank, write)
            self.ranks.append(process)
        os.close(write)

    def running(self):
        for process in set(self.ranks) - set(self.codes):
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                self.codes[process] = os.waitstatus_to_exitcode(status)
        return [process for process in self.ranks if process not in self.codes]

    def ask_to_end(self):
        for process in self.running():
            send(process, signal.SIGTERM)

    def until(self, function, occurrence):
        """Wait until that function is entered the nth time; false if the run ends before."""
        end = time.monotonic() + LONGEST
        while self.entered.count(function) < occurrence:
            if any(self.codes.values()) or not self.running() or time.monotonic() > end:
                return False
            self.pause()
        return True

    def pause(self):
        """Read what was announced; for a moment if there is nothing."""
        if not select.select([self.pipe], [], [], 0.01)[0]:
            return
        if not (new := os.read(self.pipe, 65536).decode()):
            time.sleep(0.01)
        *lines, self.text = (self.text + new).split("\n")
        for line in lines:
            function, _, seconds = line.partition(" ")
            if seconds:
                self.seconds[function] = float(seconds)
            else:
                self.entered.append(function)

    def wait(self):
        try:
            return super().wait()
        finally:
            self.pause()
            os.close(self.pipe)


class Launched(Session):
    """`accelerate launch`, as a user types it."""

    def __init__(self, words, processes, environment, log):
        command = [Path(sys.executable).with_name("accelerate"), "launch"]
        if processes > 1:
            command += ["--multi_gpu", "--num_processes", processes, "--main_process_port", 0]
        command += [ROOT / "recipes" / "pretrain.py", *words]
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [str(word) for word in command], env=os.environ | ENVIRONMENT | environment, cwd=ROOT,
                stdout=stream, stderr=stream, start_new_session=True,
            )  # fmt: skip
        self.launcher, self.codes, self.seconds, self.known = self.process.pid, {}, {}, set()

    @property
    def ranks(self):
        return children([self.launcher], "pretrain.py")

    def running(self):
        """The launcher and all its descendants, also those that have lost it."""
        if (code := self.process.poll()) is not None:
            self.codes[self.launcher] = code
        with contextlib.suppress(psutil.Error):
            self.known |= {*psutil.Process(self.launcher).children(recursive=True)}
        alive = [process.pid for process in self.known if is_alive(process)]
        return alive + [self.launcher] * (self.launcher not in self.codes)

    def ask_to_end(self):
        """Nobody does: a launcher that is gone leaves its processes alone."""

    def until_step(self, metrics, step):
        """Wait until this session has written a line of that step, or not at all for step 0."""
        before = metrics.read_text() if metrics.exists() else ""
        pattern = rf'"step": {step}\b'
        while step and self.running():
            now = metrics.read_text() if metrics.exists() else ""
            if now != before and re.search(pattern, now):
                return True
            self.pause()
        return step == 0


def children(ranks, name):
    """Processes that the ranks have started, with `name` in their command."""
    with contextlib.suppress(psutil.Error):
        found = [child for rank in ranks for child in psutil.Process(rank).children()]
        return [child.pid for child in found if name in command_of(child)]
    return []


def is_alive(process):
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def command_of(process):
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def send(process, number):
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def distributed(rank, processes, port):
    """What torchrun tells a process."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


# --- In the forked process --------------------------------------------------------------------------


def run_forked(words, environment, log, samples, rank, pipe):
    """Be `python recipes/pretrain.py WORDS` from here on."""
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        os.environ.update(ENVIRONMENT | environment)
        sys.argv = [str(ROOT / "recipes" / "pretrain.py"), *map(str, words)]
        if "HF_ENDPOINT" in environment:
            set_endpoint(pytest.MonkeyPatch(), environment["HF_ENDPOINT"])
        forget_randomness()
        record_samples(samples, rank)
        if rank == 0:
            announce_places(pipe)
        code = pretrain.main()
    except SystemExit as exit:
        code = exit.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        # Not the way back through the frames of the process that this one was forked from.
        os._exit(code)


def forget_randomness():
    """No generator stands where it stood in another start."""
    seed = int.from_bytes(os.urandom(4))
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)


def announce_places(pipe):
    """Let the functions of all places write their names when entered, and their seconds when left."""
    for name in itertools.chain(*PLACES.values()):
        module, _, path = name.partition(":")
        *owners, attribute = path.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(f"recipes.{module}"))
        setattr(owner, attribute, announced(name, getattr(owner, attribute), pipe))


def announced(name, function, pipe):
    @functools.wraps(function)
    def wrapped(*words, **options):
        os.write(pipe, f"{name}\n".encode())
        start = time.perf_counter()
        try:
            return function(*words, **options)
        finally:
            os.write(pipe, f"{name} {time.perf_counter() - start}\n".encode())

    return wrapped


def record_samples(file, rank):
    """Note a digest of what each update is given: which blocks, in which order, under which masks."""
    update = Trainer._update
    output = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def recorded(self, micro_batches):
        digest = hashlib.sha256()
        for batch in micro_batches:
            for name in sorted(batch):
                digest.update(batch[name].numpy().tobytes())
        line = {"step": self.state.step, "rank": rank, "samples": digest.hexdigest()}
        os.write(output, (json.dumps(line) + "\n").encode())  # in one go: whole or not at all
        return update(self, micro_batches)

    Trainer._update = recorded
