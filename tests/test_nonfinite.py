"""Updates that are no number: skipped without a trace in the weights, gone back on, bounded, and told."""

import contextlib
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from recipes import pretraining
from recipes.batches import TrainingBatches
from recipes.diagnosis import Diverged
from recipes.pretraining import pretrain
from recipes.stopping import Stopped
from recipes.training import Trainer
from tests.conftest import metrics_of
from tests.test_stopping import signal_at
from tests.test_training import DROPOUT, digest


@pytest.fixture
def poison(monkeypatch):
    """Makes the loss no number on the data of these updates, counted from 1, whenever it comes."""

    def on(*updates):
        get, backward, seen = TrainingBatches.__getitem__, Trainer._backward, []

        def marked(self, index):
            batch = get(self, index)
            batch["input_ids"].update = index[0] + 1 + self.data_offset
            return batch

        def poisoned(self, batch, count):
            seen.append((self.state.step + 1, batch["input_ids"].update))
            return backward(self, batch, count * math.nan if seen[-1][1] in updates else count)

        monkeypatch.setattr(TrainingBatches, "__getitem__", marked)
        monkeypatch.setattr(Trainer, "_backward", poisoned)
        return seen

    return on


def lines_about(folder):
    return [line for line in metrics_of(folder) if "skipped" in line or "rolled_back_from" in line]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "radam", "sgd", "muon"])
@pytest.mark.parametrize("bad", [(1,), (5, 6)])
def test_a_skipped_update_leaves_no_trace(tiny, tmp_path, poison, monkeypatch, optim, bad):
    """Weights and moments are those of a run whose optimiser was not called there; the schedule goes on."""
    with monkeypatch.context() as patch:
        step_if = Trainer._step_if
        patch.setattr(
            Trainer, "_step_if", lambda self, ok: None if self.state.step + 1 in bad else step_if(self, ok)
        )
        pretrain(tiny(output_dir=str(tmp_path / "reference"), optim=optim, **DROPOUT))
    poison(*bad)
    pretrain(tiny(optim=optim, logging_steps=4, **DROPOUT))
    weights = [digest(tmp_path / name / "checkpoint-12") for name in ("run", "reference")]
    assert weights[0] == weights[1]
    results = json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    assert results["nonfinite_updates"] == len(bad)


def test_what_is_skipped_is_told_with_its_blocks(tiny, tmp_path, poison, capsys):
    poison(6)
    pretrain(tiny(logging_steps=4, **DROPOUT))
    (line,) = lines_about(tmp_path / "run")
    assert (line["step"], line["skipped"]) == (6, "not finite")
    assert len(line["corpus_block_epoch"]) == 8
    first = line["corpus_block_epoch"][0]
    assert f"step       6  skipped: loss or gradient not finite, on blocks {first[1]} of corpus 0" in (
        capsys.readouterr().out
    )
    # The line of the updates around it is the mean over the others.
    train = metrics_of(tmp_path / "run", "train_loss")
    assert all(math.isfinite(line["train_loss"]) for line in train)
    assert train[-1]["tokens_seen"] == 12 * 8 * 32


def test_the_mean_loss_is_that_of_the_updates_that_were_made(tiny, tmp_path, poison, monkeypatch):
    pretrain(tiny(output_dir=str(tmp_path / "single"), learning_rate=0.0, max_steps=4))
    single = [line["train_loss"] for line in metrics_of(tmp_path / "single", "train_loss")]
    poison(3)
    pretrain(tiny(logging_steps=4, learning_rate=0.0, max_steps=4))
    (line,) = metrics_of(tmp_path / "run", "train_loss")
    # Each update of this text masks the same number of tokens.
    assert line["train_loss"] == pytest.approx((single[0] + single[1] + single[3]) / 3, rel=1e-6)


@pytest.mark.parametrize("stop_at", [None, 5, 7])
def test_going_back_takes_other_data(tiny, tmp_path, poison, monkeypatch, stop_at):
    """From update 4 on the data of 5 to 7 is passed over; also where the run is interrupted after that."""
    options = DROPOUT | {"nonfinite_update": "rollback"}
    seen = poison(6)
    if stop_at:
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            signal_at(patch, stop_at, "SIGTERM", when=lambda trainer: trainer.state.data_offset)
            pretrain(tiny(**options))
    pretrain(tiny(**options))
    last = dict(seen)  # of each update, the data that it was made on in the end
    assert [last[step] for step in range(1, 13)] == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12, 13, 14]
    (line,) = lines_about(tmp_path / "run")
    assert len(line.pop("corpus_block_epoch")) == 8
    assert line == {"step": 5, "rolled_back_from": 6, "data_offset": 2, "nonfinite_updates": 1}
    train = [line["step"] for line in metrics_of(tmp_path / "run", "train_loss")]
    assert train == list(range(1, 13))


