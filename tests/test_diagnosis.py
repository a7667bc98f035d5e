"""Plateau, divergence and over-fitting: from made-up losses, and from runs that must show them."""

import json
import random

import pytest

from recipes import pretraining, training
from recipes.diagnosis import Diverged, diagnose, last_diagnosis
from recipes.pretraining import pretrain
from tests.conftest import metrics_of

UNIGRAM = 6.0


def lines(validation, train=None):
    """A validation and a training line every 100 updates."""
    made = []
    for number, loss in enumerate(validation, 1):
        made.append({"step": 100 * number, "train_loss": (train or validation)[number - 1], "grad_norm": 1.0})
        made.append({"step": 100 * number, "validation_loss": loss})
    return made


@pytest.mark.parametrize(
    ("validation", "train", "expected"),
    [
        ([7.0, 6.5, 5.0, 4.0], None, None),
        ([7.0, 6.2, 6.1, 6.05], None, "plateau"),
        ([7.0, 6.2, 5.95, 5.89], None, None),
        ([7.0, 6.2], None, None),  # a fifth of the updates: too early to tell
        ([7.0, 5.0, 4.0, 4.3], None, "diverged"),
        ([7.0, 5.0, 4.0, 4.15], None, None),
        ([7.0, 5.0, 4.0, 4.3], [7.0, 5.0, 4.0, 3.5], "over-fitting"),
        ([7.0, 5.0], [7.0, None], None),  # skipped updates: the run goes on
        ([7.0, None], [7.0, 6.0], "diverged"),
        ([], None, None),
    ],
)
def test_what_losses_show(validation, train, expected):
    assert diagnose(lines(validation, train), UNIGRAM, max_steps=1000, warmup_steps=0) == expected


def test_without_a_training_line_since_the_lowest_loss_nothing_is_said():
    """Validated more often than logged."""
    losses = [{"step": 100, "train_loss": 4.0}, {"step": 100, "validation_loss": 4.0}]
    losses += [{"step": 120, "validation_loss": 5.0}]
    assert diagnose(losses, UNIGRAM, 1000, 0) is None
    assert diagnose([*losses, {"step": 130, "train_loss": 5.5}], UNIGRAM, 1000, 0) == "diverged"
    assert diagnose([*losses, {"step": 130, "train_loss": 3.5}], UNIGRAM, 1000, 0) == "over-fitting"


def test_no_plateau_is_declared_during_the_warmup():
    losses = lines([7.0, 6.2, 6.1, 6.05])
    assert diagnose(losses, UNIGRAM, max_steps=1000, warmup_steps=400) is None
    assert diagnose(losses, UNIGRAM, max_steps=1000, warmup_steps=300) == "plateau"


def test_a_long_run_is_not_given_a_quarter_of_its_updates():
    late = [{"step": 12_000, "validation_loss": 6.0}]
    assert diagnose(late, UNIGRAM, max_steps=1_000_000, warmup_steps=0) == "plateau"
    assert diagnose([{"step": 9_000, "validation_loss": 6.0}], UNIGRAM, 1_000_000, 0) is None


def test_the_last_notice_counts():
    plateau, cured = {"step": 4, "diagnosis": "plateau"}, {"step": 8, "diagnosis": None}
    assert last_diagnosis([plateau]) == ("plateau", 4)
    assert last_diagnosis([plateau, cured]) == (None, None)
    assert last_diagnosis([]) == (None, None)


def made_up_text(count, seed, topical):
    """Text of 140 made-up words, drawn from all of them or from one topic of seven words."""
    rng = random.Random(seed)
    vocabulary = [a + b + c for a in "bdfgk" for b in "aeio" for c in "lmnprst"]
    topic = 7 * rng.randrange(20)
    words = vocabulary[topic : topic + 7] if topical else vocabulary
    return " ".join(rng.choice(words) for _ in range(count))


