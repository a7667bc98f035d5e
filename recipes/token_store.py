"""Token ids of a corpus on disk, memory-mapped; blocks of any length by arithmetic.

Each split is one flat stream: the tokens of all documents without special tokens, [SEP] after each
document. Block i of length L is

    [CLS] + stream[i * (L - 2) : (i + 1) * (L - 2)] + [SEP]

so one store serves every `max_seq_length`; a tail shorter than L - 2 is left out. The stream lies in shards
of `SHARD_TOKENS` ids, 2 bytes each for vocabularies up to 65,536.
"""

import hashlib
import json
import re
import shutil
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipes.corpus import Corpus, content_hash
from recipes.errors import UserError
from recipes.files import cached_folder, make_cache_dir
from recipes.tokenization import save_tokenizer, tokenizer_fingerprint

FORMAT = 1
SPLITS = ("train", "validation")
DTYPES = ("<u2", "<u4")
# Of store.json and of each of its splits: what must be a number.
NUMBERS = ("vocab_size", "cls_id", "sep_id", "unk_id", "pad_id", "mask_id", "shard_tokens")
COUNTS = ("documents_in", "documents_kept", "documents_empty", "duplicates", "tokens", "unk")
SHARD_NAME = re.compile(r"(train|validation)-\d{5,}\.bin")
# What reading a damaged store raises.
DAMAGE = (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError, BadZipFile)
SHARD_TOKENS = 2**27
BATCH_CHARACTERS = 2**21  # tokenised at once: memory stays flat
PIECE_CHARACTERS = 2**17  # of a long document, so that all cores have work
UNK_CHECK_TOKENS = 200_000  # about 1 MB of text
CHARACTERS_PER_TOKEN = 4  # for the estimate of the disk space; English has about 4.7


