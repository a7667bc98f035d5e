"""One run of fine-tuning: a model, a task, a setting and a seed become scores."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from glue_eval.arguments import Setting
from glue_eval.encoding import Encoded, collate, evaluation_batches, load_split, training_batches
from glue_eval.models import Model, load_classifier
from glue_eval.scores import headline, is_degenerate, task_scores
from glue_eval.tasks import Task
from recipes.arguments import OptimizationArguments
from recipes.optimization import build_optimizer, learning_rate_at

FORMAT = 1


@dataclass(frozen=True)
class Job:
    """What one run is."""

    task: Task
    model: Model
    setting: Setting
    seed: int
    data: Path
    """Folder of the tokenised task."""
    train_examples: int
    """Rows of its training split."""
    bf16: bool
    load_best_model_at_end: bool = False
    predicted: dict[str, Path] = field(default_factory=dict)
    """Splits to predict, as TASK/SPLIT, and the folders of the tokenised tasks."""


@dataclass
class Outcome:
    """What a run leaves: its result, predictions of unlabelled splits, and the model."""

    result: dict[str, Any]
    predictions: dict[str, np.ndarray]
    model: PreTrainedModel


def finetune(job: Job, device: torch.device, advance: Callable[[int], None] = lambda rows: None) -> Outcome:
    """Train on the training split, score every epoch on all of the validation split.

    The result depends on the job, on nothing that ran before; on CPU to the last bit, for the same number of
    threads.

    Args:
        job: What to run.
        device: Where.
        advance: Told how many training examples are done since it was last called.
    """
    run = FineTuning(job, device)
    epochs, best, weights = [], None, {}
    for epoch in range(job.setting.num_train_epochs):
        train_loss = run.train(epoch, advance)
        scores = run.score()
        if not (math.isfinite(train_loss) and math.isfinite(scores["validation_loss"])):
            return Outcome(_describe(job, device) | _diverged(job.task, epoch + 1, epochs), {}, run.model)
        epochs.append({"epoch": epoch + 1, "train_loss": train_loss} | scores)
        if job.load_best_model_at_end and (best is None or _is_better(epochs[-1], best)):
            best, weights = epochs[-1], {k: v.clone() for k, v in run.model.state_dict().items()}
    if best:
        run.model.load_state_dict(weights)
    speed = {"examples_per_second": len(epochs) * len(run.train_split) / run.seconds}
    result = _describe(job, device) | (best or epochs[-1]) | {"diverged": False, "epochs": epochs} | speed
    return Outcome(result, run.predict_unlabelled(), run.model)


class FineTuning:
    """A model in training on a task."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job, self.device = job, device
        self.model = load_classifier(job.model.source, job.task, job.seed).to(device)
        self.train_split = load_split(job.data, "train")
        self.validation = {split: load_split(job.data, split) for split in job.task.validation}
        self.optimization = _optimization(job.setting, len(self.train_split))
        self.optimizer = build_optimizer(self.model, self.optimization)
        self.step = 0
        self.seconds = 0.0
        """Of training, without scoring."""

    def train(self, epoch: int, advance: Callable[[int], None]) -> float:
        """One pass over the training split; returns its mean loss."""
        begun, loss = time.perf_counter(), torch.zeros((), device=self.device)
        lengths, job = self.train_split.lengths, self.job
        self.model.train()
        for rows in training_batches(lengths, job.setting.train_batch_size, job.seed, epoch):
            self._set_learning_rate()
            loss += len(rows) * self._update(rows)
            advance(len(rows))
        mean = float(loss) / len(self.train_split)
        self.seconds += time.perf_counter() - begun
        return mean

    def _set_learning_rate(self) -> None:
        self.step += 1
        rate = learning_rate_at(self.step, self.optimization, self.optimization.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _update(self, rows: np.ndarray) -> torch.Tensor:
        """One update; returns the mean loss of the batch, still on the device."""
        batch = self._collate(self.train_split, rows)
        labels = torch.from_numpy(self.train_split.labels[rows]).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.job.bf16):
            logits = self.model(**batch).logits
        loss = _losses(self.job.task, logits.float(), labels).mean()
        loss.backward()
        if limit := self.optimization.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _collate(self, split: Encoded, rows: np.ndarray) -> dict[str, torch.Tensor]:
        model = self.job.model
        return collate(split, rows, model.pad_id, model.pad_left, self.device)

    def score(self) -> dict[str, Any]:
        """Loss and metrics over all examples of the validation splits."""
        task, splits = self.job.task, self.validation
        outputs = {name: self._logits(split) for name, split in splits.items()}
        predicted = {name: _predictions(task, logits) for name, logits in outputs.items()}
        losses = [_losses(task, outputs[n], torch.from_numpy(s.labels)).double() for n, s in splits.items()]
        scores = task_scores(task, {name: (predicted[name], split.labels) for name, split in splits.items()})
        return {
            **scores,
            "score": headline(task, scores),
            "validation_loss": float(torch.cat(losses).mean()),
            "degenerate": is_degenerate(task, np.concatenate(list(predicted.values()))),
            "validation_examples": sum(map(len, splits.values())),
        }

    def predict_unlabelled(self) -> dict[str, np.ndarray]:
        """Predictions, row numbers and what identifies the data, of the splits that the job names."""
        arrays = {}
        for name, folder in self.job.predicted.items():
            split = load_split(folder, name.rpartition("/")[2])
            arrays[name] = _predictions(self.job.task, self._logits(split))
            arrays[f"{name}/idx"] = split.idx
            arrays[f"{name}/data"] = np.array(folder.name)
        return arrays

    def _logits(self, split: Encoded) -> torch.Tensor:
        """Outputs for every example in its place, float32 [examples, labels], on the CPU."""
        self.model.eval()
        outputs = torch.empty(len(split), self.job.task.num_labels)
        with torch.inference_mode():
            for rows in evaluation_batches(split.lengths):
                batch = self._collate(split, rows)
                outputs[rows] = self.model(**batch).logits.float().cpu()
        return outputs


