"""The stock way of pre-training BERT, rival of recipes/benchmark.py: as in the example of transformers.

That is run_mlm_no_trainer.py on our blocks: BertForMaskedLM with SDPA, DataCollatorForLanguageModeling, AdamW
with two parameter groups, a scheduler, Accelerate; a dense head, and a padding mask although blocks are full.
"""

from collections.abc import Callable, Collection

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_scheduler,
)

from recipes.arguments import PretrainingArguments
from recipes.token_store import TokenStore

# Blocks that are gone through again and again where only speed counts.
BLOCKS = 2048


def train_stock(
    args: PretrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    store: TokenStore,
    accelerator: Accelerator,
    switches: Collection[str],
    after_update: Callable[[PreTrainedModel], bool],
    blocks: int = BLOCKS,
) -> None:
    """Train until `after_update`, which is called with the model after each update, says that it is enough.

    Of `switches`, `bf16` brings fused AdamW (autocast is the accelerator's affair), `compiled` torch.compile
    and `eager` plain attention.
    """
    model = BertForMaskedLM(stock_config(args))
    model.set_attn_implementation("eager" if "eager" in switches else "sdpa")
    model.train()
    optimizer = torch.optim.AdamW(_groups(model), lr=args.learning_rate, fused="bf16" in switches or None)
    chosen = np.arange(blocks) % store.blocks("train", args.max_seq_length)
    ids = store.read_blocks("train", chosen, args.max_seq_length)
    dataset = Dataset.from_dict(
        {
            "input_ids": ids,
            "token_type_ids": np.zeros_like(ids),
            "attention_mask": np.ones_like(ids),
            "special_tokens_mask": np.isin(ids, tokenizer.all_special_ids).astype(np.int64),
        }
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=args.mlm_probability)
    loader = DataLoader(
        dataset, shuffle=True, collate_fn=collator, batch_size=args.per_device_train_batch_size
    )
    scheduler = get_scheduler(
        "linear", optimizer, num_warmup_steps=args.warmup_steps, num_training_steps=args.max_steps
    )
    model = torch.compile(model) if "compiled" in switches else model
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    while True:
        for batch in loader:
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if after_update(model):
                return


def stock_config(args: PretrainingArguments) -> BertConfig:
    """The stock configuration of the sizes that `args` gives."""
    fields = {name: value for name, value in args.model.items() if name in BertConfig.__annotations__}
    return BertConfig(**fields, vocab_size=args.vocab_size)


def _groups(model: BertForMaskedLM) -> list[dict]:
    exempt = ("bias", "LayerNorm.weight")
    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if not n.endswith(exempt)], "weight_decay": 0.01},
        {"params": [p for n, p in named if n.endswith(exempt)], "weight_decay": 0.0},
    ]