class TokenStore:
    """A finished store, opened for reading. Pickled, it is its path: workers map the same files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = json.loads((path / "store.json").read_text())
        _check_about(self.about)
        self._shards = {split: self._map(split) for split in SPLITS}
        for split in SPLITS:
            self._check_counts(split)
        if not (path / "tokenizer").is_dir():
            raise ValueError("no tokenizer")

    @classmethod
    def open(cls, path: str | Path) -> "TokenStore":
        """Open the store in folder `path`. Nothing outside it is read, whatever it says.

        Raises:
            UserError: files of the store are missing or damaged.
        """
        try:
            return cls(Path(path))
        except DAMAGE as error:
            raise _damaged(path, error) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that made the ids; code that it brings is not executed.

        Raises:
            UserError: It does not load, or is another one.
        """
        folder, ids = self.path / "tokenizer", ("cls_id", "sep_id", "unk_id", "pad_id", "mask_id")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # the backend raises bare exceptions too
            raise _damaged(self.path, f"tokenizer: {error}") from error
        found = [len(tokenizer), *(getattr(tokenizer, f"{name[:-3]}_token_id") for name in ids)]
        if found != [self.vocab_size, *(self.about[name] for name in ids)]:
            raise _damaged(self.path, "its tokenizer is not the one that made it")
        return tokenizer

    def __reduce__(self) -> tuple[Callable, tuple[Path]]:
        return TokenStore.open, (self.path,)

    @property
    def fingerprint(self) -> str:
        """What determines the ids: corpus, tokenizer and how they were joined."""
        return self.about["fingerprint"]

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer."""
        return self.about["vocab_size"]

    def tokens(self, split: str) -> int:
        """Length of the stream, the [SEP] of each document included."""
        return self.about["splits"][split]["tokens"]

    def blocks(self, split: str, max_seq_length: int) -> int:
        """Full blocks of `max_seq_length` ids, [CLS] and [SEP] included."""
        return self.tokens(split) // (max_seq_length - 2)

    def dropped(self, split: str, max_seq_length: int) -> int:
        """Tokens of the tail that fill no block."""
        return self.tokens(split) % (max_seq_length - 2)

    def unigram_counts(self, split: str) -> np.ndarray:
        """Occurrences of each id in the stream, int64 [vocab_size]."""
        return np.load(self.path / f"counts-{split}.npy", mmap_mode="r", allow_pickle=False)

    def content_hashes(self, split: str) -> np.ndarray:
        """Hash of each kept document, in order, uint64 [documents]."""
        return np.load(self.path / f"hashes-{split}.npy", allow_pickle=False)

    def read_blocks(self, split: str, indices: np.ndarray, max_seq_length: int) -> np.ndarray:
        """Blocks of ids.

        Args:
            split: `train` or `validation`.
            indices: which blocks, int64 [n], each below `blocks(split, max_seq_length)`.
            max_seq_length: ids in a block, L.

        Returns:
            int64 [n, L].
        """
        indices, inner = np.asarray(indices, np.int64), max_seq_length - 2
        assert indices.size == 0 or 0 <= indices.min() <= indices.max() < self.blocks(split, max_seq_length)
        blocks = np.empty((len(indices), max_seq_length), np.int64)
        blocks[:, 0], blocks[:, -1] = self.about["cls_id"], self.about["sep_id"]
        positions = indices[:, None] * inner + np.arange(inner)  # [n, L - 2]
        blocks[:, 1:-1] = self._gather(split, positions)
        return blocks

    def check(self, max_seq_length: int) -> None:
        """Refuse a length of which a split does not hold one block.

        Raises:
            UserError: with the tokens that there are.
        """
        for split in SPLITS:
            if not self.blocks(split, max_seq_length):
                raise UserError(
                    f"max_seq_length {max_seq_length}: the {split} text of {self.about['corpus']} has only "
                    f"{self.tokens(split)} tokens, less than one block; give more text or a smaller length"
                )

    def report(self, max_seq_length: int) -> str:
        """What went in, what is kept and what is dropped at this block length; a line for each split."""
        return "\n".join(self._report_split(split, max_seq_length) for split in SPLITS)

    def _report_split(self, split: str, length: int) -> str:
        about, tokens, dropped = self.about["splits"][split], self.tokens(split), self.dropped(split, length)
        size = sum((self.path / name).stat().st_size for name in about["shards"])
        return (
            f"{self.about['corpus']}, {split}: documents {about['documents_in']:,} in, "
            f"{about['documents_kept']:,} kept ({about['duplicates']:,} duplicates), "
            f"{about['documents_empty']:,} empty; tokens {tokens:,} in, {tokens - dropped:,} kept in "
            f"{self.blocks(split, length):,} blocks of {length}, {dropped:,} dropped; [UNK] "
            f"{about['unk'] / tokens:.4%}; on disk {size:,} bytes, {size / tokens:.2f} a token, memory-mapped"
        )

    def _map(self, split: str) -> list[np.ndarray]:
        """Shards of a split, mapped; their sizes must be those that were written."""
        dtype, size, left = np.dtype(self.about["dtype"]), self.about["shard_tokens"], self.tokens(split)
        shards = []
        for name in self.about["splits"][split]["shards"]:
            if not SHARD_NAME.fullmatch(name):  # a store may come from anybody, and name any file
                raise ValueError(f"{name!r} is no name of a shard")
            shards.append(np.memmap(self.path / name, dtype, "r"))
            if len(shards[-1]) != min(size, left):
                raise ValueError(f"{name} holds {len(shards[-1])} tokens instead of {min(size, left)}")
            left -= len(shards[-1])
        if left:
            raise ValueError(f"the {split} shards lack {left} tokens")
        return shards

    def _check_counts(self, split: str) -> None:
        """Raise ValueError unless there is a count for each entry of the vocabulary."""
        try:
            counts = self.unigram_counts(split)
        except DAMAGE as error:
            raise ValueError(f"counts-{split}.npy: {error}") from error
        if counts.dtype != np.int64 or counts.shape != (self.vocab_size,):
            raise ValueError(f"counts-{split}.npy: not a count for each of {self.vocab_size} entries")

    def _gather(self, split: str, positions: np.ndarray) -> np.ndarray:
        """Ids at positions of the stream, int64 of the same shape."""
        ids = np.empty(positions.shape, np.int64)
        numbers, offsets = np.divmod(positions, self.about["shard_tokens"])
        for number in np.unique(numbers):
            here = numbers == number
            ids[here] = self._shards[split][number][offsets[here]]
        return ids


def _check_about(about: dict[str, Any]) -> None:
    """Raise ValueError or KeyError for what store.json cannot say."""
    if about["format"] != FORMAT:
        raise ValueError(f"format {about['format']} instead of {FORMAT}")
    if about["dtype"] not in DTYPES:
        raise ValueError(f"dtype {about['dtype']!r}; allowed: {', '.join(DTYPES)}")
    splits = [about["splits"][split] for split in SPLITS]
    counts = [about[name] for name in NUMBERS] + [split[name] for split in splits for name in COUNTS]
    if not all(type(count) is int and count >= 0 for count in counts) or not about["shard_tokens"]:
        raise ValueError("store.json has something else in place of a number")
    if not all(isinstance(about[name], str) for name in ("corpus", "fingerprint")):
        raise ValueError("store.json has something else in place of a name")


def _damaged(path: str | Path, reason: object) -> UserError:
    reason = " ".join(str(reason).split())[:300]
    return UserError(f"token store {path}: missing or damaged ({reason}); delete the folder")


def unigram_cross_entropy(
    stores: Sequence[TokenStore], special_ids: Sequence[int], weights: Sequence[float] | None = None
) -> float:
    """Loss of a model that knows only how frequent tokens are, in nats: what a plateau without context is.

    Validation tokens under the training frequencies with add-one smoothing over the V ids that are not
    special: -sum_v n_val[v] * log((n_train[v] + 1) / (N_train + V)) / N_val.

    Args:
        stores: one for each corpus, with the same vocabulary.
        special_ids: ids that count on neither side.
        weights: of the corpora in training; None: 1 each.
    """
    weights = [1.0] * len(stores) if weights is None else weights
    normal = np.setdiff1d(np.arange(stores[0].vocab_size), special_ids)
    weighted = zip(stores, weights, strict=True)
    train = sum(weight * store.unigram_counts("train")[normal] for store, weight in weighted)
    validation = sum(store.unigram_counts("validation")[normal] for store in stores)
    log_probability = np.log(train + 1) - np.log(train.sum() + len(normal))
    return float(-(validation * log_probability).sum() / validation.sum())


# --- Building ---------------------------------------------------------------------------------------


def build_token_store(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str,
    needed_tokens: int | None = None,
    max_unk_rate: float = 0.01,
) -> TokenStore:
    """The token store of a corpus: opened if it is in `cache_dir`, built there if not.

    Args:
        corpus: where the text comes from.
        tokenizer: a fast tokenizer with [CLS], [SEP] and [UNK].
        cache_dir: where stores are kept.
        needed_tokens: training tokens at which reading a stream ends; other corpora are read whole.
        max_unk_rate: largest share of [UNK] among the tokens.

    Raises:
        UserError: no text, overlapping splits, too many [UNK], no disk space, a damaged store.
    """
    needed = needed_tokens if corpus.streaming else None
    about = _describe(corpus, tokenizer, needed)
    folder = make_cache_dir(cache_dir) / f"tokens-{about['fingerprint'][:16]}"
    build = partial(
        _build, corpus=corpus, tokenizer=tokenizer, about=about, needed=needed, limit=max_unk_rate
    )
    store = TokenStore.open(cached_folder(folder, build))
    for split in SPLITS:
        _check_unk(store.about["splits"][split]["unk"], store.tokens(split), max_unk_rate, corpus.name)
    return store


def _describe(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, needed: int | None) -> dict[str, Any]:
    """All of store.json that is known beforehand; the fingerprint covers what determines the ids."""
    vocab_size = len(tokenizer)
    about = {
        "format": FORMAT,
        "dtype": "<u2" if vocab_size <= 2**16 else "<u4",
        "vocab_size": vocab_size,
        "cls_id": tokenizer.cls_token_id,
        "sep_id": tokenizer.sep_token_id,
        "unk_id": tokenizer.unk_token_id,
        "pad_id": tokenizer.pad_token_id,
        "mask_id": tokenizer.mask_token_id,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "corpus_fingerprint": corpus.fingerprint,
        "needed_tokens": needed,
        "shard_tokens": SHARD_TOKENS,
    }
    fingerprint = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return {**about, "corpus": corpus.name, "fingerprint": fingerprint}


def _build(
    folder: Path,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    about: dict[str, Any],
    needed: int | None,
    limit: float,
) -> None:
    """Tokenise both splits into `folder`; store.json comes last."""
    print(f"token store: tokenising {corpus.name}", flush=True)
    _ = corpus.threshold  # surveys the corpus, and finds overlaps before they cost time
    tokens = needed or (corpus.characters or 0) // CHARACTERS_PER_TOKEN
    _check_disk(folder, tokens * np.dtype(about["dtype"]).itemsize)
    backend = plain_backend(tokenizer)
    splits = {}
    for split in SPLITS:
        with _SplitWriter(folder, split, about) as writer:
            writer.write(corpus, backend, needed if split == "train" else None, limit)
        splits[split] = writer.finish()
    corpus.check_overlap(*(np.load(folder / f"hashes-{split}.npy") for split in SPLITS))
    # A store goes where there is no corpus: it brings its tokenizer.
    save_tokenizer(tokenizer, folder / "tokenizer")
    (folder / "store.json").write_text(json.dumps({**about, "splits": splits}, indent=1))


def plain_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy that neither truncates nor pads, and for which "[SEP]" in the text is no special token."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def _check_disk(folder: Path, needed: int) -> None:
    """Refuse to begin what will not fit: `needed` bytes, by estimate."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"cache_dir {folder.parent}: about {needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are "
            "free; free space or give another"
        )


