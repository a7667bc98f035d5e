"""What is not an update: building a token store, the first batch after a resume, a validation."""

import os
import time
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer

from recipes.arguments import PretrainingArguments, model_config
from recipes.batches import Batch, BlockReader, TrainingBatches
from recipes.corpus import open_corpora
from recipes.launch import choose_precision
from recipes.masking import Masker
from recipes.preparation import PreparedData, prepare_data
from recipes.pretraining import build_model
from recipes.stages import build_stages
from recipes.token_store import TokenStore, batches_of, build_token_store, plain_backend
from recipes.tokenization import prepare_tokenizer
from recipes.validation import Validation

STEPS_DONE = (10, 10_000, 900_000)
EVAL_SAMPLES = 400


def measure_data(args: PretrainingArguments, repeats: int = 3) -> dict[str, Any]:
    """Rates and times of what surrounds training; the shortest of `repeats`, with all that alternate."""
    accelerator = Accelerator(mixed_precision="no")
    data = prepare_data(args, build_stages(args), accelerator)
    return {
        "token_store": _token_store(args, repeats),
        "first_batch_seconds": {
            step: min(_seconds(lambda step=step: _first_batch(args, data, step)) for _ in range(repeats))
            for step in STEPS_DONE
        },
        "validation_tokens_per_second": _validation_rate(args, data, accelerator),
    }


def _seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _token_store(args: PretrainingArguments, repeats: int) -> dict[str, float]:
    """Tokens a second of a whole store, and of the tokenizers library alone, with one core and with all."""
    corpora = open_corpora(args)
    tokenizer = prepare_tokenizer(args, corpora)
    texts = [list(batch) for batch in batches_of(corpora[0].documents("train"))]
    backend, times = plain_backend(tokenizer), {"store": [], "all_cores": [], "one_core": []}
    for _ in range(repeats):
        for name, parallel in (("all_cores", "true"), ("one_core", "false")):
            os.environ["TOKENIZERS_PARALLELISM"] = parallel
            times[name].append(_seconds(lambda: [_encode(backend, batch) for batch in texts]))
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        with TemporaryDirectory() as folder:
            store = build_token_store(corpora[0], tokenizer, folder)
            times["store"].append(store.about["splits"]["train"]["seconds"])
            tokens, stored = store.tokens("train"), _bytes(store)
    rates = {f"{name}_tokens_per_second": tokens / min(seconds) for name, seconds in times.items()}
    return rates | {"bytes_per_token": stored / tokens}


def _encode(backend: Tokenizer, batch: list[tuple[str, bool]]) -> None:
    backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)


def _bytes(store: TokenStore) -> int:
    return sum(file.stat().st_size for file in store.path.glob("train-*.bin"))


def _first_batch(args: PretrainingArguments, data: PreparedData, step: int) -> list[Batch]:
    masker = Masker(data.tokenizer, args)
    batches = TrainingBatches(data.stores, data.weights, masker, args, build_stages(args), 0, 1)
    return next(batches.updates(step, args.max_steps, 0))


def _validation_rate(args: PretrainingArguments, data: PreparedData, accelerator: Accelerator) -> float:
    """Tokens a second of a validation, which computes in float32."""
    reader = BlockReader(data.stores, "validation", Masker(data.tokenizer, args))
    validation = Validation(reader, args.max_seq_length, EVAL_SAMPLES)
    torch.manual_seed(args.seed)
    args.bf16, _ = choose_precision(args.bf16, accelerator.device)  # decides which attention is taken
    config = model_config(args, vocab_size=args.vocab_size, pad_token_id=0)
    model = build_model(args, config, accelerator.device).to(accelerator.device)
    size = args.per_device_eval_batch_size
    validation(model, accelerator, size)
    return validation.blocks * args.max_seq_length / _seconds(lambda: validation(model, accelerator, size))
