"""The examples of a task, from files or from the Hub, checked before anything is trained.

Files lie as on the Hub, `data_dir/TASK/SPLIT.parquet` or `.jsonl`, or in shards,
`data_dir/TASK/SPLIT-00000-of-00001.parquet`. Reading them asks no network and writes no cache.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glue_eval.tasks import HUB_DATASET, Task, check_labels
from recipes.corpus import HUB_TIMEOUT
from recipes.errors import UserError

UNLABELLED = -1
LAYOUTS = ("{}.parquet", "{}-00000-of-00001.parquet", "{}.jsonl", "{}-00000-of-00001.jsonl")

Columns = dict[str, list[Any]]
# What a message calls it, and what it holds: a file, or a split on the Hub.
Part = tuple[str, Columns]


@dataclass(frozen=True)
class Examples:
    """The rows of one split, in their order."""

    first: list[str]
    second: list[str] | None
    """None for tasks with one sentence."""
    labels: np.ndarray
    """[n] int64 class numbers, or float64 scores for a regression; all -1 where the split has none."""
    idx: np.ndarray
    """[n] int64: the Hub's column `idx`, or row numbers where the data have none."""

    def __len__(self) -> int:
        return len(self.first)


def load_task(
    task: Task, data_dir: str | None, splits: Sequence[str], allow_other_sizes: bool = False
) -> dict[str, Examples]:
    """The examples of some splits.

    Args:
        task: Whose examples.
        data_dir: Folder that holds a folder for each task; None: the Hub, or its cache where it cannot be
            reached.
        splits: Names as on the Hub. Labels of a split `test*` are not read, even where they are public.
        allow_other_sizes: Whether a split may have another number of rows than the official one.

    Raises:
        UserError: Something is missing, cannot be read or is not what GLUE has there; names task, split and
            file.
    """
    parts = _hub_parts(task, splits) if data_dir is None else _file_parts(task, data_dir, splits)
    return {split: _join(task, split, parts[split], allow_other_sizes) for split in splits}


def fingerprint(examples: dict[str, Examples]) -> str:
    """16 hexadecimal digits that stand for all texts, labels and row numbers, whatever their layout was."""
    digest = hashlib.sha256()
    for split, rows in sorted(examples.items()):
        parts = [split, rows.first, rows.second, rows.labels.tolist(), rows.idx.tolist()]
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()[:16]


# --- Checks -----------------------------------------------------------------------------------------


def _join(task: Task, split: str, parts: list[Part], allow_other_sizes: bool) -> Examples:
    """The examples of a split from its parts, each of them checked."""
    for where, columns in parts:
        for column in task.columns:
            _check_texts(columns[column], f"{where}: {column}")
    texts = [[text for _, columns in parts for text in columns[column]] for column in task.columns]
    where, n = parts[0][0], len(texts[0])
    _check_size(n, task.rows[split], where, allow_other_sizes)
    return Examples(
        first=texts[0],
        second=texts[1] if len(texts) > 1 else None,
        labels=np.concatenate([_labels(task, columns, where) for where, columns in parts]),
        idx=_idx([columns.get("idx") for _, columns in parts], n, where),
    )


def _check_texts(texts: list[Any], where: str) -> None:
    try:
        "".join(texts).encode()
    except (TypeError, UnicodeEncodeError) as error:
        row = next(row for row, text in enumerate(texts) if not _is_text(text))
        raise UserError(
            f"{where} in row {row} is {texts[row]!r}; a string of valid text is needed"
        ) from error