@pytest.mark.parametrize("topical", [False, True])
def test_text_without_context_is_a_plateau_and_text_with_context_is_none(tiny, tmp_path, capsys, topical):
    for split, documents in (("train", 40), ("validation", 8)):
        (tmp_path / split).mkdir()
        for number in range(documents):
            text = made_up_text(1000, f"{split}{number}", topical)
            (tmp_path / split / f"{number}.txt").write_text(text)
    files = {f"{split}_file": str(tmp_path / split) for split in ("train", "validation")}
    options = {"validation_split_percentage": None, "vocab_size": 200, "max_steps": 180, "eval_steps": 60}
    options |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # it learns sooner
    pretrain(tiny(**files, **options, learning_rate=1e-2, logging_steps=10, save_steps=180))
    results = json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    assert results["diagnosis"] == (None if topical else "plateau")
    assert ("duplicated or shuffled lines" in capsys.readouterr().out) == (not topical)
    notices = metrics_of(tmp_path / "run", "diagnosis")
    assert [line["diagnosis"] for line in notices] == ([] if topical else ["plateau"])


def test_the_distance_from_the_unigram_cross_entropy_is_in_the_metrics(tiny, tmp_path):
    pretrain(tiny(max_steps=4))
    unigram = json.loads((tmp_path / "run" / "run.json").read_text())["unigram_cross_entropy"]
    for kind in ("train_loss", "validation_loss"):
        for line in metrics_of(tmp_path / "run", kind):
            assert line["below_unigram_cross_entropy"] == pytest.approx(unigram - line[kind])


def test_a_loss_that_is_no_number_ends_the_run_and_is_its_result(tiny, tmp_path):
    """No validation, checkpoint or final model comes from weights that are no numbers."""
    options = {"learning_rate": 1e30, "logging_steps": 12, "save_steps": 2, "nonfinite_update": "stop"}
    for _ in range(2):
        with pytest.raises(Diverged, match=r"not finite by update [12]\b"):
            pretrain(tiny(**options))
    run = tmp_path / "run"
    results = json.loads((run / "run.json").read_text())["results"]
    assert results["validation_loss"] is None
    assert results["diagnosis"] == "diverged"
    assert results["step"] == results["diagnosis_step"] == 2
    assert not (run / "model.safetensors").exists()
    assert not list(run.glob("checkpoint-*"))


def test_a_validation_loss_that_is_no_number_ends_the_run_before_anything_is_saved(tiny, tmp_path):
    """The last update broke the weights: its own loss and gradient were still those of the weights before."""
    with pytest.raises(Diverged):
        pretrain(tiny(learning_rate=1e30, max_steps=1))
    run = tmp_path / "run"
    assert json.loads((run / "run.json").read_text())["results"]["validation_loss"] is None
    assert metrics_of(run, "validation_loss")[-1]["validation_loss"] is None
    assert not (run / "model.safetensors").exists()
    assert not list(run.glob("checkpoint-*"))


def test_divergence_is_recorded_where_it_first_showed(tiny, tmp_path, monkeypatch):
    """A loss that rises from update 4 on, and is no number from update 6 on."""
    monkeypatch.setattr(pretraining, "diagnose", lambda *_: "diverged")
    monkeypatch.setattr(training, "learning_rate_at", lambda step, *_: 1e30 if step == 6 else 1e-3)
    with pytest.raises(Diverged):
        pretrain(tiny(nonfinite_update="stop"))
    results = json.loads((tmp_path / "run" / "run.json").read_text())["results"]
    assert (results["diagnosis_step"], results["step"]) == (4, 7)


def test_divergence_has_an_exit_code_of_its_own(launch, tmp_path):
    """On two processes neither waits for the other."""
    done = launch(processes=2, output_dir=tmp_path / "run", learning_rate=1e30)
    assert done.returncode == 1  # the launcher's
    assert done.stderr.count("not finite by update") == 1
    done = launch(output_dir=tmp_path / "one", learning_rate=1e30)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