def _check_unk(unk: int, tokens: int, limit: float, name: str) -> None:
    """Refuse text that the vocabulary does not cover."""
    if unk > limit * tokens:
        raise UserError(
            f"max_unk_rate {limit}: {unk / tokens:.2%} of the first {tokens} tokens of {name} are [UNK]; "
            "give a tokenizer that fits the text, or a higher limit"
        )


class _SplitWriter:
    """Writes the stream of one split in shards, and counts."""

    def __init__(self, folder: Path, split: str, about: dict[str, Any]) -> None:
        self.folder, self.split, self.about = folder, split, about
        self.started = time.perf_counter()
        self.shards: list[str] = []
        self.file: BinaryIO | None = None
        self.tokens = self.documents = 0
        self.hashes = array("Q")
        self.counts = np.zeros(about["vocab_size"], np.int64)

    def __enter__(self) -> "_SplitWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the shard that is being written."""
        if self.file is not None:
            self.file.close()

    @property
    def unk(self) -> int:
        """[UNK] so far."""
        return int(self.counts[self.about["unk_id"]])

    def write(self, corpus: Corpus, backend: Tokenizer, needed: int | None, limit: float) -> None:
        """Tokenise the documents of the split, until `needed` tokens are there."""
        checked = False
        with tqdm(desc=f"tokens of {self.split} text", unit="doc", disable=None) as progress:
            for batch in _batches(self._pieces(corpus.documents(self.split))):
                self._append(_encode(backend, batch, self.about["sep_id"]))
                if not checked and self.tokens >= UNK_CHECK_TOKENS:  # early: do not tokenise for hours first
                    _check_unk(self.unk, self.tokens, limit, corpus.name)
                    checked = True
                progress.update(self.documents - progress.n)
                rate = self.tokens / (time.perf_counter() - self.started)
                progress.set_postfix_str(f"{self.tokens:,} tokens, {rate:,.0f} tokens/s")
                if needed is not None and self.tokens >= needed:
                    break
        if not self.hashes:
            raise UserError(
                f"{corpus.train_source.label}: no {self.split} documents; give text that has some"
            )
        _check_unk(self.unk, self.tokens, limit, corpus.name)

    def finish(self) -> dict[str, Any]:
        """Write counts and hashes; the split's part of store.json."""
        hashes = np.frombuffer(self.hashes, np.uint64)
        np.save(self.folder / f"hashes-{self.split}.npy", hashes)
        np.save(self.folder / f"counts-{self.split}.npy", self.counts)
        return {
            "documents_in": self.documents,
            "documents_kept": len(hashes),
            "documents_empty": self.documents - len(hashes),
            "duplicates": len(hashes) - len(np.unique(hashes)),
            "tokens": self.tokens,
            "shards": self.shards,
            "unk": self.unk,
            "seconds": round(time.perf_counter() - self.started, 3),
        }

    def _pieces(self, documents: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """Pieces of all documents that are not empty, and whether each ends its document."""
        for text in documents:
            self.documents += 1
            if text.strip():
                self.hashes.append(content_hash(text))
                yield from _split_long(text)

    def _append(self, ids: np.ndarray) -> None:
        """Write ids, int64 [n], to the end of the stream, across shards."""
        self.counts += np.bincount(ids, minlength=len(self.counts))
        while len(ids):
            room = -self.tokens % self.about["shard_tokens"]
            if not room:
                self._next_shard()
                room = self.about["shard_tokens"]
            self.file.write(ids[:room].astype(self.about["dtype"]).tobytes())
            self.tokens += len(ids[:room])
            ids = ids[room:]

    def _next_shard(self) -> None:
        """Begin another shard file."""
        self.close()
        self.shards.append(f"{self.split}-{len(self.shards):05d}.bin")
        self.file = (self.folder / self.shards[-1]).open("wb")


def batches_of(documents: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
    """The batches in which the tokenizer gets documents: pieces, and whether each ends its document."""
    return _batches(piece for text in documents if text.strip() for piece in _split_long(text))


def _split_long(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces of a document, cut before white space, where no token crosses."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        cut = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
        end = cut if cut > 0 else end
        yield text[start:end], False
        start = end
    yield text[start:], True


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Lists of pieces with about `BATCH_CHARACTERS` characters."""
    batch, characters = [], 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece[0])
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(backend: Tokenizer, batch: list[tuple[str, bool]], sep_id: int) -> np.ndarray:
    """Ids of the pieces one after the other, [SEP] at the end of each document, int64 [n]."""
    encodings = backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
    parts = [encoding.ids + [sep_id] * ends for encoding, (_, ends) in zip(encodings, batch, strict=True)]
    return np.concatenate([np.asarray(part, np.int64) for part in parts])
