"""What the losses so far say about a run: plateau, divergence, over-fitting, and what usually causes each."""

from typing import Any


class Diverged(RuntimeError):
    """A run ended because its loss was no number: a result, not a mistake; exit code 3."""


# A loss that is not this far (nats) below the unigram cross-entropy has learned word frequencies, no context.
LEARNED = 0.1
# A validation loss this far (nats) above its lowest value rises.
RISE = 0.2
# A plateau is one from this update on, at the latest: BERT-base has left it by then.
PATIENCE = 10_000

CAUSES = {
    "plateau": (
        "the loss is no better than that of a model that knows word frequencies only. Known causes: a "
        "learning rate that is too high, Post-LN without warmup_steps (or with too few), a batch that is too "
        "small, duplicated or shuffled lines in the corpus, a tokenizer that does not suit it; or more "
        "updates are needed"
    ),
    "diverged": (
        "the loss rises or is no number. Known causes: a learning rate that is too high, too few "
        "warmup_steps (Post-LN above all), no gradient clipping (max_grad_norm 0)"
    ),
    "over-fitting": (
        "the validation loss rises while the training loss does not. Known causes: many epochs over little "
        "text, no dropout, validation text of another kind"
    ),
}


def diagnose(
    lines: list[dict[str, Any]], unigram_cross_entropy: float, max_steps: int, warmup_steps: int
) -> str | None:
    """Judge a run at its last validation by the lines of its metrics.jsonl.

    - `diverged`: a validation loss was no finite number (null), or it is `RISE` above its lowest value and
      the training loss rose with it. (A null in a training line is a skipped update, which a run survives.)
    - `over-fitting`: the validation loss is `RISE` above its lowest value; the training loss did not rise.
    - `plateau`: the validation loss is not `LEARNED` below the unigram cross-entropy after a quarter of the
      updates, or after `PATIENCE` where that is less, and not before the warm-up has ended.

    Returns:
        A key of `CAUSES`, or None.
    """
    validations = [line for line in lines if "validation_loss" in line]
    if any(line["validation_loss"] is None for line in validations):
        return "diverged"
    if not validations:
        return None
    last, lowest = validations[-1], min(validations, key=lambda line: line["validation_loss"])
    if last["validation_loss"] > lowest["validation_loss"] + RISE:
        return _rising(lines, lowest["step"])
    patience = max(warmup_steps, min(max_steps // 4, PATIENCE))
    learned = last["validation_loss"] < unigram_cross_entropy - LEARNED
    return "plateau" if last["step"] > patience and not learned else None


def _rising(lines: list[dict[str, Any]], lowest: int) -> str | None:
    """Why the validation loss rises since update `lowest`; None before a training line can tell."""
    losses = [(line["step"], line["train_loss"]) for line in lines if line.get("train_loss") is not None]
    since = [loss for step, loss in losses if step > lowest]
    before = [loss for step, loss in losses if step <= lowest]
    if not since:
        return None
    rose = not before or sum(since) / len(since) > before[-1]
    return "diverged" if rose else "over-fitting"


def last_diagnosis(lines: list[dict[str, Any]]) -> tuple[str | None, int | None]:
    """What the last notice among the lines says, and the update at which it was written; (None, None)."""
    notices = [line for line in lines if "diagnosis" in line]
    if not notices or notices[-1]["diagnosis"] is None:
        return None, None
    return notices[-1]["diagnosis"], notices[-1]["step"]
