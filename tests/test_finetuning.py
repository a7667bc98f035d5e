"""One run of fine-tuning beside a loop that pads nothing, batches nothing and knows nothing of it."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score
from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup

from glue_eval import finetuning
from glue_eval.arguments import Setting, build_glue_arguments
from glue_eval.encoding import training_batches
from glue_eval.evaluation import plan_jobs, read_data
from glue_eval.finetuning import FineTuning, finetune
from glue_eval.models import find_sources, inspect_model
from glue_eval.tasks import TASKS
from tests.glue_made_up import small_tokenizer, write_model_folder, write_task

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CPU = torch.device("cpu")


@pytest.fixture
def plan(tmp_path):
    """Makes the jobs of options on made-up data; also gives the data."""

    def make(task="mrpc", model=None, **options):
        model = model or write_model_folder(tmp_path / "model", **NO_DROPOUT)
        for name in task.split(","):
            splits = [*TASKS[name].rows] if "submission" in options else None
            write_task(tmp_path / "data", name, splits)
        values = {"task": task, "data_dir": str(tmp_path / "data"), "model_name_or_path": str(model)}
        values |= {"cache_dir": str(tmp_path / "cache"), "allow_other_sizes": True, "seeds": 1, "bf16": False}
        args = build_glue_arguments({"learning_rate": 1e-3, "max_seq_length": 64} | values | options)
        data = read_data(args)
        models = [inspect_model(source, args.tasks[0], 64) for source in find_sources(args)]
        return plan_jobs(args, models, data, bf16=bool(args.bf16)), data

    return make


def one_by_one(job, examples):
    """The same training: every example alone, unpadded; stock schedule; AdamW from its formula in torch."""
    torch.manual_seed(job.seed)
    regression = job.task.is_regression
    model = AutoModelForSequenceClassification.from_pretrained(
        job.model.source.path, num_labels=job.task.num_labels, dtype=torch.float32
    )
    decayed = [p for name, p in model.named_parameters() if "LayerNorm" not in name and "bias" not in name]
    decayed = [p for p in decayed if p.dim() > 1]
    rest = [p for p in model.parameters() if not any(p is other for other in decayed)]
    setting, train = job.setting, examples["train"]
    groups = [
        {"params": decayed, "weight_decay": setting.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=setting.learning_rate, eps=1e-6)
    cut = {"truncation": True, "max_length": 64}
    encoded = small_tokenizer()(train.first, train.second, **cut)
    lengths = np.array([len(ids) for ids in encoded["input_ids"]])
    updates = setting.num_train_epochs * math.ceil(len(lengths) / setting.train_batch_size)
    # Ours gives the first update 1/warmup of the rate, the stock schedule 0.
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, updates)

    def forward(rows, i):
        pair = (rows.first[i], rows.second[i]) if rows.second else (rows.first[i],)
        return model(**small_tokenizer()(*pair, return_tensors="pt", **cut)).logits[0]

    for epoch in range(setting.num_train_epochs):
        model.train()
        for batch in training_batches(lengths, setting.train_batch_size, job.seed, epoch):
            logits = torch.stack([forward(train, i) for i in batch])
            labels = torch.tensor(train.labels[batch])
            if regression:
                loss = ((logits[:, 0] - labels) ** 2).mean()
            else:
                loss = -torch.log_softmax(logits, -1)[torch.arange(len(batch)), labels].mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), setting.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        rows = examples["validation"]
        return model, torch.stack([forward(rows, i) for i in range(len(rows))])


@pytest.mark.parametrize("task", ["cola", "mrpc", "stsb"])
def test_a_run_is_that_of_a_plain_loop(plan, task):
    (job,), data = plan(task, warmup_steps=0, num_train_epochs=2, train_batch_size=7)
    outcome = finetune(job, CPU)
    model, logits = one_by_one(job, data[task].examples)
    for (name, ours), theirs in zip(outcome.model.named_parameters(), model.parameters()):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3, msg=name)
    labels = data[task].examples["validation"].labels
    if task == "stsb":
        loss = ((logits[:, 0].numpy() - labels) ** 2).mean()
        assert outcome.result["pearson"] == pytest.approx(np.corrcoef(logits[:, 0], labels)[0, 1], abs=1e-3)
    else:
        loss = float(torch.nn.CrossEntropyLoss()(logits, torch.tensor(labels)))
    assert outcome.result["validation_loss"] == pytest.approx(float(loss), rel=1e-3)
    assert outcome.result["validation_examples"] == 40
    if task == "mrpc":
        predicted = logits.argmax(-1).numpy()
        assert outcome.result["accuracy"] == accuracy_score(labels, predicted)
        assert outcome.result["f1"] == f1_score(labels, predicted)


def test_a_run_is_reproducible_bit_for_bit_whatever_ran_before(plan, tmp_path):
    model = write_model_folder(tmp_path / "model")  # with dropout
    (one, two), _ = plan(model=model, seeds=2)
    first = finetune(one, CPU)
    other = finetune(two, CPU)
    again = finetune(one, CPU)
    for a, b in zip(first.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b)
    assert first.result["epochs"] == again.result["epochs"]
    assert first.result["epochs"] != other.result["epochs"]


def test_the_learning_rate_warms_up_and_falls_to_zero(plan, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *args: (rates.append(self.param_groups[0]["lr"]), step(self, *args))[1],
    )
    (job,), _ = plan(num_train_epochs=2, train_batch_size=12, warmup_steps=0.25, learning_rate=0.4e-3)
    finetune(job, CPU)
    warmup = [1e-4, 2e-4, 3e-4, 4e-4]
    assert rates == pytest.approx(warmup + [4e-4 * (16 - k) / 12 for k in range(4, 16)])


def test_the_best_epoch_is_reported_where_asked_and_its_model_kept(plan, monkeypatch):
    weights, scores = [], iter([0.1, 0.9, 0.3, 0.5] * 2)
    score = FineTuning.score

    def scripted(self):
        weights.append(self.model.classifier.weight.detach().clone())
        return score(self) | {"score": next(scores)}

    monkeypatch.setattr(FineTuning, "score", scripted)
    (job,), _ = plan(num_train_epochs=4, load_best_model_at_end=True)
    best = finetune(job, CPU)
    assert (best.result["epoch"], best.result["score"]) == (2, 0.9)
    assert torch.equal(best.model.classifier.weight, weights[1])
    (job,), _ = plan(num_train_epochs=4)
    last = finetune(job, CPU)
    assert (last.result["epoch"], last.result["score"]) == (4, 0.5)
    assert torch.equal(last.model.classifier.weight, weights[-1])
    assert not torch.equal(weights[1], weights[-1])


def test_a_run_that_diverges_is_a_result(plan):
    (job,), _ = plan(learning_rate=1e30, max_grad_norm=0, warmup_steps=0)
    result = finetune(job, CPU).result
    assert result["diverged"] and result["degenerate"]
    assert math.isnan(result["f1"]) and math.isnan(result["score"])


def test_one_predicted_class_is_degenerate(plan, monkeypatch):
    """Whatever the input, a large bias decides; at learning rate 0 it stays."""
    load = finetuning.load_classifier

    def biased(*args):
        model = load(*args)
        with torch.no_grad():
            model.classifier.bias[1] = 100
        return model

    (job,), data = plan(learning_rate=0.0)
    monkeypatch.setattr(finetuning, "load_classifier", biased)
    result = finetune(job, CPU).result
    assert result["degenerate"] and not result["diverged"]
    assert result["accuracy"] == data["mrpc"].examples["validation"].labels.mean()


def test_weights_that_are_no_number_after_the_last_update_are_divergence(plan, monkeypatch):
    (job,), _ = plan(num_train_epochs=2)
    step, done = torch.optim.AdamW.step, []

    def broken(self, *args):
        step(self, *args)
        done.append(1)
        if len(done) == 6:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(math.nan)

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    result = finetune(job, CPU).result
    assert result["diverged"] and [epoch["epoch"] for epoch in result["epochs"]] == [1]


def test_both_parts_of_mnli_are_scored_and_the_diagnostic_set_predicted(plan):
    (job,), data = plan("ax,mnli", submission="out", num_train_epochs=1)
    outcome = finetune(job, CPU)
    assert outcome.result["validation_examples"] == 40 + 24
    assert {"accuracy", "accuracy_mm"} <= outcome.result.keys()
    predicted = {name: len(rows) for name, rows in outcome.predictions.items() if rows.ndim}
    names = ("mnli/test_matched", "mnli/test_mismatched", "ax/test")
    assert predicted == {name + end: 17 for name in names for end in ("", "/idx")}
    assert set(outcome.predictions["ax/test"].tolist()) <= {0, 1, 2}


def test_bf16_trains_float32_weights_nearly_alike(plan):
    (exact,), _ = plan(num_train_epochs=1)
    (rough,), _ = plan(num_train_epochs=1, bf16=True)
    a, b = finetune(exact, CPU), finetune(rough, CPU)
    assert {p.dtype for p in b.model.parameters()} == {torch.float32}
    assert 0 < abs(a.result["validation_loss"] - b.result["validation_loss"]) < 0.05


def test_settings_are_told_apart(plan):
    jobs, _ = plan(grid={"learning_rate": [1e-3, 2e-3], "num_train_epochs": [1]}, seeds=2)
    assert [(job.setting.learning_rate, job.seed) for job in jobs] == [
        (1e-3, 1), (1e-3, 2), (2e-3, 1), (2e-3, 2),
    ]  # fmt: skip
    assert all(isinstance(job.setting, Setting) for job in jobs)
