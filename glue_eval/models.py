"""Which models are fine-tuned, what they are, and how they get a head for a task.

A model is a folder of `from_pretrained` (a checkpoint of a run, an exported model, any encoder) or a Hub id,
with a revision as hub:REPO@REVISION.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

import bert_ln  # noqa: F401  registers its classes with the Auto classes
from glue_eval.arguments import GlueArguments
from glue_eval.tasks import NLI, Task
from recipes.checkpointing import checkpoint_folders, is_complete, step_of
from recipes.errors import UserError
from recipes.hub_access import is_reference, parse_reference, step_revisions
from recipes.tokenization import tokenizer_fingerprint

DEFAULT_RUN = Path("output/pretrain")
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Source:
    """Where a model comes from."""

    path: str
    """Folder or Hub id."""
    option: str = "model_name_or_path"
    """What named it."""
    from_scratch: bool = False
    """Random weights of its configuration."""
    trust_remote_code: bool = False
    """Whether code that it brings is executed."""
    run: str | None = None
    """Folder of the pre-training run that it is a checkpoint of."""
    step: int | None = None
    """Updates of pre-training, where it is a checkpoint."""
    revision: str | None = None
    """Of a repository of the Hub."""

    @property
    def where(self) -> str:
        """Folder, or repository with its revision."""
        return f"{self.path}@{self.revision}" if self.revision else self.path

    @property
    def name(self) -> str:
        """What people read."""
        return f"{self.where}, from scratch" if self.from_scratch else self.where

    @property
    def loading(self) -> dict[str, Any]:
        """How `from_pretrained` gets it, besides its path."""
        revision = {"revision": self.revision} if self.revision else {}
        return revision | {"trust_remote_code": self.trust_remote_code}


@dataclass(frozen=True)
class Model:
    """A source that has been looked at: it loads, and this is what it is."""

    source: Source
    fingerprint: str
    """Hash of the configuration, the tokenizer and the weights; 16 hex digits."""
    norm_placement: str | None
    max_length: int
    """Tokens of an input that it takes; at most `max_seq_length`."""
    token_types: bool
    """Whether it tells the first sentence from the second."""
    pad_id: int
    """Of the token that fills a batch."""
    pad_left: bool
    """Whether a batch is filled on the left, as models that look at the last token want it."""
    new_parameters: list[str]
    """Newly initialised ones, with a head for the first task."""
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """As in a result file."""
        source = self.source
        return {
            "name": source.name,
            "path": source.path,
            "fingerprint": self.fingerprint,
            "run": source.run,
            "step": source.step,
            "from_scratch": source.from_scratch,
            "norm_placement": self.norm_placement,
        }


def find_sources(args: GlueArguments) -> list[Source]:
    """The models that were asked for.

    Raises:
        UserError: A run without a complete checkpoint, or no model at all; says what to run.
    """
    how = {"from_scratch": args.from_scratch, "trust_remote_code": args.trust_remote_code}
    if args.run_dirs:
        runs = dict.fromkeys(_spelt(run) for run in args.run_dirs)
        return [source for run in runs for source in _trajectory(run, how)]
    if args.from_task_checkpoint:
        return [Source(_spelt(args.from_task_checkpoint), "from_task_checkpoint", **how)]
    if args.model_name_or_path is None:
        return _checkpoints(DEFAULT_RUN, "model_name_or_path", how)[-1:]
    if is_reference(args.model_name_or_path):
        path, revision = parse_reference("model_name_or_path", args.model_name_or_path)
        return [Source(path, revision=revision, **how)]
    path = _spelt(args.model_name_or_path)
    folder = Path(path)
    # A checkpoint keeps its step when it is named by itself.
    if folder in checkpoint_folders(folder.parent):
        return [Source(path, run=str(folder.parent), step=step_of(folder), **how)]
    return [Source(path, **how)]


def _spelt(path: str) -> str:
    """A folder in one spelling, however it was given; a Hub id as it is."""
    if not Path(path).exists():
        return path
    absolute, here = Path(path).resolve(), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


def _trajectory(run: str, how: dict[str, bool]) -> list[Source]:
    """Every checkpoint of a run, in its folder or as the revisions of its repository."""
    if not is_reference(run):
        return _checkpoints(Path(run), "run_dir", how)
    path, _ = parse_reference("run_dir", run)
    found = step_revisions("run_dir", run)
    return [Source(path, "run_dir", run=run, step=step, revision=revision, **how) for step, revision in found]


def _checkpoints(run: Path, option: str, how: dict[str, bool]) -> list[Source]:
    complete = [folder for folder in checkpoint_folders(run) if is_complete(folder)]
    if not complete and option == "run_dir":
        raise UserError(
            f"run_dir {run}: holds no complete checkpoint; give the output_dir of a pre-training run"
        )
    if not complete:
        raise UserError(
            f"{option}: none given, and {run} holds no complete checkpoint; pre-train one with: "
            "accelerate launch recipes/pretrain.py"
        )
    return [Source(str(folder), option, run=str(run), step=step_of(folder), **how) for folder in complete]


def inspect_model(source: Source, task: Task, max_seq_length: int) -> Model:
    """Load a model once, before any training.

    Raises:
        UserError: The folder or repository is no model with a tokenizer, weights and a head for
            classification.
    """
    config = _load_config(source)
    tokenizer = load_tokenizer(source)
    model, new = _load(source, config, task, seed=0)
    accepted = inspect.signature(model.forward).parameters
    max_length = min(max_seq_length, _longest_input(model, tokenizer))
    _try(source, model, tokenizer, max_length)
    return Model(
        source=source,
        fingerprint=_fingerprint(model, tokenizer, new, source.from_scratch),
        norm_placement=getattr(config, "norm_placement", None),
        max_length=max_length,
        token_types="token_type_ids" in accepted
        and "token_type_ids" in tokenizer.model_input_names
        and getattr(config, "type_vocab_size", 2) > 1,
        pad_id=tokenizer.pad_token_id,
        pad_left=tokenizer.padding_side == "left",
        new_parameters=new,
        parameters=sum(p.numel() for p in model.parameters()),
    )


def load_classifier(source: Source, task: Task, seed: int) -> PreTrainedModel:
    """The model with a head for the task, in float32; the seed decides all new weights."""
    return _load(source, _load_config(source), task, seed)[0]


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UserError: There is none.
    """
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.path, **source.loading)
        except Exception as error:
            raise _unusable(source, "has no tokenizer that loads", error) from error
    where = f"{source.option} {source.where}"
    if not tokenizer.is_fast:
        raise UserError(f"{where}: its tokenizer has no fast form (tokenizer.json)")
    if len(tokenizer) < 100 or tokenizer.pad_token_id is None:
        raise UserError(
            f"{where}: its tokenizer is not usable ({len(tokenizer)} tokens, padding token "
            f"{tokenizer.pad_token}); copy the one of its pre-training into the folder"
        )
    return tokenizer


