"""Lets calls that change files below a folder fail, in a process of its own; for Linux on x86-64.

How many calls a command makes below a folder, and what happens when the 17th finds the disk full:

    python -m tests.fault_layer FOLDER - recipes/pretrain.py --output_dir FOLDER/run ...
    python -m tests.fault_layer FOLDER 17 recipes/pretrain.py --output_dir FOLDER/run ...

The first word after the number may also name the fault: `17:EIO`, `17+:ENOSPC` (from then on), `17:short`,
`17:half`, `17:kill before`, `17:kill after`.
"""

import ctypes
import errno
import multiprocessing
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_suffix(".c")
ACTIONS = ("nothing", "fail", "short", "half", "kill before", "kill after")  # as in the source
WRITES = ("write", "writev", "sendfile")
FOR_EVER = 2**62


@dataclass(frozen=True)
class Fault:
    """What befalls one call, or all from that one on."""

    at: int
    """Which call, counted from 1."""
    action: str = "fail"
    """One of `ACTIONS`. `short`: fewer bytes are written; `half`: likewise, and then the call fails."""
    error: int = errno.ENOSPC
    lasts: bool = False

    def __str__(self) -> str:
        what = errno.errorcode[self.error] if self.action in ("fail", "half") else ""
        return f"{self.at}{'+' * self.lasts}:{self.action} {what}".strip()


class Call(NamedTuple):
    """A call that was counted."""

    number: int
    name: str
    path: str


def why_not() -> str | None:
    """Why there is no such layer here; None where there is."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "the fault layer is written for Linux on x86-64"
    return None if shutil.which("cc") else "the fault layer needs a C compiler (cc)"


def build(folder: Path) -> Path:
    """Compile the layer."""
    library = folder / "fault_layer.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, SOURCE], check=True)
    return library


def arm(library: Path, folder: Path, log: Path | None = None, fault: Fault | None = None) -> None:
    """Count the calls of this process below `folder`, from now on to its end, and let `fault` befall them."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else -1
    fault = fault or Fault(0, "nothing")
    last = FOR_EVER if fault.lasts else fault.at
    words = (ACTIONS.index(fault.action), fault.error, ctypes.c_long(fault.at), ctypes.c_long(last))
    refusal = ctypes.CDLL(str(library)).fault_layer_arm(os.fsencode(folder.resolve()), descriptor, *words)
    if refusal:
        raise OSError(refusal, "the kernel takes no filter for system calls")


def calls_of(log: Path) -> list[Call]:
    """What a process counted."""
    lines = (line.split(" ", 2) for line in log.read_text().splitlines())
    return [Call(int(number), name, path) for number, name, path in lines]


def forked(preload: list[str], target: Callable, *words: Any, timeout: float = 600) -> int:
    """Run a function in a process forked from one that has only imported `preload`; returns its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    process = context.Process(target=target, args=words)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"{target.__name__}{words} did not end")
    return process.exitcode


def parse(text: str) -> Fault | None:
    """A fault as in the docstring above; None for `-`."""
    if text == "-":
        return None
    at, lasts, what = re.fullmatch(r"(\d+)(\+?)(?::(.*))?", text).groups()
    if what in ACTIONS:
        return Fault(int(at), what, lasts=bool(lasts))
    return Fault(int(at), error=getattr(errno, what or "ENOSPC"), lasts=bool(lasts))


def main() -> None:
    """Run a script under the layer."""
    folder, fault, script, *words = sys.argv[1:]
    with tempfile.TemporaryDirectory() as aside:
        library, log = build(Path(aside)), Path(aside) / "log"
        Path(folder).mkdir(parents=True, exist_ok=True)
        sys.argv = [script, *words]
        arm(library, Path(folder), log, parse(fault))
        try:
            runpy.run_path(script, run_name="__main__")
        finally:
            for call in calls_of(log):
                print(*call, file=sys.stderr)


if __name__ == "__main__":
    main()