def _is_text(value: Any) -> bool:
    """Whether it is a string without surrogates, the halves of a character that JSON lets through."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _check_size(n: int, official: int, where: str, allow_other_sizes: bool) -> None:
    if n == 0:
        raise UserError(f"{where}: has no rows; {official} are official")
    if n != official and not allow_other_sizes:
        guess = "truncated?" if n < official else "another version?"
        raise UserError(
            f"{where}: the split has {n} rows, {official} are official ({guess}); "
            "allow_other_sizes takes it as it is"
        )


def _labels(task: Task, columns: Columns, where: str) -> np.ndarray:
    """[n] labels of a part, -1 where it has none."""
    kind = np.float64 if task.is_regression else np.int64
    values = columns.get("label")
    if values is None:
        return np.full(len(columns[task.columns[0]]), UNLABELLED, dtype=kind)
    if not set(map(type, values)) <= {int, float}:
        row = next(row for row, value in enumerate(values) if type(value) not in (int, float))
        raise UserError(f"{where}: label {values[row]!r} in row {row}; a number is needed")
    numbers = np.array(values, dtype=np.float64)
    known = (
        (numbers >= 0) & (numbers <= 5) if task.is_regression else np.isin(numbers, range(task.num_labels))
    )
    if not known.all():
        check_labels(task, values, where)
    # The Hub's scores are float32: the same score in JSON shall be the same number.
    return numbers.astype(np.float32).astype(kind)


def _idx(columns: list[list[Any] | None], n: int, where: str) -> np.ndarray:
    """[n] numbers of a split's rows, of which no two are equal."""
    if None in columns:
        return np.arange(n)
    values = [value for column in columns for value in column]
    if set(map(type, values)) != {int}:
        row = next(row for row, value in enumerate(values) if type(value) is not int)
        raise UserError(f"{where}: idx {values[row]!r} in row {row}; a whole number is needed")
    numbers, counts = np.unique(np.array(values, dtype=np.int64), return_counts=True)
    if len(numbers) < n:
        raise UserError(
            f"{where}: idx {numbers[counts > 1][0]} occurs more than once; each row needs its own"
        )
    return np.array(values, dtype=np.int64)


def _choose(task: Task, split: str, present: Collection[str], where: str) -> list[str]:
    """The columns to read of those that are present."""
    wanted = [*task.columns, *([] if split.startswith("test") else ["label"])]
    missing = [column for column in wanted if column not in present]
    if missing:
        raise UserError(
            f"{where}: no column {', '.join(missing)}; wanted: {', '.join(wanted)}; "
            f"there are: {', '.join(present) or 'none'}"
        )
    return [*wanted, *(["idx"] if "idx" in present else [])]


# --- Files ------------------------------------------------------------------------------------------


def _file_parts(task: Task, data_dir: str, splits: Sequence[str]) -> dict[str, list[Part]]:
    """The files of each split; none is read before all are found."""
    folder = _task_folder(task, Path(data_dir))
    files = {split: _find_files(folder, split) for split in splits}
    return {split: [_read(task, split, path) for path in paths] for split, paths in files.items()}


def _task_folder(task: Task, root: Path) -> Path:
    layout = f"{task.name}/{LAYOUTS[0].format('SPLIT')}"
    if not root.is_dir():
        raise UserError(f"data_dir {root}: no such folder; a folder with {layout} is needed")
    if (root / task.name).is_dir():
        return root / task.name
    if root.resolve().name == task.name:
        raise UserError(
            f"data_dir {root}: is the folder of {task.name}; give the one above, {root.resolve().parent}"
        )
    folders = sorted(path.name for path in root.iterdir() if path.is_dir())
    alike = [name for name in folders if re.sub(r"\W|_", "", name.lower()) == task.name]
    hint = f"; rename {alike[0]} to {task.name}?" if alike else ""
    raise UserError(
        f"data_dir {root}: no folder {task.name} (wanted: {layout}); "
        f"there are: {', '.join(folders) or 'no folders'}{hint}"
    )


def _find_files(folder: Path, split: str) -> list[Path]:
    """The one file of a split, or all its shards in order."""
    pattern = re.compile(rf"{split}(?:-(\d{{5}})-of-(\d{{5}}))?\.(parquet|jsonl)")
    matches = [match for path in sorted(folder.iterdir()) if (match := pattern.fullmatch(path.name))]
    if not matches:
        raise UserError(
            f"data_dir {folder.parent}: {folder.name} has no {split} split; looked for "
            f"{', '.join(f'{folder.name}/{layout.format(split)}' for layout in LAYOUTS)}; "
            f"there are: {', '.join(sorted(path.name for path in folder.iterdir())) or 'no files'}"
        )
    where = f"data_dir {folder.parent}: {folder.name} {split}"
    if len({match.group(2, 3) for match in matches}) > 1:
        names = ", ".join(match[0] for match in matches)
        raise UserError(f"{where} is there more than once ({names}); keep one")
    count = int(matches[0][2] or 1)
    absent = set(range(count)) - {int(match[1] or 0) for match in matches}
    if absent:
        numbers = ", ".join(f"{number:05d}" for number in sorted(absent))
        raise UserError(f"{where} lacks shard {numbers} of {count}; all are needed")
    return [folder / match[0] for match in matches]


