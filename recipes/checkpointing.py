"""Checkpoints: complete or absent, never half.

A checkpoint is written aside, synced to disk, marked with the checksum of every file, renamed; only then
are old ones pruned. A folder without its marker does not exist for resuming, GLUE and pushing.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.errors import Failure, UserError
from recipes.files import sync, sync_tree, write_json
from recipes.tokenization import save_tokenizer

FORMAT = 1
MARKER = "complete.json"
# What it says; no checksum covers its names, so others are damage.
MARKED = {"format", "step", "scheduled", "files"}
WEIGHTS, MOMENTS, STATE = "model.safetensors", "trainer/optimizer.pt", "trainer/state.json"
# Without which nothing can go on.
NEEDED = (WEIGHTS, MOMENTS, STATE, "trainer/run.json")


@dataclass
class TrainState:
    """Everything that training has to remember besides weights and the optimiser's moments.

    Order, masks, dropout and the learning rate follow from `step`.
    """

    step: int = 0
    """Updates done."""
    tokens_seen: int = 0
    """Tokens of all processes so far."""
    elapsed_seconds: float = 0.0
    """Wall time so far, over all sessions of the run."""
    window_loss: float = 0.0
    """Summed loss since the last training line."""
    window_masked_tokens: int = 0
    """Masked tokens since the last training line."""
    data_offset: int = 0
    """Updates whose data has been passed over, after roll-backs."""
    nonfinite_updates: int = 0
    """Updates whose loss or gradient was not finite."""


def save_checkpoint(
    output_dir: Path,
    state: TrainState,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    record: dict[str, Any],
    scheduled: bool = True,
) -> Path:
    """Write `output_dir/checkpoint-STEP`, which exists afterwards whole, or not at all.

    `record` is the run's description (run.json), kept so that resuming can compare; `scheduled` says whether
    an uninterrupted run has this checkpoint too.

    Raises:
        NotWritten: The disk is full, or something else is wrong with it; nothing is left of the attempt.
    """
    final = output_dir / f"checkpoint-{state.step}"
    aside = output_dir / f".{final.name}.partial"
    with written_or_removed(aside):
        for leftover in output_dir.glob(".checkpoint-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        write_model(aside, model, tokenizer)
        trainer = aside / "trainer"
        trainer.mkdir()
        torch.save(optimizer.state_dict(), trainer / "optimizer.pt")
        write_json(trainer / "state.json", asdict(state))
        write_json(trainer / "run.json", record)
        marker = {"format": FORMAT, "step": state.step, "scheduled": scheduled, "files": checksums(aside)}
        sync_tree(aside)
        write_json(aside / MARKER, marker)
        sync(aside)
        replaced = output_dir / f".{final.name}.replaced"
        if final.exists():  # torn, or damaged and therefore not resumed from
            os.replace(final, replaced)
        os.replace(aside, final)
        sync(output_dir)
    shutil.rmtree(replaced, ignore_errors=True)
    return final


class NotWritten(Failure):
    """A folder could not be written, and is not there."""


@contextmanager
def written_or_removed(aside: Path | None = None) -> Iterator[None]:
    """Raise NotWritten when writing fails; what is half-written goes: a full disk has no room for it."""
    try:
        yield
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # of all who write
        if aside:
            shutil.rmtree(aside, ignore_errors=True)
        raise NotWritten(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def write_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Weights, configuration, code and tokenizer, as `from_pretrained` expects them."""
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def write_final_model(output_dir: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model's files in `output_dir` itself, each of them whole or not there.

    Raises:
        NotWritten: As `save_checkpoint`.
    """
    aside = output_dir / ".final.partial"
    with written_or_removed(aside):
        shutil.rmtree(aside, ignore_errors=True)
        write_model(aside, model, tokenizer)
        sync_tree(aside)
        for file in aside.iterdir():
            os.replace(file, output_dir / file.name)
        aside.rmdir()


def load_checkpoint(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Put the checkpoint's weights and moments in place; returns its state. Executes nothing from it.

    The checkpoint has been checked by `find_checkpoint`.

    Raises:
        UserError: A file is not what it should be, though its checksum is right.
    """
    state = _read_state(folder)
    with _reading(folder / WEIGHTS):
        load_model(model, folder / WEIGHTS, strict=True)
    with _reading(folder / MOMENTS):
        moments = torch.load(folder / MOMENTS, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(moments)
        _check_moments(optimizer)
    return state


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn whatever a reader says of a file into an error for people."""
    try:
        yield
    except Exception as error:  # a pickle that would execute something, a damaged archive, another model's
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: is not this run's, or damaged ({reason})") from error


def _read_state(folder: Path) -> TrainState:
    with _reading(folder / STATE):
        state = TrainState(**json.loads((folder / STATE).read_text()))
        for name, value in asdict(state).items():
            if type(value) not in (int, float) or not value >= 0:
                raise ValueError(f"{name} {value!r}")
        return state


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError where moments are not of their parameters' shape, which PyTorch does not look at."""
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)} for {tuple(parameter.shape)}")


