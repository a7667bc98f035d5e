"""Examples as token ids: tokenised once for all runs, and batches of them without wasted padding."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from glue_eval.data import Examples
from recipes.files import cached_folder, make_cache_dir
from recipes.randomness import ORDER, permute
from recipes.tokenization import tokenizer_fingerprint

FORMAT = 1
# So many batches are sorted by length together: padding nearly vanishes, and batches stay random.
BATCHES_SORTED_TOGETHER = 50
# But a small split is cut into at least so many groups: sorted as a whole, its batches would be the same in
# every epoch.
SMALLEST_NUMBER_OF_GROUPS = 4
EVAL_TOKENS = 16_384  # of a batch, padding included


@dataclass(frozen=True)
class Encoded:
    """A split as one array of token ids."""

    input_ids: np.ndarray
    """[tokens] int32, one example after the other."""
    token_type_ids: np.ndarray | None
    """[tokens] uint8; None where the model has none."""
    starts: np.ndarray
    """[examples + 1] int64, where each example begins."""
    labels: np.ndarray
    """[examples] int64, or float64 for a regression; -1 where there are none."""
    idx: np.ndarray
    """[examples] int64."""
    truncated: int
    """Examples that were longer than allowed."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, [examples] int64."""
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.labels)


def encode_task(
    examples: dict[str, Examples],
    data_fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    token_types: bool,
    cache_dir: str,
) -> Path:
    """The folder with all splits as `Encoded`, made unless the cache has it.

    Args:
        examples: Splits by name.
        data_fingerprint: What identifies their contents.
        tokenizer: That of the model; it joins the two sentences as the model is used to.
        max_length: Tokens of an example, special ones included; the longer sentence is cut first.
        token_types: Whether the model tells the first sentence from the second.
        cache_dir: Where the folder lies.
    """
    key = [FORMAT, data_fingerprint, tokenizer_fingerprint(tokenizer), max_length, token_types]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]

    def build(folder: Path) -> None:
        for split, rows in examples.items():
            encoded = _encode(rows, tokenizer, max_length, token_types)
            arrays = {k: v for k, v in vars(encoded).items() if v is not None}
            np.savez(folder / f"{split}.npz", **arrays)

    return cached_folder(make_cache_dir(cache_dir) / f"glue-{name}", build)


def _encode(
    rows: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, token_types: bool
) -> Encoded:
    asked = {"return_attention_mask": False, "return_token_type_ids": token_types}
    cut = tokenizer(rows.first, rows.second, truncation=True, max_length=max_length, **asked)
    lengths = np.array([len(ids) for ids in cut["input_ids"]], np.int64)
    full = [i for i, length in enumerate(lengths) if length == max_length]
    return Encoded(
        input_ids=_flat(cut["input_ids"], np.int32),
        token_type_ids=_flat(cut["token_type_ids"], np.uint8) if token_types else None,
        starts=np.concatenate([[0], np.cumsum(lengths)]),
        labels=rows.labels,
        idx=rows.idx,
        truncated=_longer(rows, tokenizer, max_length, full),
    )


def _longer(rows: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, full: list[int]) -> int:
    """How many of the examples that fill `max_length` are longer than that."""
    if not full:
        return 0
    second = None if rows.second is None else [rows.second[i] for i in full]
    whole = tokenizer([rows.first[i] for i in full], second, truncation=False, verbose=False)
    return sum(len(ids) > max_length for ids in whole["input_ids"])


def _flat(lists: list[list[int]], dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(ids, dtype) for ids in lists]) if lists else np.empty(0, dtype)


def load_split(folder: Path, split: str) -> Encoded:
    """A split of a folder of `encode_task`."""
    with np.load(folder / f"{split}.npz", allow_pickle=False) as arrays:
        values = {name: arrays[name] for name in arrays.files}
    values["truncated"] = int(values["truncated"])
    return Encoded(**{"token_type_ids": None} | values)


def training_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Every example once, in batches of nearly equal length and random order.

    A random permutation is cut into groups of some batches each; within a group examples are sorted by
    length and cut into batches; then the batches are put in random order. Both are functions of
    (seed, epoch).

    Args:
        lengths: Tokens of each example, [examples].
        batch_size: Examples of a batch; one batch may be smaller.
        seed: Seed of the run.
        epoch: Pass over the data, counted from 0.

    Returns:
        Indices of the examples of each batch.
    """
    n = len(lengths)
    order = permute(np.arange(n), n, ORDER, seed, epoch, 0)
    batches_a_group = min(n // (batch_size * SMALLEST_NUMBER_OF_GROUPS), BATCHES_SORTED_TOGETHER)
    size = batch_size * max(1, batches_a_group)
    batches = []
    for start in range(0, n, size):
        group = order[start : start + size]
        group = group[np.argsort(lengths[group], kind="stable")]
        batches += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    shuffled = permute(np.arange(len(batches)), len(batches), ORDER, seed, epoch, 1)
    return [batches[i] for i in shuffled]


def evaluation_batches(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Every example once, sorted by length, as many in a batch as `EVAL_TOKENS` allow."""
    order = np.argsort(lengths, kind="stable")
    end = len(order)
    while end > 0:  # the longest first: too little memory shows at once
        size = max(1, EVAL_TOKENS // int(lengths[order[end - 1]]))
        yield order[max(0, end - size) : end]
        end -= size


def collate(
    encoded: Encoded, rows: np.ndarray, pad_id: int, pad_left: bool, device: torch.device
) -> dict[str, torch.Tensor]:
    """A batch, padded to its longest example.

    Returns:
        input_ids, int64 [batch, length]; token_type_ids likewise where the model has them; attention_mask
        only where something is padded, since attention without a mask is faster.
    """
    starts, lengths = encoded.starts[rows], encoded.lengths[rows]
    shift = lengths.max() - lengths if pad_left else np.zeros_like(lengths)
    columns = np.arange(lengths.max()) - shift[:, None]
    real = (columns >= 0) & (columns < lengths[:, None])  # [batch, length]
    at = np.where(real, starts[:, None] + columns, 0)
    batch = {"input_ids": np.where(real, encoded.input_ids[at], pad_id)}
    if encoded.token_type_ids is not None:
        batch["token_type_ids"] = np.where(real, encoded.token_type_ids[at], 0)
    if not real.all():
        batch["attention_mask"] = real
    return {name: torch.from_numpy(array.astype(np.int64)).to(device) for name, array in batch.items()}
