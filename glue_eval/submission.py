"""The files that gluebenchmark.com takes, one TSV for each unlabelled split, and their check.

Format: https://gluebenchmark.com/faq, question 1, as jiant's formatter writes it. What the server refuses was
reported by those who submitted: a file missing or empty (keras-nlp, examples/glue_benchmark/README.md), rows
missing (nyu-mll/GLUE-baselines, issue 14).
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from glue_eval.tasks import TASKS, Task, check_labels
from recipes.arguments import nearest
from recipes.errors import UserError
from recipes.files import aside_of, sync

HEADER = "index\tprediction"
FILES = {file: (task, split) for task in TASKS.values() for split, file in task.files.items()}


def write_submission(
    folder: Path, task: Task, predictions: dict[str, np.ndarray], idx: dict[str, np.ndarray]
) -> list[Path]:
    """Write the files of one task, each whole or not at all; a number of class becomes what the server wants.

    Args:
        folder: Made if need be; its other files stay.
        task: One of the table.
        predictions: For each split of `task.files` number of the class, [n], or the score of a regression,
            which is clipped to 0 to 5.
        idx: For each split the example's own index, [n]: 0 to n - 1 in any order.

    Returns:
        The files, in the order of `task.files`.

    Raises:
        UserError: A prediction is none of the task's, an index is missing or occurs twice, or a file of the
            same name is there that is not a submission.
    """
    texts = {}
    for split, name in task.files.items():
        texts[folder / name] = _text(task, split, predictions[split], idx[split])
        _refuse_foreign(folder / name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"submission {folder}: {error.strerror}; give a folder that can be made") from error
    # All are on the disk before the first gets its name: MNLI has two.
    asides = [_write_aside(file, text) for file, text in texts.items()]
    for aside, file in zip(asides, texts, strict=True):
        os.replace(aside, file)
    return list(texts)


def check_folder(folder: Path, tasks: Iterable[Task]) -> None:
    """Refuse a folder that could not take the files of these tasks, before there is anything to write.

    Raises:
        UserError: It is no folder, or holds a file of such a name that is not a submission.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"submission {folder}: is a file; give a folder")
    for task in tasks:
        for name in task.files.values():
            _refuse_foreign(folder / name)


def check_submission(folder: Path, allow_other_sizes: bool = False) -> list[str]:
    """Read a folder's files again as the server would.

    Args:
        folder: What `--submission` named.
        allow_other_sizes: A number of rows that is not the official one is a note and no error.

    Returns:
        Notes for the user: files still missing, other sizes.

    Raises:
        UserError: No file, an unknown name, or the first thing in a file that the server would refuse.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() == ".tsv")
    if not files:
        raise UserError(f"submission {folder}: holds no .tsv file; allowed: {', '.join(FILES)}")
    notes = []
    for file in files:
        if file.name not in FILES:
            raise UserError(f"submission {file}: unknown name; {nearest(file.name, FILES)}")
        notes += _check_rows(file, _read(file), allow_other_sizes)
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        notes.append(
            f"{len(missing)} of {len(FILES)} files are missing: {', '.join(missing)}. The server is said to "
            "refuse a .zip without all of them, and to take the files of its sample submission for the others"
        )
    return notes


def _text(task: Task, split: str, predictions: np.ndarray, idx: np.ndarray) -> str:
    name = f"{task.name} {split}"
    if len(predictions) != len(idx) or not np.array_equal(np.sort(idx), np.arange(len(idx))):
        raise UserError(
            f"{name}: {len(predictions)} predictions, but the indices are not 0 to {len(predictions) - 1}, "
            "each once; give the whole split with its column idx"
        )
    values = np.asarray(predictions)[np.argsort(idx)]
    if task.is_regression:
        values = np.clip(values, 0, 5)  # nan stays nan, and is refused
    values = values.tolist()
    check_labels(task, values, f"{name}, predictions")
    rows = [f"{index}\t{_spelt(task, value)}\n" for index, value in enumerate(values)]
    return f"{HEADER}\n{''.join(rows)}"


def _spelt(task: Task, value: float) -> str:
    if task.is_regression:
        return f"{value:.3f}"
    return task.labels[int(value)] if task.server_labels else str(int(value))


def _write_aside(file: Path, text: str) -> Path:
    aside = aside_of(file)
    aside.write_text(text, encoding="utf-8", newline="\n")
    sync(aside)
    return aside


def _refuse_foreign(file: Path) -> None:
    """Refuse to replace what is not a submission."""
    if not file.exists():
        return
    try:
        _check_rows(file, _read(file), allow_other_sizes=True)
    except UserError as error:
        raise UserError(
            f"{error}. It is not a submission and is not overwritten; give another folder or remove it"
        ) from error


def _read(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        raise UserError(f"submission {file}: {reason}; allowed: a text file") from error


def _check_rows(file: Path, lines: list[str], allow_other_sizes: bool) -> list[str]:
    """Notes about one file; raises for the first thing that is wrong in it."""
    task, split = FILES[file.name]
    if lines[:1] != [HEADER]:
        raise UserError(
            f"submission {file}: header {lines[:1]}; allowed: index and prediction, one tab between"
        )
    labels = [] if task.is_regression else [_spelt(task, number) for number in range(task.num_labels)]
    for index, line in enumerate(lines[1:]):
        first, _, prediction = line.partition("\t")
        if first != str(index):
            raise UserError(
                f"submission {file}: line {index + 2} has index {first!r}; allowed there: {index}"
            )
        if not (prediction in labels if labels else _is_score(prediction)):
            allowed = ", ".join(labels) or "a number from 0 to 5"
            raise UserError(
                f"submission {file}: line {index + 2} predicts {prediction!r}; allowed: {allowed}"
            )
    rows, official = len(lines) - 1, task.rows[split]
    if rows == official:
        return []
    problem = f"{rows} rows; the server wants {official}"
    if not allow_other_sizes or not rows:
        raise UserError(f"submission {file}: {problem}")
    return [f"{file.name}: {problem}"]


def _is_score(prediction: str) -> bool:
    try:
        return 0 <= float(prediction) <= 5
    except ValueError:
        return False
