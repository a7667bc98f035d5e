"""The WordPiece tokenizer: loaded and checked, or trained on the corpus and kept for the next run."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from recipes.arguments import DataArguments
from recipes.corpus import HUB_TIMEOUT, Corpus
from recipes.errors import UserError
from recipes.files import cached_folder, make_cache_dir

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NEEDED_TOKENS = ("mask_token", "cls_token", "sep_token", "pad_token", "unk_token")
DEFAULT_VOCABULARY = 30522  # of BERT
MIN_VOCABULARY = 100
MAX_ALPHABET = 1000  # as in BERT; rarer characters become [UNK]
MIN_FREQUENCY = 2  # of a pair of pieces that is merged
MAX_TRAINING_CHARACTERS = 500_000_000
FORMAT = 1


def prepare_tokenizer(data: DataArguments, corpora: list[Corpus]) -> PreTrainedTokenizerBase:
    """The tokenizer `tokenizer_name`, or one trained on the training documents.

    A trained tokenizer is kept in `cache_dir`.

    Args:
        data: options.
        corpora: where the text comes from.

    Raises:
        UserError: the tokenizer cannot be loaded, trained or used.
    """
    tokenizer = _load(data.tokenizer_name or str(_trained(data, corpora)))
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """As `save_pretrained`, whose backend raises bare exceptions where it means an OSError."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 of what determines the ids of a text; truncation and padding, which use sets, do not count."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(truncation=None, padding=None)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


# --- Loading ----------------------------------------------------------------------------------------


def _load(name: str) -> PreTrainedTokenizerBase:
    """A checked tokenizer from a folder or the Hub."""
    if Path(name).is_file():
        raise UserError(f"tokenizer_name {name}: is a file; give a folder of save_pretrained or a Hub id")
    try:
        local = Path(name).is_dir() or not _reachable(name)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local)
    except Exception as error:  # network, rights, broken files: the backend raises bare exceptions too
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"tokenizer_name {name}: cannot be loaded ({reason}); give a folder of save_pretrained or a Hub "
            "id, or leave it out to train a tokenizer"
        ) from error
    _check(name, tokenizer)
    return tokenizer


def _reachable(name: str) -> bool:
    """Whether the Hub knows the repository; loading would retry for long before it used the cached copy."""
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except Exception:  # network, rights, names: loading from the cache says what is missing
        return False
    return True


def _check(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot serve masked language modelling."""
    where = f"tokenizer_name {name}:"
    if not tokenizer.is_fast:
        raise UserError(f"{where} is not a fast tokenizer; give one with a tokenizer.json")
    # An unreadable vocabulary gives only special tokens, and every word becomes [UNK].
    if len(tokenizer) < MIN_VOCABULARY:
        raise UserError(f"{where} has {len(tokenizer)} entries; at least {MIN_VOCABULARY} are needed")
    missing = [token for token in NEEDED_TOKENS if getattr(tokenizer, token) is None]
    if missing:
        raise UserError(f"{where} has no {', '.join(missing)}; needed are {', '.join(NEEDED_TOKENS)}")
    largest = max(tokenizer.get_vocab().values())
    if largest >= len(tokenizer):
        raise UserError(f"{where} has id {largest} but {len(tokenizer)} entries; ids 0, 1, 2, ... are needed")


# --- Training ---------------------------------------------------------------------------------------


def _trained(data: DataArguments, corpora: list[Corpus]) -> Path:
    """Folder of the tokenizer that belongs to these corpora and settings."""
    vocab_size = data.vocab_size or DEFAULT_VOCABULARY
    if vocab_size < MIN_VOCABULARY:
        raise UserError(f"vocab_size {vocab_size}: too small; at least {MIN_VOCABULARY} are needed")
    key = [FORMAT, [c.fingerprint for c in corpora], vocab_size, data.do_lower_case]
    key += [MAX_ALPHABET, MIN_FREQUENCY, MAX_TRAINING_CHARACTERS]
    fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder = make_cache_dir(data.cache_dir) / f"tokenizer-{fingerprint}"

    def build(aside: Path) -> None:
        names = ", ".join(corpus.name for corpus in corpora)
        print(f"tokenizer: learning {vocab_size:,} WordPieces from {names}", flush=True)
        save_tokenizer(train_tokenizer(corpora, vocab_size, data.do_lower_case), aside)

    return cached_folder(folder, build)


def train_tokenizer(corpora: list[Corpus], vocab_size: int, do_lower_case: bool) -> PreTrainedTokenizerBase:
    """A WordPiece tokenizer with ids 0..4 for [PAD] [UNK] [CLS] [SEP] [MASK]; deterministic.

    The trainer numbers the continuing characters (`##a`) in the order of a hash table, and ties between
    merges follow those numbers. So the alphabet is counted here, and both forms of each of its characters
    are given to the trainer first, in order.

    Raises:
        UserError: the text gives a vocabulary below 100.
    """
    alphabet = _alphabet(corpora, vocab_size // 4, do_lower_case)
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=do_lower_case)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_FREQUENCY,
        special_tokens=[*SPECIAL_TOKENS, *alphabet, *("##" + character for character in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(_training_texts(corpora, "learning the vocabulary"), trainer)
    vocabulary = backend.get_vocab()
    if len(vocabulary) < MIN_VOCABULARY:
        raise UserError(
            f"vocab_size {vocab_size}: the text gives only {len(vocabulary)} entries, at least "
            f"{MIN_VOCABULARY} are needed; give more text or tokenizer_name"
        )
    return BertTokenizer(vocab=vocabulary, do_lower_case=do_lower_case)


def _alphabet(corpora: list[Corpus], size: int, do_lower_case: bool) -> list[str]:
    """The most frequent normalised characters, at most `size` and `MAX_ALPHABET`, in code point order."""
    raw = np.zeros(0x110000, np.int64)  # by code point
    for text in _training_texts(corpora, "counting characters"):
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        np.add.at(raw, codes, 1)
    normalizer = normalizers.BertNormalizer(lowercase=do_lower_case)
    counts: dict[str, int] = {}
    for code in np.flatnonzero(raw):
        for character in normalizer.normalize_str(chr(code)).split():
            for part in character:
                counts[part] = counts.get(part, 0) + int(raw[code])
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    return sorted(by_frequency[: min(size, MAX_ALPHABET)])


def _training_texts(corpora: list[Corpus], description: str) -> Iterator[str]:
    """Training documents up to `MAX_TRAINING_CHARACTERS`, an equal share from each corpus, with progress."""
    share = MAX_TRAINING_CHARACTERS // len(corpora)
    with tqdm(desc=description, unit="char", unit_scale=True, disable=None) as progress:
        for corpus in corpora:
            left = share
            for text in corpus.documents("train"):
                if left <= 0:
                    print(f"tokenizer: {description} with the first {share} characters of {corpus.name}")
                    break
                left -= len(text)
                progress.update(len(text))
                yield text
