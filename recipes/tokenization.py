"""The WordPiece tokenizer: loaded and checked, or trained on the corpus and kept for the next run."""

import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from recipes.arguments import DataArguments, UserError
from recipes.corpus import HUB_TIMEOUT, Corpus

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
NEEDED_TOKENS = ("mask_token", "cls_token", "sep_token", "pad_token", "unk_token")
MIN_VOCABULARY = 100
MAX_ALPHABET = 1000  # as in BERT; rarer characters become [UNK]
MIN_FREQUENCY = 2  # of a pair of pieces that is merged
MAX_TRAINING_CHARACTERS = 500_000_000
FORMAT = 1

STALE_SECONDS = 3600.0  # without a change, a folder in the making has been given up
POLL_SECONDS = 0.2


def prepare_tokenizer(
    data: DataArguments, corpora: list[Corpus], max_length: int | None = None, is_main: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer `tokenizer_name`, or one trained on the training documents.

    A trained tokenizer is kept in `cache_dir`; it is trained by the main process, the others wait.

    Args:
        data: options.
        corpora: where the text comes from.
        max_length: tokens in the longest block; None: `max_seq_length`.
        is_main: whether this process trains.

    Raises:
        UserError: the tokenizer cannot be loaded, trained or used.
    """
    tokenizer = _load(data.tokenizer_name or str(_trained(data, corpora, is_main)))
    tokenizer.model_max_length = max_length or data.max_seq_length
    return tokenizer


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


def _trained(data: DataArguments, corpora: list[Corpus], is_main: bool) -> Path:
    """Folder of the tokenizer that belongs to these corpora and settings."""
    if data.vocab_size < MIN_VOCABULARY:
        raise UserError(f"vocab_size {data.vocab_size}: too small; at least {MIN_VOCABULARY} are needed")
    key = [FORMAT, [c.fingerprint for c in corpora], data.vocab_size, data.do_lower_case]
    key += [MAX_ALPHABET, MIN_FREQUENCY, MAX_TRAINING_CHARACTERS]
    fingerprint = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    folder = make_cache_dir(data.cache_dir) / f"tokenizer-{fingerprint}"

    def build(aside: Path) -> None:
        train_tokenizer(corpora, data.vocab_size, data.do_lower_case).save_pretrained(aside)

    return cached_folder(folder, build, is_main)


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


# --- Folders that are complete or absent ------------------------------------------------------------


def make_cache_dir(cache_dir: str) -> Path:
    """The cache folder, made if need be."""
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache_dir {cache_dir}: {error.strerror}; give a folder that can be made") from error
    return Path(cache_dir)


def cached_folder(folder: Path, build: Callable[[Path], None], is_main: bool) -> Path:
    """`folder`, which `build` fills beside it before it gets its name; nothing is built if it exists.

    Processes that are not main wait for the main one without a collective, which would time out. Where
    several processes build the same folder, the first to finish wins.

    Raises:
        TimeoutError: another process was waited for, and nothing changed for `STALE_SECONDS`.
    """
    if not folder.exists():
        if is_main:
            _build_aside(folder, build)
        else:
            _wait_for(folder)
    return folder


def _build_aside(folder: Path, build: Callable[[Path], None]) -> None:
    """Build in a folder of our own, then rename."""
    for other in _asides(folder):
        if _is_stale(other):
            shutil.rmtree(other, ignore_errors=True)
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{socket.gethostname()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        build(aside)
        _sync(aside)
        os.replace(aside, folder)
    except OSError:
        if not folder.exists():  # else another process finished the same folder meanwhile
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _sync(folder.parent, files=False)


def _sync(folder: Path, files: bool = True) -> None:
    """Make sure that a folder, and its files, survive a power cut."""
    for path in [*(folder.rglob("*") if files else ()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _asides(folder: Path) -> list[Path]:
    """Folders in the making, of any process."""
    return list(folder.parent.glob(f"{folder.name}.tmp-*"))


def _is_stale(aside: Path) -> bool:
    """Whether the process that made a folder is gone."""
    pid, host = aside.name.rpartition(".tmp-")[2].split("-", 1)
    if host == socket.gethostname() and not Path(f"/proc/{pid}").exists():
        return True
    return time.time() - _last_change(aside) > STALE_SECONDS


def _last_change(folder: Path) -> float:
    """Newest modification time of a folder and its files, seconds since the epoch; 0 if it is gone."""
    try:
        return max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
    except FileNotFoundError:
        return 0.0


def _wait_for(folder: Path) -> None:
    """Wait until the main process has finished `folder`."""
    started = time.time()
    while not folder.exists():
        changed = max([started, *map(_last_change, _asides(folder))])
        if time.time() - changed > STALE_SECONDS:
            raise TimeoutError(
                f"{folder} was waited for, but nothing has changed beside it for {STALE_SECONDS:.0f} s: "
                "the main process has stopped, or cache_dir is not shared by all machines"
            )
        time.sleep(POLL_SECONDS)
