"""The loss that ours and the stock recipe have after a training time: same corpus, same frozen masks."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from bert_ln import BertLnForMaskedLM
from recipes.arguments import PretrainingArguments, model_config
from recipes.batches import BlockReader
from recipes.benchmark_arms import ceiling, train_ours
from recipes.command_line import build_arguments
from recipes.launch import set_threads
from recipes.masking import Masker
from recipes.preparation import PreparedData, prepare_data
from recipes.stages import build_stages
from recipes.stock_recipe import train_stock
from recipes.validation import Validation

# Blocks of a validation, and updates from one to the next. Validations cost no training time.
EVAL_SAMPLES, EVERY = 200, 20
# Of the stock recipe's time, what each of ours is given.
SHARE = 0.25


class Course:
    """Training time, and losses on the way; in the place of the `StopRequest` of our loop, which it ends.

    The time is from the end of the first update: what comes before it is start-up, and differs.
    """

    def __init__(self, seconds: float) -> None:
        """It is enough after `seconds` of training."""
        self.limit, self.agreed, self.updates = seconds, False, 0
        self.curve: list[tuple[int, float, float]] = []
        self.start = 0.0

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return time.perf_counter() - self.start

    def ask(self) -> None:
        """Before an update: nothing."""

    def answer(self) -> bool:
        """After an update: count it; return whether it is enough."""
        self.updates += 1
        if self.updates == 1:
            self.start = time.perf_counter()
        self.agreed = self.seconds > self.limit
        return self.agreed

    def note(self, validate: Callable[[], float]) -> None:
        """Add the loss of `validate` to the curve, once an update. It takes no training time."""
        if self.curve and self.curve[-1][0] == self.updates:
            return
        before = time.perf_counter()
        self.curve.append((self.updates, self.seconds, validate()))
        self.start += time.perf_counter() - before


def time_to_loss(options: dict[str, Any], ways: dict[str, dict[str, Any]], minutes: float) -> dict[str, Any]:
    """Train the stock model for `minutes`, and ours in each of `ways` (over `options`) for `SHARE` of them.

    Returns:
        For `stock` and each way the `curve` (updates, seconds of training and validation loss), the
        fingerprint of the `masks` of its validations, and the `ceilings` (bf16 products, FLOP/s) before and
        after.
    """
    found = {"stock": _in_child(_stock, options, 60 * minutes)}
    for name, way in ways.items():
        found[name] = _in_child(_ours, options | way, 60 * minutes * SHARE)
    return found


def _in_child(train: Any, options: dict[str, Any], seconds: float) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as child:
        return child.submit(_between_ceilings, train, options, seconds).result()


def _between_ceilings(train: Any, options: dict[str, Any], seconds: float) -> dict[str, Any]:
    set_threads()
    device = Accelerator(mixed_precision="no").device
    before = ceiling(device)
    course, masks = train(options, seconds)
    return {"curve": course.curve, "masks": masks, "ceilings": [before, ceiling(device)]}


def _stock(options: dict[str, Any], seconds: float) -> tuple[Course, str]:
    """The stock model, as it comes. It is validated in our class, which takes the frozen masks."""
    args, accelerator, data, validation = _prepared(options)
    twin = BertLnForMaskedLM(model_config(args, vocab_size=args.vocab_size, pad_token_id=0))
    twin.config.sparse_prediction = True
    torch.manual_seed(args.seed)
    course = Course(seconds)

    def validate(model: PreTrainedModel) -> float:
        twin.load_state_dict(model.state_dict())
        return _loss(validation, twin, accelerator, args)

    def after_update(model: PreTrainedModel) -> bool:
        enough = course.answer()
        if enough or course.updates % EVERY == 0:
            course.note(lambda: validate(accelerator.unwrap_model(model)))
        return enough

    store = data.stores[0]
    everything = store.blocks("train", args.max_seq_length)
    train_stock(args, data.tokenizer, store, accelerator, (), after_update, blocks=everything)
    return course, validation.mask_fingerprint


def _ours(options: dict[str, Any], seconds: float) -> tuple[Course, str]:
    """Our loop on our model."""
    args, accelerator, data, validation = _prepared(options | {"eval_steps": EVERY})
    course = Course(seconds)

    def evaluate(model: PreTrainedModel) -> None:
        course.note(lambda: _loss(validation, model, accelerator, args))

    evaluate(train_ours(args, data, accelerator, course, evaluate=evaluate))
    return course, validation.mask_fingerprint


def _prepared(
    options: dict[str, Any],
) -> tuple[PretrainingArguments, Accelerator, PreparedData, Validation]:
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
