"""What the methods of a gallery cost: tokens a second in the recipe's own loop, bytes kept for backward."""

import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from multiprocessing import get_context
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedModel

from bert_ln import BertLnConfig
from recipes.arguments import PretrainingArguments, UserError
from recipes.batches import Batch
from recipes.budget import Peak
from recipes.gallery_report import REFERENCE, Method, methods_of
from recipes.launch import choose_precision, set_threads
from recipes.optimization import build_optimizer
from recipes.pretraining import build_model
from recipes.stages import Stage, build_stages
from recipes.study_results import PLACEMENT, StudyCurves
from recipes.training import Trainer

# Model and reference take turns: so many turns of so many updates each, and one before that is not timed.
TURNS, UPDATES = 8, 10


def measure_all(curves: StudyCurves, repeats: int) -> list[dict[str, Any]]:
    """Speed and memory of each method of which a run has begun: one after the other, `repeats` rounds.

    Raises:
        UserError: No run of the reference has begun.
    """
    begun = {key: [run for arm in arms for run in arm.begun] for key, arms in methods_of(curves).items()}
    records = {key: runs[0].record for key, runs in begun.items() if runs}
    if REFERENCE not in records:
        raise UserError(f"study: no run of {', '.join(REFERENCE)} has begun, which all are compared with")
    rounds: list[dict[Method, dict[str, Any]]] = [{} for _ in range(repeats)]
    with tqdm(total=repeats * len(records), unit="measurement", file=sys.stderr) as bar:
        for found in rounds:
            for method, record in records.items():
                # A process each: no method profits or suffers from what another left in memory.
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
                    found[method] = child.submit(measure, record, records[REFERENCE]).result()
                bar.update()
    return [_cost(method, rounds) for method in records]


def _cost(method: Method, rounds: list[dict[Method, dict[str, Any]]]) -> dict[str, Any]:
    mine = [found[method] for found in rounds]
    return {
        PLACEMENT: method[0],
        "norm_type": method[1],
        **mine[0],
        **{name: [one[name] for one in mine] for name in ("tokens_per_second", "speed_ratio")},
        "memory_ratio": mine[0]["kept_bytes"] / rounds[0][REFERENCE]["kept_bytes"],
    }


def measure(record: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Train the models of two run.json in turns, in the recipe's own loop, on random ids.

    Model, precision, optimiser and the shape of the batches are those of the run (of its first stage). The
    learning rate is 0: random ids teach nothing, and the speed does not depend on it.

    Returns:
        Of the model of `record`: speed, as tokens a second and as a ratio to that of `reference`; parameters;
        and bytes that a forward pass keeps.
    """
    threads = set_threads()
    trainer, other = _trainer(record), _trainer(reference)
    batch = next(trainer.batches.updates())[0]
    kept = kept_bytes(trainer.model, batch, trainer.bf16)
    mine, theirs = take_turns([trainer, other])
    tokens = trainer.stages[0].tokens_per_update(1) * UPDATES
    precision = "bfloat16 autocast" if trainer.bf16 else "float32"
    return {
        "tokens_per_second": tokens / median(mine),
        "speed_ratio": median(b / a for a, b in zip(mine, theirs, strict=True)),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "kept_bytes": kept,
        "circumstances": f"{threads}, {precision}, medians of {TURNS} turns of {UPDATES} updates",
    }


def take_turns(trainers: Sequence[Trainer]) -> list[list[float]]:
    """Seconds of each turn of each trainer, but for the first turn, in which everything is slower.

    What else the machine does disturbs neighbouring turns alike, or a few of them only.
    """
    seconds: list[list[float]] = [[] for _ in trainers]
    for _ in range(1 + TURNS):
        for trainer, times in zip(trainers, seconds, strict=True):
            before = trainer.state.elapsed_seconds
            trainer.args.max_steps = trainer.state.step + UPDATES
            trainer.train()
            times.append(trainer.state.elapsed_seconds - before)
    return [times[1:] for times in seconds]


def _trainer(record: dict[str, Any]) -> Trainer:
    """The recipe's loop for the model of a run.json, on one batch again and again."""
    args = PretrainingArguments(**record["options"])
    stage = build_stages(args)[0]
    args = replace(args, stages=None, learning_rate=0.0, lr_scheduler_type="constant")
    torch.manual_seed(0)
    model = build_model(args, BertLnConfig(**record["model_config"]))
    accelerator = Accelerator(mixed_precision="no")
    wrapped, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    batch = _random_batch(stage, args.mlm_probability, model.config.vocab_size)
    batches = SimpleNamespace(updates=lambda *_: repeat([batch] * stage.gradient_accumulation_steps, UPDATES))
    bf16, _ = choose_precision(args.bf16, accelerator.device)
    peak = Peak(1.0, "not asked for")
    hooks = dict.fromkeys(("report", "evaluate", "save"), lambda _: None)
    return Trainer(args, accelerator, wrapped, model, optimizer, batches, [stage], peak, bf16, **hooks)


def _random_batch(stage: Stage, mlm_probability: float, vocab_size: int) -> Batch:
    """Random ids with as many positions to predict as the masker selects at most."""
    rows, length = stage.per_device_train_batch_size, stage.max_seq_length
    ids = torch.randint(vocab_size, (rows, length))
    positions = torch.rand(rows, length).argsort()[:, : round(mlm_probability * (length - 2))].sort()[0]
    return {"input_ids": ids, "masked_positions": positions, "labels": ids.gather(1, positions)}


def kept_bytes(model: PreTrainedModel, batch: Batch, bf16: bool) -> int:
    """Bytes that a forward pass keeps for its backward pass: each storage once, without the parameters."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor  # which keeps it alive: no address is used twice

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        loss = model(**batch).loss
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    del loss  # the graph was needed until here
    return sum(size for address, size in sizes.items() if address not in parameters)