def find_checkpoint(
    output_dir: Path, requested: str | bool | None, only_scheduled: bool = False
) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, or None, with a line for each one that was passed over.

    Args:
        output_dir: Where the newest complete one is looked for.
        requested: `--resume_from_checkpoint`: a folder, or True or None.
        only_scheduled: Whether those that an interruption made do not count.

    Raises:
        UserError: The requested folder is not a complete checkpoint, or False was asked for.
    """
    if requested is False:
        raise UserError(
            "resume_from_checkpoint false: a run is always continued; give another output_dir to start anew"
        )
    if isinstance(requested, str):
        folder = Path(requested)
        if damage := damage_of(folder):
            raise UserError(f"resume_from_checkpoint {requested}: {damage}")
        return folder, []
    passed_over = []
    for folder in reversed(checkpoint_folders(output_dir)):
        damage = damage_of(folder)
        if damage is None and only_scheduled and not is_scheduled(folder):
            continue
        if damage is None:
            return folder, passed_over
        passed_over.append(f"{folder} is passed over: {damage}")
    return None, passed_over


def checkpoint_folders(output_dir: Path) -> list[Path]:
    """Folders named checkpoint-STEP, complete or not, in the order of their steps."""
    folders = [f for f in output_dir.glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdigit()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("checkpoint-"))


def is_complete(folder: Path) -> bool:
    """Whether the folder carries the marker of a finished save (its checksums are not compared)."""
    return (folder / MARKER).is_file()


def is_scheduled(folder: Path) -> bool:
    """Whether a complete checkpoint was due, and not made by an interruption."""
    return json.loads((folder / MARKER).read_text()).get("scheduled", True)


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, file by file against its marker; None where nothing is."""
    if not folder.is_dir():
        return "no such folder"
    if not is_complete(folder):
        return f"incomplete (no {MARKER})"
    try:
        marker = json.loads((folder / MARKER).read_text())
        expected, version, step = dict(marker["files"]), marker["format"], marker["step"]
        if not marker.keys() <= MARKED:
            raise KeyError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return f"damaged ({MARKER})"
    if version != FORMAT:
        return f"format {version}, and this program reads format {FORMAT}"
    try:
        found = checksums(folder)
    except OSError as error:
        return f"not readable ({error.strerror})"
    expected = dict.fromkeys(NEEDED) | expected
    wrong = [name for name, checksum in expected.items() if found.get(name) != checksum]
    if not wrong and _step_in(folder) != step:  # the one thing that no checksum covers
        wrong = [MARKER]
    return f"damaged ({', '.join(wrong)})" if wrong else None


def _step_in(folder: Path) -> int | None:
    """The step that the trainer's state says; None where it says none."""
    try:
        return _read_state(folder).step
    except UserError:
        return None


def prune(output_dir: Path, save_total_limit: int | None, newest: int) -> None:
    """Delete all but the last complete checkpoints up to step `newest`, the one just saved.

    Those after it were passed over when the run was resumed: they are no reason to delete a good one. What
    an interruption made has done its work as soon as there is a newer one, and counts for nothing.
    """
    complete = [f for f in checkpoint_folders(output_dir) if is_complete(f) and step_of(f) <= newest]
    scheduled = [folder for folder in complete if is_scheduled(folder)]
    surplus = [f for f in complete if f not in set(scheduled) and step_of(f) < newest]
    for folder in surplus + (scheduled[:-save_total_limit] if save_total_limit else []):
        if folder.is_symlink():  # of another run, whose checkpoint it stays
            folder.unlink()
            continue
        # Out of sight at once: what a deletion cut short leaves looks like nothing; the next save ends it.
        gone = folder.with_name(f".{folder.name}.pruned")
        os.replace(folder, gone)
        shutil.rmtree(gone)


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a checkpoint but its marker, by relative path."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f != folder / MARKER)
    return {f.relative_to(folder).as_posix(): _sha256(f) for f in files}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