def _read(task: Task, split: str, path: Path) -> Part:
    where = f"data_dir {path.parents[1]}: {task.name} {split} ({path.name})"
    read = _read_parquet if path.suffix == ".parquet" else _read_jsonl
    return where, read(path, where, lambda present: _choose(task, split, present, where))


def _read_parquet(path: Path, where: str, choose: Callable[[Collection[str]], list[str]]) -> Columns:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{where}: {error}; pip install pyarrow, or give .jsonl") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            return file.read(columns=choose(file.schema_arrow.names)).to_pydict()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: {error}; valid Parquet is needed: truncated?") from error


def _read_jsonl(path: Path, where: str, choose: Callable[[Collection[str]], list[str]]) -> Columns:
    """The columns that the first row has, None where another row lacks one; blank lines are skipped."""
    rows: list[dict[str, Any]] = []
    try:
        for line in path.read_bytes().splitlines():
            if line.strip():
                rows.append(_json_object(line))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(
            f"{where}: row {len(rows)}: {error}; one JSON object a line is needed: truncated?"
        ) from error
    if not rows:
        raise UserError(f"{where}: is empty; one JSON object a line is needed: truncated?")
    return {column: [row.get(column) for row in rows] for column in choose(rows[0])}


def _json_object(line: bytes) -> dict[str, Any]:
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}")
    return row


# --- Hub --------------------------------------------------------------------------------------------


def _hub_parts(task: Task, splits: Sequence[str]) -> dict[str, list[Part]]:
    """The splits of the Hub's dataset."""
    dataset = _load_hub(task)
    parts = {}
    for split in splits:
        where = f"{HUB_DATASET}: {task.name} {split}"
        if split not in dataset:
            raise UserError(f"{where}: {task.name} has no {split} split; there are: {', '.join(dataset)}")
        columns = _choose(task, split, dataset[split].column_names, where)
        rows = dataset[split].select_columns(columns).with_format("arrow")[:]
        parts[split] = [(where, rows.to_pydict())]
    return parts


def _load_hub(task: Task) -> Any:
    """The task as a `DatasetDict`.

    The Hub is asked first: that fails at once where loading would retry for minutes. Without an answer the
    cached copy is taken, as with HF_HUB_OFFLINE=1.
    """
    try:
        import datasets
        from huggingface_hub import HfApi, constants
    except ImportError as error:
        raise UserError(f"data_dir: not given, and {error}; pip install datasets, or give it") from error
    revision, reason = None, "HF_HUB_OFFLINE is set, and nothing is cached"
    if not constants.HF_HUB_OFFLINE:
        try:
            revision = HfApi().dataset_info(HUB_DATASET, timeout=HUB_TIMEOUT).sha
        except Exception as error:  # network, rights, proxy: whatever stops it, the Hub does not answer
            reason = f"{_one_line(error)}, and nothing is cached"
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = revision is None
        return datasets.load_dataset(HUB_DATASET, task.name, revision=revision)
    except Exception as error:
        raise UserError(_missing(task, reason if revision is None else _one_line(error))) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _missing(task: Task, reason: str) -> str:
    """What to do where the Hub gives nothing."""
    files = " or ".join(f"DIR/{task.name}/{layout.format('SPLIT')}" for layout in LAYOUTS[:2])
    return (
        f"data_dir: not given, and {HUB_DATASET} {task.name} cannot be loaded from the Hub ({reason}); "
        f'where there is a network: hf download {HUB_DATASET} --repo-type dataset --include "{task.name}/*" '
        f"--local-dir DIR; then give --data_dir DIR, which holds {files} (or .jsonl)"
    )
