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
from recipes.sharding import full, no_sync
from recipes.stages import Stage, stage_at
from recipes.stopping import StopRequest

# Losses add up as integers, in this unit: a sum of floats would depend on where a run was interrupted, and on
# how its micro-batches lie on processes.
LOSS_UNIT = 2.0**-20


class NotFinite(ArithmeticError):
    """A loss or a gradient is infinite or not a number, and training cannot just go on."""

    def __init__(self, step: int) -> None:
        """`step`: the first update that was not finite."""
        super().__init__(f"update {step}: the loss or the gradient is not finite")
        self.step = step


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
    report_skipped: Callable[[list[int]], None] = lambda steps: None
    """Takes the numbers of updates that were skipped."""
    stop: StopRequest = field(default_factory=StopRequest)
    state: TrainState = field(default_factory=TrainState)

    def train(self) -> None:
        """Update until `max_steps` or until asked to stop, from wherever `state` stands.

        Raises:
            NotFinite: Updates were not finite, and `nonfinite_update` does not allow to skip them, or not so
                many. Noticed where the host looks anyway: before a training line, a validation or a
                checkpoint is written.
        """
        self._start_clocks()
        updates = self.batches.updates(
            self.state.step, self.args.max_steps, self.args.dataloader_num_workers, self.state.data_offset
        )
        for micro_batches in updates:
            self.stop.ask()
            self._set_learning_rate()
            self._update(micro_batches)
            self._count(micro_batches)
            self.stop.answer()
            if self.is_due(self.args.logging_steps):
                self._log()
            if self.is_due(self.args.eval_steps) and not self.stop.agreed:
                self._off_the_clock(self.evaluate)
            if self.is_due(self.args.save_steps) or self.stop.agreed:
                self._off_the_clock(self.save)
            if self.stop.agreed:
                return

    def is_due(self, every: int) -> bool:
        """Whether something that is done every so many updates is done after this one."""
        return self.state.step % every == 0 or self.state.step == self.args.max_steps

    def _set_learning_rate(self) -> None:
        self.learning_rate = learning_rate_at(self.state.step + 1, self.args, self.args.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate

    def _update(self, micro_batches: list[Batch]) -> None:
        """One update; without a look at its numbers, which stay on the device."""
        self._seed_dropout()
        count = self._global_count(micro_batches)
        loss = torch.zeros_like(count)
        for i, batch in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            # Gradients travel between processes once an update, not once a micro-batch.
            with nullcontext() if last else no_sync(self.accelerator, self.wrapped_model):
                loss += self._backward(batch, count)
        limit = self.args.max_grad_norm or float("inf")
        grad_norm = full(self.accelerator.clip_grad_norm_(self.wrapped_model.parameters(), limit))
        # It covers the loss on all processes: one that is not finite has no finite gradient.
        is_finite = torch.isfinite(grad_norm)
        self._step_if(is_finite)
        self.optimizer.zero_grad(set_to_none=True)
        self.window += torch.where(is_finite, torch.stack([loss, count]), 0)
        self.grad_norms.append(grad_norm)

    def _step_if(self, is_finite: torch.Tensor) -> None:
        """The optimiser's step, unless its gradient is not finite."""
        # Decided on the device, with what mixed precision has for it, where the kernel knows it (not on MPS):
        # the host does not wait.
        if self.optimizer.defaults.get("fused") and is_finite.device.type in ("cpu", "cuda"):
            self.optimizer.optimizer.found_inf = (~is_finite).float()
            self.optimizer.step()
        elif is_finite:
            self.optimizer.step()

    def _seed_dropout(self) -> None:
        """Dropout is a function of (seed, step, process), so a resumed run drops what the first one did."""
        process = self.accelerator.process_index
        bits = random_bits(DROPOUT, self.args.seed, self.state.step, process)
        torch.manual_seed(int(bits) >> 1)

    def _global_count(self, micro_batches: list[Batch]) -> torch.Tensor:
        """Masked tokens of this update on all processes; stays on the device."""
        # Filled on the device: copying a number there could make the host wait.
        count = torch.full((), masked_tokens(micro_batches), device=self.window.device)
        return self.accelerator.reduce(count, reduction="sum")

    def _backward(self, batch: Batch, count: torch.Tensor) -> torch.Tensor:
        """Add a micro-batch's gradient; returns its summed loss in units of `LOSS_UNIT`, int64."""
        device = self.accelerator.device
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            # This micro-batch's summed loss over the update's masked tokens on all processes.
            loss = self.wrapped_model(**batch, num_items_in_batch=count.float()).loss
        # Gradients are averaged over processes, which divides by their number: undo it.
        self.accelerator.backward(loss * self.accelerator.num_processes)
        # float64 where the device has it.
        wide = torch.float32 if device.type == "mps" else torch.float64
        return (loss.detach().to(wide) * count / LOSS_UNIT).round().long()

    def _count(self, micro_batches: list[Batch]) -> None:
        tokens = sum(batch["input_ids"].numel() for batch in micro_batches) * self.accelerator.num_processes
        self.state.step += 1
        self.state.tokens_seen += tokens
        self.tokens_since_log += tokens

    def _start_clocks(self) -> None:
        # The other processes' share was added to the main process's when the state was saved.
        loss = round(self.state.window_loss / LOSS_UNIT) if self.accelerator.is_main_process else 0
        mine = [loss, int(self.state.window_masked_tokens)]
        self.window = torch.tensor(mine, device=self.accelerator.device)
        self.grad_norms: list[torch.Tensor] = []
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
        self.window[0] = loss if self.accelerator.is_main_process else 0
        self.state.window_loss, self.state.window_masked_tokens = loss.item() * LOSS_UNIT, int(self.window[1])
        now = time.perf_counter()
        self.state.elapsed_seconds += now - self.run_clock
        self.run_clock = now
        self._look_at_gradients()

    def _look_at_gradients(self) -> None:
        """Find the updates that were not finite since the last look, which are the same on every process."""
        norms = torch.stack(self.grad_norms).tolist() if self.grad_norms else []
        first = self.state.step - len(norms) + 1
        skipped = [step for step, norm in enumerate(norms, first) if not math.isfinite(norm)]
        self.grad_norms.clear()
        if norms:
            self.grad_norm = norms[-1]
        if not skipped:
            return
        if self.args.nonfinite_update != "skip":
            # How many followed the first depends on when it is looked for.
            self.state.nonfinite_updates += 1
            raise NotFinite(skipped[0])
        self.state.nonfinite_updates += len(skipped)
        self.report_skipped(skipped)
        if self.state.nonfinite_updates > self.args.max_nonfinite_updates:
            raise NotFinite(skipped[0])

    def _log(self) -> None:
        self._close_window()
        now = time.perf_counter()
        rate = self.tokens_since_log / (now - self.log_clock)
        masked = self.state.window_masked_tokens
        no_loss = 0.0 if math.isfinite(self.grad_norm) else math.nan  # all were skipped
        self.report(
            {
                "step": self.state.step,
                "train_loss": self.state.window_loss / masked if masked else no_loss,
                "learning_rate": self.learning_rate,
                "grad_norm": self.grad_norm,
                "tokens_seen": self.state.tokens_seen,
                "tokens_per_second": rate,
                "mfu": self._flops_per_token() * rate / self.accelerator.num_processes / self.peak.flops,
                "elapsed_seconds": self.state.elapsed_seconds,
            }
        )
        self.window.zero_()
        self.state.window_loss, self.state.window_masked_tokens = 0.0, 0
        self.tokens_since_log, self.log_clock = 0, now

    def _flops_per_token(self) -> float:
        length = stage_at(self.stages, self.state.step - 1).max_seq_length
        return training_flops(self.model.config, length, self.args.mlm_probability)
