"""Folders of runs as pre-training leaves them, with made-up curves."""

import json
from pathlib import Path

import numpy as np

from recipes.study import Arm, Study

UNIGRAM = 7.0
FINGERPRINTS = {"corpus_fingerprints": ["c0ffee"], "tokenizer_fingerprint": "7ea", "mask_fingerprint": "abc"}


def write_run(folder, seed=0, losses=(), finished=True, diagnosis=None, fingerprints=FINGERPRINTS, **options):
    """A run validated every 100 updates with these losses (None: no number), 10 updates a second."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    model = {"norm_placement": options.pop("norm_placement", "pre")}
    losses = [None if loss is None else float(loss) for loss in losses]
    steps = [100 * (i + 1) for i in range(len(losses))]
    lines = []
    for step, loss in zip(steps, losses):
        lines.append(_train_line(step, loss, options.get("learning_rate", 1e-4)))
        lines.append(
            {"step": step, "validation_loss": loss, "mask_fingerprint": fingerprints["mask_fingerprint"]}
        )
    if diagnosis:
        lines.append({"step": steps[-1], "diagnosis": diagnosis})
    record = {
        "options": {"seed": seed, "output_dir": str(folder), **options, "model": model},
        "updates": [{"steps": 1000, "max_seq_length": 64, "global_batch_size": 16}],
        "versions": {"torch": "2.13.0"},
        "unigram_cross_entropy": UNIGRAM,
        **fingerprints,
    }
    if finished:
        record["results"] = {
            "step": steps[-1],
            "validation_loss": losses[-1],
            "tokens_seen": steps[-1] * 1024,
            "elapsed_seconds": steps[-1] / 10,
            "diagnosis": diagnosis,
            "diagnosis_step": steps[-1] if diagnosis else None,
        }
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _train_line(step, loss, learning_rate):
    return {
        "step": step,
        "train_loss": loss,
        "learning_rate": learning_rate * (1 - step / 4000),
        "grad_norm": 1.5 + step / 1000,
        "tokens_seen": step * 1024,
        "elapsed_seconds": step / 10,
    }


def curve(end, n=10, start=8.0):
    """Losses that fall from near `start` to `end`."""
    progress = np.arange(1, n + 1) / n
    return end + (start - end) * (1 - progress) ** 2


def make_study(folder, arms, seeds, max_steps=1000):
    """A study of arms {label: options}; its runs are to be written."""
    base = {"max_steps": max_steps, "per_device_train_batch_size": 16, "max_seq_length": 64}
    arms = [Arm(label.replace(" ", "="), label, options) for label, options in arms.items()]
    return Study("made_up", folder, base, arms, list(seeds))
