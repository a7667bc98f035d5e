"""The loop: read it aloud and it is the algorithm.

The loss has one definition, in training and in validation: the sum over masked tokens divided by the global
number of masked tokens, whatever the micro-batch, the accumulation and the number of processes.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from recipes.arguments import PretrainingArguments
from recipes.batches import Batch, TrainingBatches, masked_tokens
from recipes.budget import Peak, training_flops
from recipes.checkpointing import TrainState
from recipes.optimization import learning_rate_at
from recipes.randomness import DROPOUT, random_bits
from recipes.stages import Stage, stage_at


class NotFinite(ArithmeticError):
    """A loss or a gradient is infinite or not a number."""


@dataclass
class Trainer:
    """What the loop works with. `state` is what a checkpoint must remember of it."""

    args: PretrainingArguments
    accelerator: Accelerator
    wrapped_model: nn.Module
    """The model as Accelerate prepared it (distributed, compiled)."""
    model: PreTrainedModel
    """The same parameters, bare."""
    optimizer: torch.optim.Optimizer
    batches: TrainingBatches
    stages: list[Stage]
    peak: Peak
    bf16: bool
    report: Callable[[dict[str, Any]], None]
    """Takes each training line."""
    evaluate: Callable[[TrainState], None]
    save: Callable[[TrainState], None]
    state: TrainState = field(default_factory=TrainState)

    def train(self) -> None:
        """Update until `max_steps`, from wherever `state` stands.

        Raises:
            NotFinite: A loss or a gradient was not finite, noticed where the host looks anyway: before a
                training line, a validation or a checkpoint is written.
        """
        self._start_clocks()
        updates = self.batches.updates(self.state.step, self.args.max_steps, self.args.dataloader_num_workers)
        for micro_batches in updates:
            self._set_learning_rate()
            grad_norm = self._update(micro_batches)
            self._count(micro_batches)
            if self._due(self.args.logging_steps):
                self._log(grad_norm)
            if self._due(self.args.eval_steps):
                self._off_the_clock(self.evaluate)
            if self._due(self.args.save_steps):
                self._off_the_clock(self.save)

    def _due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.args.max_steps

    def _set_learning_rate(self) -> None:
        self.learning_rate = learning_rate_at(self.state.step + 1, self.args, self.args.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

    def _update(self, micro_batches: list[Batch]) -> torch.Tensor:
        """One update; returns the gradient norm before clipping, still on the device."""
        self._seed_dropout()
        count = self._global_count(micro_batches)
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            # Gradients travel between processes once an update, not once a micro-batch.
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped_model):
                self._backward(batch, count)
        limit = self.args.max_grad_norm or float("inf")
        grad_norm = self.accelerator.clip_grad_norm_(self.wrapped_model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.window[1] += count
        self.grad_norms += grad_norm
        return grad_norm

    def _seed_dropout(self) -> None:
        """Dropout is a function of (seed, step, process), so a resumed run drops what the first one did."""
        process = self.accelerator.process_index
        bits = random_bits(DROPOUT, self.args.seed, self.state.step, process)
        torch.manual_seed(int(bits) >> 1)

    def _global_count(self, micro_batches: list[Batch]) -> torch.Tensor:
        """Masked tokens of this update on all processes; stays on the device."""
        # Filled on the device: copying a number there could make the host wait.
        count = torch.full(
            (), masked_tokens(micro_batches), dtype=self.window.dtype, device=self.window.device
        )
        return self.accelerator.reduce(count, reduction="sum")

    def _backward(self, batch: Batch, count: torch.Tensor) -> None:
        device = self.accelerator.device
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            # This micro-batch's summed loss over the update's masked tokens on all processes.
            loss = self.wrapped_model(**batch, num_items_in_batch=count.float()).loss
        self.window[0] += loss.detach() * count
        # Gradients are averaged over processes, which divides by their number: undo it.
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def _count(self, micro_batches: list[Batch]) -> None:
        tokens = sum(batch["input_ids"].numel() for batch in micro_batches) * self.accelerator.num_processes
        self.state.step += 1
        self.state.tokens_seen += tokens
        self.tokens_since_log += tokens

    def _start_clocks(self) -> None:
        # float64 where the device has it: a sum over many updates.
        dtype = torch.float32 if self.accelerator.device.type == "mps" else torch.float64
        mine = [self.state.window_loss, self.state.window_masked_tokens]
        # The other processes' share was added to the main process's when the state was saved.
        loss = mine[0] if self.accelerator.is_main_process else 0.0
        self.window = torch.tensor([loss, mine[1]], dtype=dtype, device=self.accelerator.device)
        # Their sum is finite as long as each one is.
        self.grad_norms = torch.zeros((), dtype=dtype, device=self.accelerator.device)
        self.tokens_since_log = 0
        self.log_clock = self.run_clock = time.perf_counter()

    def _off_the_clock(self, action: Callable[[TrainState], None]) -> None:
        """Run something whose time is not training's, with the state brought up to date."""
        start = time.perf_counter()
        self._close_window()
        action(self.state)
        self.log_clock += time.perf_counter() - start

    def _close_window(self) -> None:
        """Bring `state` up to date with what the device and the clock hold; every process takes part."""
        loss = self.accelerator.reduce(self.window[0], reduction="sum")
        self.window[0] = loss if self.accelerator.is_main_process else 0.0
        self.state.window_loss, self.state.window_masked_tokens = loss.item(), self.window[1].item()
        now = time.perf_counter()
        self.state.elapsed_seconds += now - self.run_clock
        self.run_clock = now
        if not math.isfinite(self.state.window_loss + self.grad_norms.item()):
            raise NotFinite(f"update {self.state.step}: the loss or the gradient is not finite")

    def _log(self, grad_norm: torch.Tensor) -> None:
        self._close_window()
        now = time.perf_counter()
        rate = self.tokens_since_log / (now - self.log_clock)
        self.report(
            {
                "step": self.state.step,
                "train_loss": self.state.window_loss / max(1.0, self.state.window_masked_tokens),
                "learning_rate": self.learning_rate,
                "grad_norm": float(grad_norm),
                "tokens_seen": self.state.tokens_seen,
                "tokens_per_second": rate,
                "mfu": self._flops_per_token() * rate / self.accelerator.num_processes / self.peak.flops,
                "elapsed_seconds": self.state.elapsed_seconds,
            }
        )
        self.window.zero_()
        self.state.window_loss = self.state.window_masked_tokens = 0.0
        self.tokens_since_log, self.log_clock = 0, now

    def _flops_per_token(self) -> float:
        length = stage_at(self.stages, self.state.step - 1).max_seq_length
        return training_flops(self.model.config, length, self.args.mlm_probability)
