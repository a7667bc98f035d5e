"""The number that may be compared: validation loss on frozen masks."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save
from torch.nn import functional as F
from transformers import PreTrainedModel

from recipes.batches import Batch, BlockReader
from recipes.files import write_bytes
from recipes.masking import IGNORED
from recipes.sampling import Samples
from recipes.sharding import is_sharded

# Not the run's seed: runs of different seeds must be validated on the same masks.
MASK_SEED = 0
# Blocks that are masked at once: memory stays small.
SLICE = 1024


class Validation:
    """All validation blocks with their masks, made once."""

    def __init__(self, reader: BlockReader, max_seq_length: int, max_eval_samples: int | None) -> None:
        samples = _samples(reader, max_seq_length, max_eval_samples)
        slices = (_slice(samples, start) for start in range(0, len(samples.block), SLICE))
        batches = [reader(part, max_seq_length, MASK_SEED) for part in slices]
        self.batch = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        self.mask_fingerprint = _fingerprint(self.batch)
        self.masked_tokens = int((self.batch["labels"] != IGNORED).sum())
        self.blocks = len(self.batch["labels"])

    def save(self, file: Path) -> None:
        """Keep blocks and masks (int32) beside the results they belong to."""
        tensors = {name: tensor.int() for name, tensor in self.batch.items()}
        write_bytes(file, save(tensors, metadata={"mask_fingerprint": self.mask_fingerprint}))

    @torch.compiler.set_stance("force_eager")  # one number, whether training is compiled or not
    @torch.no_grad()  # tensors of inference mode could stay in a sharded model
    def __call__(
        self,
        model: PreTrainedModel,
        accelerator: Accelerator,
        batch_size: int,
        cut_short: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any] | None:
        """Loss (nats) and accuracy over all masked tokens of all blocks; None where it was cut short.

        Computed in float32 whatever training uses, and summed in float64, so that neither the batch size nor
        the number of processes shows; nothing random is drawn, so training does not notice. `cut_short` is
        asked before each batch, and must say the same on all processes.
        """
        was_training = model.training
        model.eval()
        totals = torch.zeros(2, dtype=torch.float64)
        offset, stride = accelerator.process_index * batch_size, batch_size * accelerator.num_processes
        is_cut = False
        for start in range(0, self.blocks, stride):  # as many rounds on each process
            if is_cut := cut_short():
                break
            has_blocks = start + offset < self.blocks
            # Parts of a sharded model come together only where every process computes.
            first = start + offset if has_blocks or not is_sharded(model) else 0
            mine = slice(first, first + batch_size)
            batch = {name: tensor[mine].to(accelerator.device) for name, tensor in self.batch.items()}
            if len(batch["labels"]):
                totals += has_blocks * _loss_and_hits(model, batch).cpu()
        model.train(was_training)
        if is_cut:
            return None
        loss, hits = _sum_over_processes(totals, accelerator)
        return {
            "validation_loss": loss / self.masked_tokens,
            "validation_accuracy": hits / self.masked_tokens,
            "masked_tokens": self.masked_tokens,
            "mask_fingerprint": self.mask_fingerprint,
        }


def _samples(reader: BlockReader, max_seq_length: int, max_eval_samples: int | None) -> Samples:
    counts = [store.blocks("validation", max_seq_length) for store in reader.stores]
    corpus = np.repeat(np.arange(len(counts)), counts)
    block = np.concatenate([np.arange(count) for count in counts])
    if max_eval_samples and max_eval_samples < len(block):
        chosen = np.linspace(0, len(block) - 1, max_eval_samples).round().astype(np.int64)
        corpus, block = corpus[chosen], block[chosen]
    return Samples(corpus, block, np.zeros_like(block))


def _slice(samples: Samples, start: int) -> Samples:
    end = start + SLICE
    return Samples(samples.corpus[start:end], samples.block[start:end], samples.epoch[start:end])


def _fingerprint(batch: Batch) -> str:
    digest = hashlib.sha256()
    for name in sorted(batch):
        digest.update(f"{name} {tuple(batch[name].shape)}".encode())
        digest.update(batch[name].to(torch.int32).numpy().tobytes())
    return digest.hexdigest()[:16]


def _loss_and_hits(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    labels = batch.pop("labels").flatten()  # [blocks * capacity]
    # Labels select the sparse path, whose logits are those of the masked positions only.
    logits = model(**batch).logits.float()  # [blocks * capacity, vocabulary]
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    hits = logits.argmax(dim=-1) == labels
    return torch.stack([loss.cpu().double().sum(), hits.cpu().double().sum()])


def _sum_over_processes(totals: torch.Tensor, accelerator: Accelerator) -> list[float]:
    if accelerator.num_processes > 1:
        totals = accelerator.reduce(totals.to(accelerator.device), reduction="sum").cpu()
    return totals.tolist()
