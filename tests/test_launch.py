"""Threads and processes: what a plain `accelerate launch` gives is noticed and mended, or refused."""

import os
import sys

import pytest

from tests.conftest import accelerate

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def threads_line(result):
    assert result.returncode == 0, result.stderr
    return next(line for line in result.stdout.splitlines() if line.startswith("processes"))


def test_a_plain_launch_uses_all_cores(launch, tmp_path):
    """The line of the README: the launcher alone would leave one thread."""
    result = launch(launcher=[accelerate(), "launch"], output_dir=tmp_path / "run", max_steps=1)
    assert f" {CORES} threads ({CORES} usable cores / 1 local processes)" in threads_line(result)


@pytest.mark.parametrize(
    ("launcher", "env"),
    [
        ([accelerate(), "launch"], {"OMP_NUM_THREADS": "3"}),
        ([accelerate(), "launch", "--num_cpu_threads_per_process", "3"], {}),
        ([sys.executable], {"OMP_NUM_THREADS": "3"}),
    ],
)
def test_a_chosen_number_is_kept(launch, tmp_path, launcher, env):
    result = launch(launcher=launcher, env=env, output_dir=tmp_path / "run", max_steps=1)
    assert "3 threads (as you set)" in threads_line(result)


def test_processes_that_were_not_given_are_missed(launch, tmp_path):
    """`accelerate launch --cpu --num_processes 2` starts one, without a word."""
    launcher = [accelerate(), "launch", "--cpu", "--num_processes", "2"]
    result = launch(launcher=launcher, output_dir=tmp_path / "run", max_steps=1)
    assert result.returncode != 0
    assert "error: the launcher's num_processes 2: but 1 process runs" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_option_is_compared_too(launch, tmp_path):
    result = launch("--num_processes", "4", output_dir=tmp_path / "run", max_steps=1)
    assert result.returncode == 2
    assert "error: num_processes 4: but 1 process runs" in result.stderr
