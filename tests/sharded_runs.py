"""Several runs in one pair of processes, sharded or not: python -m tests.sharded_runs OPTIONS, launched."""

import contextlib
import json
import math
import os
import signal
import sys
from pathlib import Path

from accelerate import Accelerator
from torch.distributed.tensor import DTensor

from recipes.command_line import build_arguments
from recipes.pretraining import Run, pretrain
from recipes.stopping import Stopped
from recipes.training import Trainer

BF16 = {"bf16": True, "gradient_checkpointing": True}
ROLLBACK = {"nonfinite_update": "rollback"}
RADAM = {"optim": "radam", "norm_placement": "re_zero"}  # its factor is one number, for two processes
SAME = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "masking_unit": "whole_word"}
UPDATE, BACKWARD, TRAIN, VALIDATE = Trainer._update, Trainer._backward, Trainer.train, Run._validate


def main(options):
    Accelerator.end_training = lambda self: None  # the next run needs the channels too
    for launched_as, arm in (("false", "ddp"), ("true", "fsdp")):
        os.environ["ACCELERATE_USE_FSDP"] = launched_as
        run(options, arm)
        run(options, f"bf16_{arm}", **BF16)
        run(options, f"radam_{arm}", **RADAM)
        run(options, f"muon_{arm}", optim="muon")
        with bad_gradient_at(3):
            run(options, f"skip_{arm}", nonfinite_update="skip")
        with bad_validation_at(8):
            run(options, f"rollback_{arm}", **ROLLBACK)
    for step in (2, 6):
        with signal_at(step):
            run(options, "stopped")
    run(options, "stopped")
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    with signal_at(2):
        run(options, "moved", **SAME)
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    with signal_at(6):
        run(options, "moved", **SAME)


def run(options, name, **changes):
    folder = Path(options["output_dir"]) / name
    with contextlib.suppress(Stopped):
        pretrain(build_arguments(options | {"output_dir": str(folder)} | changes))


@contextlib.contextmanager
def patched(owner, name, function):
    before = getattr(owner, name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        setattr(owner, name, before)


def signal_at(step):
    """To one of the processes; both stop after the next update."""

    def receiving(self, micro_batches):
        if self.state.step + 1 == step and self.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        UPDATE(self, micro_batches)

    return patched(Trainer, "_update", receiving)


def bad_gradient_at(step):
    """On one of the processes."""

    def poisoned(self, batch, count):
        is_bad = self.state.step + 1 == step and self.accelerator.process_index == 1
        return BACKWARD(self, batch, count * math.nan if is_bad else count)

    return patched(Trainer, "_backward", poisoned)


def bad_validation_at(step):
    """Once; then the weights of a checkpoint take the place of those that were validated."""
    seen = []

    def poisoned(self):
        values = VALIDATE(self)
        if self.trainer.state.step == step and not seen:
            seen.append(step)
            values["validation_loss"] = math.nan
        return values

    return patched(Run, "_validate", poisoned)


def recording(self):
    """Note what each process held."""
    TRAIN(self)
    moments = [next(m for m in state.values() if m.ndim) for state in self.optimizer.state.values()]
    held = [m.to_local().numel() if isinstance(m, DTensor) else m.numel() for m in moments]
    file = Path(self.args.output_dir) / f"held-{self.accelerator.process_index}.json"
    file.write_text(json.dumps([sum(held), sum(m.numel() for m in moments)]))


if __name__ == "__main__":
    Trainer.train = recording
    main(json.loads(sys.argv.pop()))