def _load_config(source: Source) -> Any:
    folder = Path(source.path)
    if folder.exists() or source.path.startswith((".", "/", "~")):
        _check_folder(source, folder)
    with quiet():
        try:
            config = AutoConfig.from_pretrained(source.path, **source.loading)
        except Exception as error:
            raise _unusable(source, "has no configuration that loads", error) from error
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING and not (
        source.trust_remote_code and "AutoModelForSequenceClassification" in getattr(config, "auto_map", {})
    ):
        raise UserError(
            f"{source.option} {source.where}: a model of type {config.model_type} has no "
            "sequence-classification head (AutoModelForSequenceClassification does not know it)"
        )
    if source.option == "from_task_checkpoint" and config.num_labels != len(NLI):
        raise UserError(
            f"from_task_checkpoint {source.path}: is no model of MNLI, which has {len(NLI)} labels; "
            "make one with --task mnli --save_model"
        )
    return config


def _check_folder(source: Source, folder: Path) -> None:
    where = f"{source.option} {folder}"
    if not folder.is_dir():
        raise UserError(f"{where}: no such folder")
    if not (folder / "config.json").is_file():
        inside = [f for f in checkpoint_folders(folder) if is_complete(f)]
        hint = f"; give one of its checkpoints, such as {inside[-1]}" if inside else ""
        raise UserError(f"{where}: holds no config.json{hint}")
    if (folder / "trainer").is_dir() and not is_complete(folder):
        raise UserError(f"{where}: is an incomplete checkpoint (no complete.json)")
    if not source.from_scratch and not any((folder / name).is_file() for name in WEIGHTS):
        raise UserError(f"{where}: holds no weights ({WEIGHTS[0]})")