def test_going_back_is_the_same_when_it_is_done_again(tiny, tmp_path, poison):
    """A run that was killed after it had gone back, before it saved, goes back again to the same end."""
    options = DROPOUT | {"nonfinite_update": "rollback"}
    poison(6)
    pretrain(tiny(output_dir=str(tmp_path / "whole"), **options))
    pretrain(tiny(**options))
    run = tmp_path / "run"
    for name in ("checkpoint-8", "checkpoint-12"):
        (run / name).rename(tmp_path / name)
    record = json.loads((run / "run.json").read_text())
    del record["results"]
    (run / "run.json").write_text(json.dumps(record))
    pretrain(tiny(**options))
    assert digest(run / "checkpoint-12") == digest(tmp_path / "whole" / "checkpoint-12")
    assert metrics_of(run) == metrics_of(tmp_path / "whole")


@pytest.mark.parametrize("logging_steps", [1, 5])
@pytest.mark.parametrize("stop_at", [5, 6, 7])
def test_going_back_is_the_same_wherever_it_is_interrupted(
    tiny, tmp_path, poison, monkeypatch, stop_at, logging_steps
):
    """Before the bad update, at it, after it: to the checkpoint that was due, and past the first bad data."""
    options = DROPOUT | {
        "nonfinite_update": "rollback",
        "logging_steps": logging_steps,
        "save_total_limit": 1,
    }
    poison(6, 7)
    pretrain(tiny(output_dir=str(tmp_path / "whole"), **options))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_at(patch, stop_at, "SIGTERM")
        pretrain(tiny(**options))
    pretrain(tiny(**options))
    assert digest(tmp_path / "run" / "checkpoint-12") == digest(tmp_path / "whole" / "checkpoint-12")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert [f.name for f in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-12"]


def test_a_time_limit_lets_going_back_go_on(tiny, tmp_path, poison):
    options = DROPOUT | {"nonfinite_update": "rollback"}
    poison(6)
    pretrain(tiny(output_dir=str(tmp_path / "whole"), **options))
    for _ in range(12):
        with contextlib.suppress(Stopped):
            pretrain(tiny(max_train_time=1e-6, **options))
    pretrain(tiny(**options))
    assert digest(tmp_path / "run" / "checkpoint-12") == digest(tmp_path / "whole" / "checkpoint-12")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")


def test_validations_that_are_no_number_are_counted_too(tiny, tmp_path, monkeypatch):
    validations = []
    monkeypatch.setattr(
        pretraining.Run,
        "_validate",
        lambda self: validations.append(1) or {"validation_loss": math.nan, "validation_accuracy": 0.0},
    )
    with pytest.raises(Diverged):
        pretrain(tiny(nonfinite_update="rollback", max_nonfinite_updates=2, save_steps=2))
    assert len(validations) == 3


def test_a_skipped_update_is_no_divergence(tiny, tmp_path, poison):
    poison(4)
    pretrain(tiny(logging_steps=4, **DROPOUT))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["results"]["diagnosis"] != "diverged"


@pytest.mark.parametrize(
    ("options", "bad", "ends_at"),
    [
        ({"nonfinite_update": "stop"}, {6}, 6),
        ({"nonfinite_update": "skip", "max_nonfinite_updates": 2}, {2, 5, 7, 9}, 7),
        ({"nonfinite_update": "rollback"}, {2}, 2),  # there is no checkpoint yet
        ({"nonfinite_update": "rollback", "max_nonfinite_updates": 2}, set(range(6, 99)), 5),
    ],
)
def test_it_is_bounded(tiny, tmp_path, poison, options, bad, ends_at):
    poison(*bad)
    with pytest.raises(Diverged, match=f"not finite by update {ends_at}"):
        pretrain(tiny(**DROPOUT | options))
    results = json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    assert results["validation_loss"] is None
    assert results["diagnosis"] == "diverged"


def test_the_weights_stay_finite(tiny, tmp_path, poison):
    """What is saved before the end is good, whatever the policy."""
    poison(6)
    with pytest.raises(Diverged):
        pretrain(tiny(nonfinite_update="stop", save_steps=1))
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        assert all(torch.isfinite(w).all() for w in load_file(folder / "model.safetensors").values())
    assert not (tmp_path / "run" / "checkpoint-6").exists()
