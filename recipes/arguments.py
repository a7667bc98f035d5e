"""Every option of pre-training: a dataclass, its defaults, and which values are allowed.

Each field's docstring is its `--help`. Names are those of `transformers.TrainingArguments` and of the stock
examples wherever these have the option.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import BertConfig

from bert_ln import BertLnConfig
from recipes.errors import UserError

# What follows from the tokenizer, from the task (an encoder), or is set by the loop is no option.
NOT_MODEL_OPTIONS = {
    "add_cross_attention",
    "bos_token_id",
    "eos_token_id",
    "is_decoder",
    "pad_token_id",
    "sparse_prediction",
    "use_cache",
    "vocab_size",
}
MODEL_OPTIONS = {
    name: annotation
    for config_class in (BertConfig, BertLnConfig)
    for name, annotation in config_class.__annotations__.items()
    if name not in NOT_MODEL_OPTIONS
}


# What a value must satisfy, and the words that say so.
Check = tuple[Callable[[Any], bool], str]


@dataclass(kw_only=True)
class DataArguments:
    """Where text comes from and how it becomes blocks of token ids."""

    dataset_name: str | None = None
    """Dataset on the Hub with its namespace, such as Salesforce/wikitext; None takes train_file or the
    embedded corpus."""
    dataset_config_name: str | None = None
    """Configuration of the Hub dataset, such as 20231101.en."""
    dataset_split: str = "train"
    """Split of the Hub dataset that is trained on; its split `validation`, where it has one, validates."""
    streaming: bool = False
    """Read the Hub dataset as a stream; no more than the run needs is read and stored."""
    train_file: str | None = None
    """Training text: file, folder or glob of .txt, .jsonl, .parquet or .csv."""
    validation_file: str | None = None
    """Validation text, likewise; without it documents are set aside from the training corpus."""
    corpora: list[dict[str, Any]] | None = None
    """Several corpora: a list of {dataset_name | train_file, ..., weight}; weight = passes per epoch
    (default 1)."""
    text_column_name: str = "text"
    """Column that holds the text of a document in .jsonl, .parquet, .csv and Hub datasets."""
    sample_by: str | None = None
    """What a document is in .txt: document (a file), paragraph (up to a blank line) or line; None:
    document where there are several files, else paragraph."""
    validation_split_percentage: float | None = None
    """Share of the documents set aside for validation; None: 0.5 (199:1), but at least 20 documents and
    50,000 words."""
    token_store: str | None = None
    """Folder of a finished token store, which brings its tokenizer: no corpus is read."""
    tokenizer_name: str | None = None
    """Tokenizer to load (folder or Hub id); None trains a WordPiece tokenizer on the training text."""
    vocab_size: int | None = None
    """Size of the vocabulary to train (None: 30522); with a loaded tokenizer, rows of the model's embedding
    (None: the tokenizer's size)."""
    do_lower_case: bool = True
    """Lower-case the text, when a tokenizer is trained."""
    max_unk_rate: float = 0.01
    """Largest share of [UNK] among the tokens of the corpus."""
    max_seq_length: int = 512
    """Tokens in a block, [CLS] and [SEP] included."""
    cache_dir: str = "output/cache"
    """Where tokenizers and token stores are kept for the next run."""


@dataclass(kw_only=True)
class MaskingArguments:
    """Which tokens are hidden from the model."""

    mlm_probability: float = 0.15
    """Share of the tokens that is selected for prediction."""
    masking_unit: str = "token"
    """What is selected together: token, whole_word or span."""
    mask_replace_prob: float = 0.8
    """Share of the selected tokens that becomes [MASK]."""
    random_replace_prob: float = 0.1
    """Share of the selected tokens that becomes a random token; the rest stays as it is."""
    isolate_documents: bool = False
    """Attend only within a document where a block holds several."""


@dataclass(kw_only=True)
class OptimizationArguments:
    """How weights change: the names are those of transformers.TrainingArguments."""

    max_steps: int = 1_000_000
    """Updates."""
    per_device_train_batch_size: int = 32
    """Blocks in a micro-batch of one process."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of an update."""
    stages: list[dict[str, Any]] | None = None
    """Table of {steps, max_seq_length, per_device_train_batch_size, gradient_accumulation_steps} one
    after the other, such as 128 then 512."""
    optim: str = "adamw_torch_fused"
    """Optimiser: adamw_torch, adamw_torch_fused, muon (for matrices; fused AdamW for the rest, at the same
    learning rate), radam or sgd (without momentum; its decay is not decoupled)."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    lr_scheduler_type: str = "linear"
    """linear, constant, constant_with_warmup, cosine, inverse_sqrt or warmup_stable_decay."""
    lr_scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """num_decay_steps (default a tenth of max_steps) and min_lr_ratio of warmup_stable_decay."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises linearly to its peak; Post-LN needs them, Pre-LN does
    not."""
    weight_decay: float = 0.01
    """Decoupled decay, not on norms and biases."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_epsilon: float = 1e-6
    """Added to the root of the second moment; 1e-6 as in BERT."""
    max_grad_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches it off."""


@dataclass(kw_only=True)
class RunArguments:
    """How the run is carried out, watched and kept."""

    output_dir: str = "output/pretrain"
    """Folder of the run."""
    seed: int = 42
    """Seed of weights, order, masks and dropout."""
    num_processes: int | None = None
    """Processes that the run must have got; None takes what there is."""
    bf16: bool | None = None
    """bfloat16 autocast with float32 parameters; None: where the hardware multiplies bfloat16."""
    torch_compile: bool = False
    """Compile the model."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2 or flex_attention; None lets transformers choose."""
    dataloader_num_workers: int = 0
    """Processes that prepare batches; the batches do not depend on it."""
    logging_steps: int = 50
    """Updates between two training lines."""
    eval_steps: int = 1000
    """Updates between two validations; the last update is always validated."""
    per_device_eval_batch_size: int = 32
    """Blocks in a validation batch; the value does not depend on it."""
    max_eval_samples: int | None = None
    """Validate on that many blocks, spread evenly over the validation text; None takes all."""
    save_steps: int = 1000
    """Updates between two checkpoints; the last update is always kept."""
    save_total_limit: int | None = None
    """Newest checkpoints to keep; None keeps all."""
    resume_from_checkpoint: str | bool | None = None
    """Checkpoint to continue from: a folder, or hub:REPO[@REVISION]; without a value the newest complete one
    of output_dir."""
    max_train_time: float | None = None
    """Minutes after which the program saves a checkpoint and stops; the same command continues."""
    nonfinite_update: str = "skip"
    """What happens to an update whose loss or gradient is not finite: skip; rollback to the newest
    checkpoint and go on with other data; stop."""
    max_nonfinite_updates: int = 10
    """So many such updates are borne in a run; at one more it has diverged."""
    ddp_timeout: int = 1800
    """Seconds after which a process that does not answer is given up, and the others stop."""
    report_to: str = "none"
    """Tracker through Accelerate: none, tensorboard, trackio or wandb."""


@dataclass(kw_only=True)
class HubArguments:
    """What is pushed to the Hub, and when; the token is that of `hf auth login` or of HF_TOKEN."""

    push_to_hub: bool = False
    """Push the model to the Hub while it is trained, in the background."""
    hub_model_id: str | None = None
    """Repository, with or without its namespace; None: the name of output_dir."""
    hub_private_repo: bool | None = None
    """Make a repository that does not exist yet private; None: as its namespace has it."""
    hub_strategy: str = "every_save"
    """end: the final model; every_save: the model of each checkpoint; checkpoint: the trainer's state too,
    in last-checkpoint/; all_checkpoints: likewise, every one in checkpoint-STEP/."""
    hub_min_interval: float = 120.0
    """Seconds from one push to the next; the Hub allows 128 commits an hour."""
    hub_exit_timeout: float = 300.0
    """Longest wait in seconds for the last push when training has ended; what is left stays queued."""
    data_license: str | None = None
    """Licence of the training text, as the model card shall state it."""


@dataclass(kw_only=True)
class PretrainingArguments(
    DataArguments, MaskingArguments, OptimizationArguments, RunArguments, HubArguments
):
    """All options; `model` holds those that are fields of `BertLnConfig`."""

    model: dict[str, Any] = field(default_factory=dict)
    """Fields of BertLnConfig."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for run.json."""
        return asdict(self)


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The hint of an error message: the nearest allowed name, or all of them where there are few."""
    allowed = sorted(allowed)
    close = difflib.get_close_matches(name, allowed, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"allowed: {', '.join(allowed)}" if len(allowed) < 20 else "see --help"


def at_least(low: float) -> Check:
    """The check of a finite number."""
    return lambda value: low <= value < math.inf, f"must be at least {low}"


def between(low: float, high: float) -> Check:
    """The check of a number with both bounds."""
    return lambda value: low <= value <= high, f"must be between {low} and {high}"


def _one_of(*allowed: str) -> Check:
    return lambda value: value in allowed, f"allowed: {', '.join(allowed)}"


_SHARE = between(0, 1)
_DECAY = lambda value: 0 <= value < 1, "must be at least 0 and less than 1"

# What each option's value must satisfy, where it is not None; and how to say so.
CHECKS: dict[str, Check] = {
    "vocab_size": between(1, 10**8),
    "max_steps": at_least(1),
    "per_device_train_batch_size": at_least(1),
    "per_device_eval_batch_size": at_least(1),
    "gradient_accumulation_steps": at_least(1),
    "logging_steps": at_least(1),
    "eval_steps": at_least(1),
    "save_steps": at_least(1),
    "save_total_limit": at_least(1),
    "max_eval_samples": at_least(1),
    "num_processes": at_least(1),
    "max_train_time": at_least(0),
    "max_nonfinite_updates": at_least(0),
    "ddp_timeout": at_least(1),
    "seed": (lambda value: 0 <= value < 2**32, "must be at least 0 and less than 2**32"),
    "warmup_steps": at_least(0),
    "learning_rate": at_least(0),
    "weight_decay": at_least(0),
    "adam_epsilon": at_least(0),
    "max_grad_norm": at_least(0),
    "hub_min_interval": at_least(0),
    "hub_exit_timeout": at_least(0),
    "dataloader_num_workers": between(0, 1024),
    "mlm_probability": (lambda value: 0 < value < 1, "must be more than 0 and less than 1"),
    "mask_replace_prob": _SHARE,
    "random_replace_prob": _SHARE,
    "max_unk_rate": _SHARE,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "masking_unit": _one_of("token", "whole_word", "span"),
    "optim": _one_of("adamw_torch", "adamw_torch_fused", "muon", "radam", "sgd"),
    "lr_scheduler_type": _one_of(
        "linear", "constant", "constant_with_warmup", "cosine", "inverse_sqrt", "warmup_stable_decay"
    ),
    "hub_strategy": _one_of("end", "every_save", "checkpoint", "all_checkpoints"),
    "nonfinite_update": _one_of("skip", "rollback", "stop"),
    "report_to": _one_of("none", "tensorboard", "trackio", "wandb"),
    "attn_implementation": _one_of("eager", "sdpa", "flex_attention"),
}
SCHEDULER_CHECKS: dict[str, dict[str, Check]] = {
    "warmup_stable_decay": {"num_decay_steps": at_least(1), "min_lr_ratio": _SHARE},
}
# What names a file, a folder or something on the Hub, and the most bytes of a name between two slashes.
NAMES = (
    "cache_dir",
    "dataset_name",
    "output_dir",
    "resume_from_checkpoint",
    "token_store",
    "tokenizer_name",
    "train_file",
    "validation_file",
)
LONGEST_NAME = 255
# A token store brings its text and its tokenizer.
NOT_WITH_TOKEN_STORE = (
    "dataset_name",
    "dataset_config_name",
    "streaming",
    "train_file",
    "validation_file",
    "corpora",
    "sample_by",
    "validation_split_percentage",
    "tokenizer_name",
)


def check_arguments(args: PretrainingArguments) -> None:
    """Refuse values that cannot work, before anything is read or built.

    Raises:
        UserError: Names the option, its value and what is allowed.
    """
    for name, check in CHECKS.items():
        check_value(name, getattr(args, name), check)
    for name, value in args.lr_scheduler_kwargs.items():
        allowed = SCHEDULER_CHECKS.get(args.lr_scheduler_type, {})
        if name not in allowed:
            hint = f"allowed for {args.lr_scheduler_type}: {', '.join(allowed) or 'nothing'}"
            raise UserError(f"lr_scheduler_kwargs.{name}: {hint}")
        check_value(f"lr_scheduler_kwargs.{name}", value, allowed[name])
    _check_plain(args)
    for name in NAMES:
        check_name(name, getattr(args, name))
    _check_together(args)
    model_config(args, vocab_size=args.vocab_size or BertLnConfig.vocab_size, pad_token_id=0)


def check_name(name: str, value: Any) -> None:
    """Raise UserError for what no file or folder can be called: nothing, for one, as of an empty variable."""
    if isinstance(value, str):
        longest = max(len(part.encode(errors="replace")) for part in value.split("/"))
        if not value or "\0" in value or longest > LONGEST_NAME:
            raise UserError(
                f"{name} {value[:60]!r}: must be a name of 1 to {LONGEST_NAME} bytes, without NUL"
            )


def _check_plain(args: PretrainingArguments) -> None:
    """Refuse what run.json cannot hold: dates, bytes, numbers that are none, tables within themselves."""
    for name, value in (vars(args) | args.model).items():
        try:
            json.dumps(value if name != "model" else None, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{name} {value!r}: {error}; give finite numbers, words, lists or tables"
            ) from None


def check_value(name: str, value: Any, check: Check) -> None:
    """Raise UserError where a value that is not None does not satisfy its check."""
    holds, words = check
    try:
        allowed = value is None or holds(value)
    except TypeError:
        allowed = False
    if not allowed:
        raise UserError(f"{name} {value!r}: {words}")


def _check_together(args: PretrainingArguments) -> None:
    if args.mask_replace_prob + args.random_replace_prob > 1:
        total = args.mask_replace_prob + args.random_replace_prob
        raise UserError(f"mask_replace_prob + random_replace_prob {total}: must be at most 1")
    if args.warmup_steps >= args.max_steps and args.warmup_steps > 0:
        raise UserError(f"warmup_steps {args.warmup_steps}: must be less than max_steps {args.max_steps}")
    if args.hub_model_id and not args.push_to_hub:
        raise UserError(f"hub_model_id {args.hub_model_id}: nothing is pushed without push_to_hub; add it")
    for name in NOT_WITH_TOKEN_STORE if args.token_store else ():
        if getattr(args, name) != PretrainingArguments.__dataclass_fields__[name].default:
            raise UserError(f"{name} {getattr(args, name)}: not together with token_store; give one")


def model_config(args: PretrainingArguments, **from_tokenizer: int) -> BertLnConfig:
    """The configuration of the model that `args` describes.

    Raises:
        UserError: A field that `BertLnConfig` refuses.
    """
    try:
        config = BertLnConfig(**args.model, **from_tokenizer)
        config.check_buildable()
    except StrictDataclassError as error:
        field = re.search(r"field '(\w+)'", str(error))
        raise UserError(f"{field[1]}: {error.__cause__}" if field else str(error)) from error
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from error
    return config