def _unusable(source: Source, what: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    where = "" if Path(source.path).exists() else "is no folder here, and as an id on the Hub it "
    return UserError(f"{source.option} {source.where}: {where}{what} ({reason})")


def _load(source: Source, config: Any, task: Task, seed: int) -> tuple[PreTrainedModel, list[str]]:
    """The model and the names of its newly initialised parameters."""
    config.num_labels = task.num_labels
    config.problem_type = "regression" if task.is_regression else "single_label_classification"
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {label: i for i, label in enumerate(task.labels)}
    torch.manual_seed(seed)
    with quiet():
        if source.from_scratch:
            model = AutoModelForSequenceClassification.from_config(
                config, trust_remote_code=source.trust_remote_code, dtype=torch.float32
            )
            return model, sorted(name for name, _ in model.named_parameters())
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                source.path,
                config=config,
                **source.loading,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:
            raise _unusable(source, "does not load", error) from error
    new = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    _check_only_head_is_new(source, model, new)
    return model, new


def _check_only_head_is_new(source: Source, model: PreTrainedModel, new: list[str]) -> None:
    body = [name for name in new if name.startswith(f"{model.base_model_prefix}.") and ".pooler." not in name]
    if body:
        raise UserError(
            f"{source.option} {source.where}: its weights are not those of its configuration; "
            f"{len(body)} parameters of the encoder are not among them, such as {body[0]}"
        )


def _longest_input(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    positions = getattr(model.config, "max_position_embeddings", None) or 0
    table = next((m for name, m in model.named_modules() if name.endswith("position_embeddings")), None)
    # RoBERTa and its relatives number positions from behind the padding index.
    if getattr(table, "padding_idx", None) is not None:
        positions -= table.padding_idx + 1
    return min(positions, tokenizer.model_max_length) if positions > 0 else tokenizer.model_max_length


def _try(source: Source, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Run the longest input once: what does not fit shows now and not in the first epoch.

    Raises:
        UserError: The tokenizer or the length does not suit the model.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(
            f"{source.option} {source.where}: its tokenizer has {len(tokenizer)} tokens, "
            f"its embedding {rows} rows"
        )
    ids = torch.full((1, max_length), tokenizer.unk_token_id or 0)
    try:
        with torch.inference_mode():
            model.eval()(ids)
    except Exception as error:
        raise _unusable(source, f"does not take {max_length} tokens", error) from error


def _fingerprint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, new: list[str], from_scratch: bool
) -> str:
    """A hash of what fine-tuning starts from: structure, tokenizer, and the encoder's weights but new ones.

    The head is left out: it would make one model another for each number of labels.
    """
    config = {k: v for k, v in model.config.to_diff_dict().items() if k not in NOT_STRUCTURE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    digest.update(tokenizer_fingerprint(tokenizer).encode())
    body = model.base_model_prefix
    for name, tensor in sorted(getattr(model, body, model).state_dict().items()):
        if f"{body}.{name}" not in new and not from_scratch:
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:16]


# Of a configuration: what does not decide what the encoder computes.
NOT_STRUCTURE = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "transformers_version",
}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the tables and bars of loading: what is new is listed by ourselves."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()  # it tells of every retry
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
