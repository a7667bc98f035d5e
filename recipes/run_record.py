"""run.json and metrics.jsonl: what a run is, and what it measured, in plain files."""

import json
import math
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from bert_ln import BertLnConfig
from bert_ln.placements import PLACEMENTS
from recipes.arguments import MODEL_OPTIONS, HubArguments, PretrainingArguments
from recipes.errors import UserError
from recipes.files import LOCK, is_aside, sync, write_text
from recipes.stages import Stage

# Options that change neither the weights nor the figures of a run, so that it may be continued with others.
# Micro-batch, accumulation and processes count through their product, the global batch. What is done about an
# update that is not finite is written down where it is done.
OPERATIONAL = {
    *HubArguments.__dataclass_fields__,
    "cache_dir",
    "dataloader_num_workers",
    "ddp_timeout",
    "eval_steps",
    "gradient_accumulation_steps",
    "logging_steps",
    "max_nonfinite_updates",
    "max_train_time",
    "nonfinite_update",
    "num_processes",
    "output_dir",
    "per_device_eval_batch_size",
    "per_device_train_batch_size",
    "report_to",
    "resume_from_checkpoint",
    "save_steps",
    "save_total_limit",
    "stages",
}
# Options that say nothing of a run but where it lies, and those that name files.
FOLDERS = {"output_dir", "cache_dir", "resume_from_checkpoint"}
FILES = ("train_file", "validation_file", "token_store")
# What identifies a run besides its options.
FACTS = ("updates", "corpus_fingerprints", "tokenizer_fingerprint", "mask_fingerprint")
PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy")


def describe_run(
    args: PretrainingArguments, stages: list[Stage], num_processes: int, **facts: Any
) -> dict[str, Any]:
    """The contents of run.json: options, versions, commit, and `facts` (fingerprints, world, entropy)."""
    return {
        "options": args.to_dict(),
        "updates": [
            {
                "steps": stage.steps,
                "max_seq_length": stage.max_seq_length,
                "global_batch_size": stage.global_batch_size(num_processes),
            }
            for stage in stages
        ],
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "num_processes": num_processes,
        **facts,
    }


def differences(ours: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What makes `other` another run than `ours`: options, batches, fingerprints, model; one line each."""
    mine, theirs = _identity(ours), _identity(other)
    # What is not known yet (fingerprints, before the data is prepared) is not compared.
    return [
        f"{name} is {_short(value)}, was {_short(theirs.get(name))}"
        for name, value in mine.items()
        if value != theirs.get(name)
    ]


def without_folders(options: dict[str, Any]) -> dict[str, Any]:
    """Options without where their files lie, which is another place on another machine."""
    options = {name: value for name, value in options.items() if name not in FOLDERS}
    for name in FILES:
        if isinstance(options.get(name), str):
            options[name] = Path(options[name]).name
    if options.get("corpora"):
        options["corpora"] = [without_folders(corpus) for corpus in options["corpora"]]
    return options


def _identity(record: dict[str, Any]) -> dict[str, Any]:
    """What a run is, in one flat table; what its files hold is told by the fingerprints."""
    options = without_folders(record["options"])
    options = {name: value for name, value in options.items() if name not in OPERATIONAL}
    return (
        options
        | model_settings(options.pop("model"))
        | {name: record[name] for name in FACTS if name in record}
    )


def model_settings(model: dict[str, Any]) -> dict[str, Any]:
    """Every option of a model of which `model` are given: a default that is given is no difference.

    What a placement's paper has is None, as if not given, so that two placements differ in nothing else.

    Raises:
        UserError: A field has a value that this version does not know.
    """
    try:
        config = BertLnConfig(**model)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise UserError(
            f"options of a model that are not known here: {' '.join(str(error).split())}"
        ) from error
    values = {name: getattr(config, name) for name in MODEL_OPTIONS}
    papers = PLACEMENTS[config.norm_placement].defaults(config)
    return values | {name: None for name, value in papers.items() if values[name] == value}


def check_same_run(output_dir: Path, ours: dict[str, Any]) -> dict[str, Any] | None:
    """The run.json that `output_dir` already holds, or None.

    Raises:
        UserError: It describes another run, or the folder holds something that is no run.
    """
    file = output_dir / "run.json"
    if not file.exists():
        check_writable(output_dir)
        # A run that was killed while it began leaves its lock and a half-written run.json.
        foreign = [f for f in _entries(output_dir) if f.name != LOCK and not is_aside(f, "run.json")]
        if foreign:
            raise UserError(
                f"output_dir {output_dir}: holds files but no run; choose an empty or a new folder"
            )
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        different = differences(ours, found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"output_dir {output_dir}: its run.json is not readable; choose another folder"
        ) from None
    if different:
        raise UserError(
            f"output_dir {output_dir}: holds a different run ({'; '.join(different)}); choose another folder"
        )
    if "results" not in found:
        check_writable(output_dir)
    return found


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


def check_writable(folder: Path) -> None:
    """Raise UserError where an output folder cannot be written to or made."""
    existing = next(f for f in (folder, *folder.absolute().parents) if f.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"output_dir {folder}: {existing} is no folder that can be written to")


class Metrics:
    """metrics.jsonl: one JSON object a line, `step` strictly increasing for each kind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, line: dict[str, Any]) -> None:
        """Add a line and hand it to the operating system; an OSError leaves the file as it was."""
        # JSON has no NaN and no infinity: a loss that is neither is null.
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        size = self.file.stat().st_size if self.file.exists() else 0
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError:
            with suppress(OSError):
                os.truncate(self.file, size)
            raise

    def sync(self) -> None:
        """Flush what has been written to the disk."""
        if self.file.exists():
            sync(self.file)

    def lines(self) -> list[dict[str, Any]]:
        """All lines; a last line that was cut short by a crash is left out.

        Raises:
            UserError: Another line is damaged.
        """
        texts = self.file.read_bytes().splitlines() if self.file.exists() else []
        lines = []
        for number, text in enumerate(texts, 1):
            try:
                line = json.loads(text)
                line["step"] + 0  # a table with a number: what all else counts on
                lines.append(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                if number < len(texts):
                    raise UserError(f"output_dir: {self.file}, line {number}, is damaged") from None
        return lines

    def continue_from(self, other: Path, step: int) -> None:
        """Take over what another folder's run measured up to `step`, where there is less here."""
        if other.exists() and max((line["step"] for line in self.lines()), default=0) < step:
            write_text(self.file, "".join(json.dumps(line) + "\n" for line in Metrics(other).lines()))

    def cut_back(self, step: int) -> None:
        """Drop what was measured after `step`, which training is about to repeat."""
        kept = [line for line in self.lines() if line["step"] <= step]
        write_text(self.file, "".join(json.dumps(line) + "\n" for line in kept))


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else text[:200] + "..."


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