def _optimization(setting: Setting, examples: int) -> OptimizationArguments:
    """The setting for the optimiser: AdamW, linear warm-up and decay (Devlin et al. 2019, A.2)."""
    updates = setting.num_train_epochs * math.ceil(examples / setting.train_batch_size)
    share = setting.warmup_steps < 1
    warmup = math.ceil(updates * setting.warmup_steps) if share else round(setting.warmup_steps)
    return OptimizationArguments(
        learning_rate=setting.learning_rate,
        max_steps=updates,
        warmup_steps=min(warmup, updates - 1),
        weight_decay=setting.weight_decay,
        max_grad_norm=setting.max_grad_norm,
    )


def _losses(task: Task, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Loss of each example, [batch]: cross-entropy in nats, or squared error for a regression."""
    if task.is_regression:
        return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


def _predictions(task: Task, logits: torch.Tensor) -> np.ndarray:
    return (logits.squeeze(-1) if task.is_regression else logits.argmax(-1)).numpy()


def _is_better(one: dict[str, Any], other: dict[str, Any]) -> bool:
    # A score that is not defined is worse than any other.
    return math.isnan(other["score"]) or one["score"] > other["score"]


def _describe(job: Job, device: torch.device) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "task": job.task.name,
        "model": job.model.to_dict(),
        "setting": asdict(job.setting),
        "seed": job.seed,
        "max_length": job.model.max_length,
        "load_best_model_at_end": job.load_best_model_at_end,
        "bf16": job.bf16,
        "device": device.type,
        "threads": torch.get_num_threads(),
    }


def _diverged(task: Task, epoch: int, epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The result of a run whose loss is no number: that is one, too. `epochs` are those before it."""
    unknown = dict.fromkeys((*task.metrics, "score", "validation_loss"), math.nan)
    return unknown | {"epoch": epoch, "diverged": True, "degenerate": True, "epochs": epochs}
