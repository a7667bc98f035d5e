"""The length and the batch as data: a table of stages, and which of its rows an update belongs to."""

from dataclasses import dataclass
from typing import Any

from bert_ln import BertLnConfig
from recipes.arguments import PretrainingArguments, nearest
from recipes.errors import UserError


@dataclass(frozen=True)
class Stage:
    """Some updates with one block length and one batch."""

    number: int
    first_step: int
    """Updates done before this stage."""
    steps: int
    max_seq_length: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int

    def global_batch_size(self, num_processes: int) -> int:
        """Blocks in one update."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * num_processes

    def tokens_per_update(self, num_processes: int) -> int:
        """Tokens in one update."""
        return self.global_batch_size(num_processes) * self.max_seq_length


OPTIONAL = ("max_seq_length", "per_device_train_batch_size", "gradient_accumulation_steps")


def build_stages(args: PretrainingArguments) -> list[Stage]:
    """The table of `args.stages`, or one stage of `max_steps` updates.

    A row takes what it leaves out from the options of the same name.

    Raises:
        UserError: unknown or missing key, a number below 1, steps that do not add up to max_steps, or a
            length that does not suit the model or the masking.
    """
    rows = args.stages or [{"steps": args.max_steps}]
    stages, first_step = [], 0
    for number, row in enumerate(rows):
        _check_row(number, row)
        values = {name: row.get(name, getattr(args, name)) for name in OPTIONAL}
        stages.append(Stage(number, first_step, row["steps"], **values))
        first_step += row["steps"]
    if first_step != args.max_steps:
        raise UserError(f"stages: their steps add up to {first_step}, but max_steps is {args.max_steps}")
    for length in block_lengths(args, stages):
        _check_length(length, args)
    return stages


def block_lengths(args: PretrainingArguments, stages: list[Stage]) -> set[int]:
    """Every block length of the run; validation has that of `max_seq_length`."""
    return {args.max_seq_length, *(stage.max_seq_length for stage in stages)}


def _check_length(length: int, args: PretrainingArguments) -> None:
    positions = args.model.get("max_position_embeddings", BertLnConfig.max_position_embeddings)
    if length < 8:
        raise UserError(f"max_seq_length {length}: must be at least 8")
    if length > positions:
        raise UserError(f"max_seq_length {length}: the model has max_position_embeddings {positions}")
    if round(args.mlm_probability * (length - 2)) < 1:
        raise UserError(
            f"mlm_probability {args.mlm_probability}: selects no token of a block of {length}; give more"
        )


def _check_row(number: int, row: Any) -> None:
    if not isinstance(row, dict):
        raise UserError(f"stages[{number}] {row!r}: must be a table with {', '.join(('steps', *OPTIONAL))}")
    for key in row:
        if key not in ("steps", *OPTIONAL):
            raise UserError(f"stages[{number}].{key}: unknown; {nearest(str(key), ('steps', *OPTIONAL))}")
    if "steps" not in row:
        raise UserError(f"stages[{number}]: steps is missing")
    for key, value in row.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"stages[{number}].{key} {value!r}: must be an integer of at least 1")


def stage_at(stages: list[Stage], step: int) -> Stage:
    """The stage of update number `step` (counted from 0)."""
    return next(stage for stage in reversed(stages) if stage.first_step <= step)


def remaining_tokens(stages: list[Stage], num_processes: int, step: int) -> int:
    """Tokens of all updates after the first `step`."""
    steps = [min(stage.steps, max(0, stage.first_step + stage.steps - step)) for stage in stages]
    return sum(n * stage.tokens_per_update(num_processes) for n, stage in zip(steps, stages, strict=True))
