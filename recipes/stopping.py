"""Ending early without losing anything: on a signal, at a time limit, or because the launcher is gone.

Before and after training a signal ends the program at once. During training it becomes a wish, for which the
loop asks between two updates: all processes get the same answer, save a checkpoint, and stop.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType

import psutil
import torch
from accelerate import Accelerator
from torch import distributed

from recipes.launch import is_gone, launcher_is_gone

# What schedulers, clouds and people send; Windows has not all of them.
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
]
# Where a parent said so, these are left to it: nohup, and jobs that a shell put into the background.
LEFT_IF_IGNORED = ("SIGINT", "SIGHUP")
# Reasons that are no signals, beside the numbers of those that are; the largest among all processes counts,
# and a time limit is the weakest.
NONE, TIME_IS_UP, LAUNCHER_IS_GONE = -1, 0, 1000
# A study that starts runs says here which process they belong to.
OWNER = "BERT_LN_OWNER"


class Stopped(KeyboardInterrupt):
    """The run was ended before its last update; the same command continues it."""

    def __init__(self, reason: int, step: int | None = None) -> None:
        at = "outside training" if step is None else f"at update {step:,}"
        super().__init__(f"stopped {at}: {_words(reason)}; the same command continues")
        self.exit_code = 0 if reason == TIME_IS_UP else 128 + _signal_of(reason)


def _words(reason: int) -> str:
    if reason == TIME_IS_UP:
        return "max_train_time is over"
    if reason == LAUNCHER_IS_GONE:
        return "the process that started it is gone"
    return signal.Signals(reason).name


def _signal_of(reason: int) -> int:
    return int(signal.SIGTERM) if reason == LAUNCHER_IS_GONE else reason


def _owner() -> psutil.Process | None:
    try:
        return psutil.Process(int(os.environ[OWNER])) if OWNER in os.environ else None
    except psutil.NoSuchProcess:
        raise Stopped(LAUNCHER_IS_GONE) from None


class StopRequest:
    """Whether training is to end early; the same answer on all processes."""

    def __init__(self, max_train_time: float | None = None) -> None:
        """`max_train_time`: minutes since this process began."""
        self.reason: int | None = None
        """Why training ends, once all processes know."""
        self._wish = NONE
        self._deferred = False
        self._group: distributed.ProcessGroup | None = None
        self._question: tuple[torch.Tensor, distributed.Work] | None = None
        age = time.time() - psutil.Process().create_time()
        left = float("inf") if max_train_time is None else 60 * max_train_time - age
        self._deadline = time.monotonic() + left
        self._owner = _owner()

    def disconnect(self) -> None:
        """Close the channel, on which nobody says anything any more; its threads must not outlive Python."""
        if self._group:
            distributed.destroy_process_group(self._group)
        self._group = self._question = None

    @property
    def agreed(self) -> bool:
        """Whether all processes know that training ends."""
        return self.reason is not None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Listen to signals; what listened before does so again afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN or number.name not in LEFT_IF_IGNORED:
                signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None: one that Python does not know

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._wish = max(self._wish, number)
        if not self._deferred:
            raise Stopped(number)

    def connect(self, accelerator: Accelerator, timeout: float) -> None:
        """Let the processes ask each other, on a channel of its own that no accelerator waits for.

        One that has not answered after `timeout` seconds is given up.
        """
        if accelerator.num_processes > 1:
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """While this lasts a signal waits until it is asked for; a second one changes nothing any more."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = self.agreed

    def ask(self) -> None:
        """Put the question to all processes; `answer` must follow. Nobody waits in between."""
        if self._group:
            wish = torch.tensor(self._current_wish())
            work = distributed.all_reduce(wish, distributed.ReduceOp.MAX, self._group, async_op=True)
            self._question = wish, work

    def answer(self) -> bool:
        """Whether any process wants to stop."""
        wish = self._current_wish()
        if self._question:
            answer, work = self._question
            work.wait()
            wish = int(answer)
        self.reason = None if wish == NONE else wish
        return self.agreed

    def is_urgent(self) -> bool:
        """Whether to stop in the middle of something: a time limit is no such reason."""
        self.ask()
        self.answer()
        if self.reason == TIME_IS_UP:
            self.reason = None  # until it is asked for again
        return self.agreed

    def _current_wish(self) -> int:
        if time.monotonic() > self._deadline:
            self._wish = max(self._wish, TIME_IS_UP)
        if launcher_is_gone() or (self._owner and is_gone(self._owner)):
            self._wish = max(self._wish, LAUNCHER_IS_GONE)
        return self._wish
