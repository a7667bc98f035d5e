"""How long ours needs to the validation loss that the stock recipe reaches in a given time."""

import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from bert_ln import BertLnForMaskedLM
from recipes.arguments import PretrainingArguments, model_config
from recipes.batches import BlockReader
from recipes.benchmark_arms import train_ours
from recipes.command_line import build_arguments
from recipes.launch import set_threads
from recipes.masking import Masker
from recipes.preparation import PreparedData, prepare_data
from recipes.stages import build_stages
from recipes.stock_recipe import train_stock
from recipes.validation import Validation

# Validation blocks, and after how many updates ours is validated. Neither costs training time.
EVAL_SAMPLES, EVERY = 200, 10


class Goal:
    """Training time, without validations; in the place of the `StopRequest` of our loop, which it ends."""

    def __init__(self, seconds: float, loss: float | None = None) -> None:
        """Enough is a validation at `loss` or below, or `seconds`."""
        self.limit, self.loss, self.agreed = seconds, loss, False
        self.curve: list[tuple[float, float]] = []
        self.updates, self.start = 0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return time.perf_counter() - self.start

    def ask(self) -> None:
        """Before an update: nothing."""

    def answer(self) -> bool:
        """After an update: count it; return whether it is enough."""
        self.updates += 1
        self.agreed = self.seconds > self.limit
        return self.agreed

    def note(self, loss: float) -> None:
        """Take the result of a validation."""
        self.curve.append((self.seconds, loss))
        self.agreed = self.agreed or (self.loss is not None and loss <= self.loss)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens within is not training time."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before


def time_to_loss(options: dict[str, Any], ways: dict[str, dict[str, Any]], minutes: float) -> dict[str, Any]:
    """Train the stock model for `minutes`, then ours in each of `ways` (options over `options`) to its loss.

    Returns:
        loss, seconds and updates of `stock`, and of each way, with its curve: pairs of seconds and loss. A
        way that needs longer than stock did is ended there.
    """
    stock = _in_child(stock_loss, options, 60 * minutes)
    ours = {
        name: _in_child(our_time, options | way, stock["loss"], stock["seconds"])
        for name, way in ways.items()
    }
    return {"stock": stock, **ours}


def _in_child(function: Any, *arguments: Any) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
        return child.submit(function, *arguments).result()


def stock_loss(options: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Train the stock model, as it comes, for `seconds`, and validate it."""
    args, accelerator, data, validation = _prepared(options)
    torch.manual_seed(args.seed)
    goal = Goal(seconds)
    store = data.stores[0]
    everything = store.blocks("train", args.max_seq_length)
    trained = train_stock(args, data.tokenizer, store, accelerator, (), goal.answer, blocks=everything)
    # The same weights in our class, which takes the frozen masks.
    model = BertLnForMaskedLM(model_config(args, vocab_size=args.vocab_size, pad_token_id=0))
    model.load_state_dict(trained.state_dict())
    model.config.sparse_prediction = True
    took = goal.seconds
    loss = _loss(validation, model, accelerator, args)
    return {"seconds": took, "updates": goal.updates, "loss": loss, "masks": validation.mask_fingerprint}


def our_time(options: dict[str, Any], loss: float, limit: float) -> dict[str, Any]:
    """Train ours until a validation is at `loss` or below, at most `limit` seconds."""
    args, accelerator, data, validation = _prepared(options | {"eval_steps": EVERY})
    goal = Goal(limit, loss)

    def evaluate(model: PreTrainedModel) -> None:
        with goal.paused():
            found = _loss(validation, model, accelerator, args)
        goal.note(found)

    train_ours(args, data, accelerator, goal, evaluate=evaluate)
    seconds, reached = goal.curve[-1]
    return {
        "seconds": seconds,
        "updates": goal.updates,
        "loss": reached,
        "masks": validation.mask_fingerprint,
        "curve": goal.curve,
    }


def _prepared(
    options: dict[str, Any],
) -> tuple[PretrainingArguments, Accelerator, PreparedData, Validation]:
    set_threads()
    args = build_arguments(options)
    accelerator = Accelerator(mixed_precision="no")
    data = prepare_data(args, build_stages(args), accelerator)
    reader = BlockReader(data.stores, "validation", Masker(data.tokenizer, args))
    return args, accelerator, data, Validation(reader, args.max_seq_length, EVAL_SAMPLES)


def _loss(
    validation: Validation, model: PreTrainedModel, accelerator: Accelerator, args: PretrainingArguments
) -> float:
    results = validation(model.to(accelerator.device), accelerator, args.per_device_eval_batch_size)
    return results["validation_loss"]
