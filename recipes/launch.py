"""What the launcher and the hardware give this process: threads, processes, precision.

`accelerate launch` sets OMP_NUM_THREADS=1, which makes a CPU run as slow as one core; and
`accelerate launch --cpu --num_processes 2` starts one process without a word.
"""

import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil
import torch
import yaml
from accelerate import Accelerator
from accelerate.commands.config.config_args import default_config_file
from torch import distributed

from recipes import PARENT
from recipes.errors import Failure, UserError

LAUNCHERS = (
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.launch",
    "torchrun",
    "torch.distributed.run",
)
# What they leave in the environment of those that they start.
MARKS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")


def set_threads() -> str:
    """Use the cores that this process may use, divided by the processes beside it, unless the user chose.

    Returns:
        One line that says how many threads and why.
    """
    chosen = _threads_chosen_by_user()
    cores, processes = usable_cores(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads = chosen or max(1, cores // processes)
    torch.set_num_threads(threads)
    why = "as you set" if chosen else f"{cores} usable cores / {processes} local processes"
    return f"{threads} threads ({why})"


def check_num_processes(obtained: int, asked: int | None) -> None:
    """Compare the processes that run with those that were asked for.

    Raises:
        UserError: They differ.
    """
    launcher = _processes_told_to_launcher()
    for source, number in (("num_processes", asked), ("the launcher's num_processes", launcher)):
        if number is not None and number != obtained:
            run = "process runs" if obtained == 1 else "processes run"
            raise UserError(
                f"{source} {number}: but {obtained} {run}; start them with: accelerate launch --multi_gpu "
                f"--num_processes {number} ... (on CPU with ACCELERATE_USE_CPU=true before it)"
            )


def choose_precision(bf16: bool | None, device: torch.device) -> tuple[bool, str]:
    """Whether to use bf16 autocast, and a line that says what and why.

    Args:
        bf16: What the user chose; None leaves it to the launcher and the hardware.
        device: What computes.

    Raises:
        UserError: The launcher asks for fp16, which would need loss scaling.
    """
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if bf16 is not None:
        why = "as you set"
    elif launcher not in ("no", "bf16"):
        raise UserError(f"mixed_precision {launcher}: allowed: no, bf16")
    elif launcher == "bf16":
        bf16, why = True, "as the launcher says"
    else:
        bf16 = _multiplies_bf16(device)
        why = f"{device.type} {'multiplies' if bf16 else 'does not multiply'} bfloat16 in hardware"
    kind = "bf16 autocast with float32 parameters" if bf16 else "float32"
    return bf16, f"{kind} ({why}); validation in float32"


def describe_hardware(device: torch.device, processes: int) -> str:
    """What computes, for people: `2 x NVIDIA H100 80GB HBM3`."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type}, {_processor()}, {usable_cores()} cores"
    return f"{processes} x {name}" if processes > 1 else name


def _processor() -> str:
    """The processor's name as Linux knows it, else its architecture."""
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        features = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16") or features.get("bf16"))
    return False


def usable_cores() -> int:
    """Cores that this process may use: as its affinity and its container allow."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # a container may be given less time than its cores have
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, int(quota) // int(period)))


@contextmanager
def failures(accelerator: Accelerator) -> Iterator[None]:
    """Tell in one line when memory is too small, or another process or worker is gone or does not answer.

    Raises:
        Failure: So it is.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Of the back ends, gloo has no type of its own for its errors.
        is_lost = isinstance(error, distributed.DistError) or "gloo" in str(error)
        if _is_memory(error):
            what = "out of memory: give a smaller per_device_train_batch_size with more "
            what += "gradient_accumulation_steps, gradient_checkpointing, or a smaller model"
        elif re.search(r"DataLoader worker (\(pid|gone)", str(error)):  # noticed wherever the main thread is
            what = "dataloader_num_workers: a worker is gone, perhaps for want of memory"
        elif accelerator.num_processes > 1 and is_lost:
            what = f"process {accelerator.process_index}: another process is gone or does not answer"
        else:
            raise
        reason = " ".join(str(error).split())
        raise Failure(f"{what}; the same command continues from the last checkpoint ({reason})") from error


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended, buried or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _is_memory(error: Exception) -> bool:
    """Whether memory is too small, in the words of Python, NumPy, an accelerator or PyTorch on CPU."""
    has_type = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return has_type or "allocate memory" in str(error) or "Storage size calculation overflowed" in str(error)


def launcher_is_gone() -> bool:
    """Whether a launcher started this process and lives no more: nobody would end the process then."""
    return os.getppid() != PARENT and _is_launched()


@cache
def _is_launched() -> bool:
    # Where it was gone before it could be looked at, its environment still tells.
    return _launcher() is not None or (os.getppid() != PARENT and any(mark in os.environ for mark in MARKS))


def _threads_chosen_by_user() -> int | None:
    launcher = _launcher()
    if launcher is None:
        words, environment = [], dict(os.environ)
    else:
        # A launcher overwrites the variable for its children; its own still says what the user said.
        words, environment = launcher
    value = _value_of(words, "--num_cpu_threads_per_process") or environment.get("OMP_NUM_THREADS")
    return int(value) if value and value.isdigit() and int(value) > 0 else None


def _processes_told_to_launcher() -> int | None:
    if _launcher() is None:
        return None
    words, _ = _launcher()
    number = _value_of(words, "--num_processes")
    if number is None and (per_node := _value_of(words, "--nproc_per_node", "--nproc-per-node")):
        nodes = _value_of(words, "--nnodes") or "1"
        return int(per_node) * int(nodes) if per_node.isdigit() and nodes.isdigit() else None
    if number is None and any(Path(word).name.startswith("accelerate") for word in words[:4]):
        number = _configured_processes(_value_of(words, "--config_file") or default_config_file)
    return int(number) if number and str(number).isdigit() else None


def _configured_processes(file: str) -> str | None:
    try:
        return (yaml.safe_load(Path(file).read_text()) or {}).get("num_processes")
    except (OSError, yaml.YAMLError, AttributeError):
        return None


@cache
def _launcher() -> tuple[list[str], dict[str, str]] | None:
    """Command words (up to the script) and environment of the launcher that started this process, if any."""
    try:
        parent = psutil.Process(PARENT)
        words, environment = parent.cmdline(), parent.environ()
    except psutil.Error:
        return None
    if not any(Path(word).name in LAUNCHERS for word in words[:4]):
        return None
    script = next((i for i, word in enumerate(words) if word == sys.argv[0]), len(words))
    return words[:script], environment


def _value_of(words: list[str], *names: str) -> str | None:
    for word, following in zip(words, [*words, None][1:], strict=True):
        for name in names:
            if word == name:
                return following
            if word.startswith(f"{name}="):
                return word.removeprefix(f"{name}=")
    return None
