"""What the methods of a gallery cost: tokens a second in the recipe's own loop, bytes kept for backward."""

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedModel

from bert_ln import BertLnConfig
from recipes.arguments import PretrainingArguments
from recipes.batches import Batch
from recipes.budget import Peak
from recipes.errors import UserError
from recipes.fast_paths import keep_memory
from recipes.gallery_report import REFERENCE, Method, methods_of
from recipes.launch import choose_precision, set_threads
from recipes.optimization import build_optimizer
from recipes.pretraining import build_model
from recipes.stages import Stage, build_stages
from recipes.study_results import PLACEMENT, StudyCurves
from recipes.training import Trainer

# Of one measurement; the first fifth of them is not timed.
UPDATES = 100


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
                    found[method] = child.submit(measure, record).result()
                bar.update()
    return [_cost(method, rounds) for method in records]


def _cost(method: Method, rounds: list[dict[Method, dict[str, Any]]]) -> dict[str, Any]:
    """A method's measurements, with ratios to the reference of the same round."""
    mine, other = [found[method] for found in rounds], [found[REFERENCE] for found in rounds]
    speeds = [one["tokens_per_second"] for one in mine]
    return {
        PLACEMENT: method[0],
        "norm_type": method[1],
        **mine[0],
        "tokens_per_second": speeds,
        "speed_ratios": [a / b["tokens_per_second"] for a, b in zip(speeds, other, strict=True)],
        "memory_ratio": mine[0]["kept_bytes"] / other[0]["kept_bytes"],
    }


def measure(record: dict[str, Any], updates: int = UPDATES) -> dict[str, Any]:
    """Train the model of a run.json for some updates, in the recipe's own loop, on random ids.

    Model, precision, optimiser and the shape of the batches are those of the run (of its first stage). The
    learning rate is 0: random ids teach nothing, and the speed does not depend on it.
    """
    threads = set_threads()
    keep_memory()
    args = PretrainingArguments(**record["options"])
    stage = build_stages(args)[0]
    changes = {"max_steps": updates, "eval_steps": updates, "save_steps": updates, "stages": None}
    args = replace(
        args, **changes, logging_steps=max(1, updates // 5), learning_rate=0.0, lr_scheduler_type="constant"
    )
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="no")
    model = build_model(args, BertLnConfig(**record["model_config"]), accelerator.device)
    wrapped, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    batch = _random_batch(stage, args.mlm_probability, model.config.vocab_size)
    bf16, _ = choose_precision(args.bf16, accelerator.device)
    kept, lines = kept_bytes(model, batch, bf16), []
    batches = SimpleNamespace(updates=lambda *_: repeat([batch] * stage.gradient_accumulation_steps, updates))
    peak = Peak(1.0, "not asked for")
    hooks = {"report": lines.append, "evaluate": lambda state: None, "save": lambda state: None}
    Trainer(args, accelerator, wrapped, model, optimizer, batches, [stage], peak, bf16, **hooks).train()
    tokens, seconds = (lines[-1][name] - lines[0][name] for name in ("tokens_seen", "elapsed_seconds"))
    return {
        "tokens_per_second": tokens / seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "kept_bytes": kept,
        "circumstances": f"{threads}, {'bfloat16 autocast' if bf16 else 'float32'}, {updates} updates",
    }


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
