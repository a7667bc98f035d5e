"""The metrics of GLUE, against scikit-learn, scipy and formulas written out here."""

import json
import os
import subprocess
import sys
from math import isnan, nan

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from glue_eval.scores import MIN_SPREAD, headline, is_degenerate, task_scores
from glue_eval.tasks import SCORED, TASKS
from tests.conftest import ROOT

ONE_SPLIT = [name for name in SCORED if name != "mnli"]


def scores(name, predictions, labels):
    return task_scores(TASKS[name], {"validation": (np.array(predictions), np.array(labels))})


def draw(name, seed, n=60):
    """Predictions and labels that agree more often than by chance."""
    rng = np.random.default_rng(seed)
    if name == "stsb":
        labels = rng.integers(0, 26, n) / 5  # ties, as people's means have
        return (labels + rng.normal(size=n)).astype(np.float32), labels.astype(np.float32)
    labels = rng.integers(0, TASKS[name].num_labels, n)
    return np.where(rng.random(n) < 0.5, labels, rng.integers(0, TASKS[name].num_labels, n)), labels


def libraries(predictions, labels):
    return {
        "accuracy": lambda: sk.accuracy_score(labels, predictions),
        "f1": lambda: sk.f1_score(labels, predictions),
        "matthews_correlation": lambda: sk.matthews_corrcoef(labels, predictions),
        "pearson": lambda: stats.pearsonr(labels, predictions).statistic,
        "spearmanr": lambda: stats.spearmanr(labels, predictions).statistic,
    }


def confusion(predictions, labels):
    """True positives, false positives, false negatives, true negatives."""
    pairs = list(zip(predictions.tolist(), labels.tolist()))
    return [pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1), (0, 0))]


def correlation(x, y):
    x, y = [[v - sum(values) / len(values) for v in values] for values in (x, y)]
    return sum(a * b for a, b in zip(x, y)) / (sum(a * a for a in x) * sum(b * b for b in y)) ** 0.5


def ranks(values):
    """Equal values share the mean of their ranks."""
    return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]


def by_hand(metric, predictions, labels):
    if metric in ("pearson", "spearmanr"):
        x, y = (np.asarray(values, dtype=float).tolist() for values in (predictions, labels))
        return correlation(x, y) if metric == "pearson" else correlation(ranks(x), ranks(y))
    tp, fp, fn, tn = confusion(predictions, labels)
    if metric == "accuracy":
        return (tp + tn) / len(labels)
    if metric == "f1":
        precision, recall = tp / (tp + fp), tp / (tp + fn)
        return 2 * precision * recall / (precision + recall)
    return (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", ONE_SPLIT)
def test_scores_are_those_of_the_libraries_and_of_the_formulas(name, seed):
    predictions, labels = draw(name, seed)
    ours = scores(name, predictions, labels)
    assert tuple(ours) == TASKS[name].metrics
    for metric, value in ours.items():
        assert type(value) is float
        assert value == pytest.approx(libraries(predictions, labels)[metric](), rel=1e-6)
        assert value == pytest.approx(by_hand(metric, predictions, labels), rel=1e-9)


def test_mnli_has_an_accuracy_for_each_part():
    matched, mismatched = (np.array([0, 1, 2, 2]), np.array([0, 1, 2, 0])), (np.array([1]), np.array([2]))
    parts = {"validation_mismatched": mismatched, "validation_matched": matched}
    found = task_scores(TASKS["mnli"], parts)
    assert found == {"accuracy": 0.75, "accuracy_mm": 0.0}
    assert headline(TASKS["mnli"], found) == 0.375


def test_one_positive_missed_of_three():
    assert scores("mrpc", [1, 0, 1], [1, 1, 1]) == pytest.approx({"accuracy": 2 / 3, "f1": 0.8})


@pytest.mark.filterwarnings("error")
def test_the_signature_of_a_degenerate_run_of_mrpc():
    predictions = np.ones(408, dtype=int)
    found = scores("mrpc", predictions, [0] * 129 + [1] * 279)
    assert {metric: round(value, 3) for metric, value in found.items()} == {"accuracy": 0.684, "f1": 0.812}
    assert round(headline(TASKS["mrpc"], found), 3) == 0.748
    assert is_degenerate(TASKS["mrpc"], predictions)


@pytest.mark.parametrize(
    ("name", "predictions", "labels", "expected"),
    [
        ("cola", [1, 1, 1], [0, 1, 1], [0.0]),
        ("cola", [0, 1, 1], [1, 1, 1], [0.0]),
        ("cola", [1, 1], [1, 1], [0.0]),
        ("cola", [0, 1], [1, 0], [-1.0]),
        ("mrpc", [0, 0], [0, 1], [0.5, 0.0]),
        ("mrpc", [0, 0], [0, 0], [1.0, 0.0]),
        ("mrpc", [1, 0], [0, 0], [0.5, 0.0]),
        ("stsb", [2.5, 2.5, 2.5], [1.0, 2.0, 5.0], [nan, nan]),
        ("stsb", [1.0, 2.0, 5.0], [2.5, 2.5, 2.5], [nan, nan]),
        ("stsb", [1.0], [1.0], [nan, nan]),
        ("stsb", [1.0, nan], [1.0, 2.0], [nan, nan]),
        ("stsb", [1, 2, 3], [1.0, 2.0, 5.0], [by_hand("pearson", [1, 2, 3], [1, 2, 5]), 1.0]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_edges(name, predictions, labels, expected):
    assert list(scores(name, predictions, labels).values()) == pytest.approx(expected, nan_ok=True)


@pytest.mark.filterwarnings("error")
def test_a_nearly_constant_prediction_gives_no_warning():
    scores("stsb", np.array([2.5, 2.5 + 1e-15, 2.5]), [1.0, 2.0, 5.0])


def test_the_headline_of_an_undefined_correlation_is_undefined():
    assert isnan(headline(TASKS["stsb"], {"pearson": nan, "spearmanr": 0.5}))
    assert headline(TASKS["stsb"], {"pearson": 0.25, "spearmanr": 0.75}) == 0.5


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        ([], []),
        ([1], [1, 0]),
        ([1, 0], [1]),
        (np.zeros((2, 2)), [0, 1]),
        (np.zeros((2, 1)), np.zeros((2, 1))),
    ],
)
@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb"])
def test_each_label_needs_one_prediction(name, predictions, labels):
    with pytest.raises(ValueError, match="one prediction for each label"):
        scores(name, predictions, labels)


def test_other_splits_than_those_of_the_task_are_refused():
    pair = (np.array([1]), np.array([1]))
    for name, splits in (("mnli", {"validation_matched": pair}), ("rte", {"test": pair})):
        with pytest.raises(ValueError, match=f"splits of {name}.*must be .'validation"):
            task_scores(TASKS[name], splits)


def test_the_diagnostic_set_has_no_score():
    assert task_scores(TASKS["ax"], {}) == {}
    with pytest.raises(ValueError, match="ax: has no metrics"):
        headline(TASKS["ax"], {})


@pytest.mark.parametrize(
    ("name", "predictions", "expected"),
    [
        ("mnli", [2, 2, 2], True),
        ("mnli", [2, 2, 0], False),
        ("cola", np.array([0, 0], dtype=bool), True),
        ("cola", np.array([0, 1], dtype=bool), False),
        ("stsb", [2.5, 2.5 + MIN_SPREAD / 2], True),
        ("stsb", [2.5, 2.5 + MIN_SPREAD * 2], False),
        ("stsb", [nan, 1.0, 3.0], True),
    ],
)
def test_degenerate_predictions_do_not_depend_on_the_input(name, predictions, expected):
    assert is_degenerate(TASKS[name], np.array(predictions)) is expected


def test_no_predictions_are_neither():
    with pytest.raises(ValueError, match="zero-size"):
        is_degenerate(TASKS["cola"], np.array([]))


def run_python(code, cwd, **environment):
    """What a second process prints, as JSON."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_evaluate_loads_the_module_offline(tmp_path):
    """By its full path from elsewhere, and by its relative path from the root."""
    cases = {name: [values.tolist() for values in draw(name, seed=7)] for name in ("mrpc", "stsb", "cola")}
    code = f"""
import json, os, evaluate
def compute(file, config):
    predictions, references = {cases!r}[config]
    return evaluate.load(file, config).compute(predictions=predictions, references=references)
elsewhere = [compute({str(ROOT / "glue_eval/metrics.py")!r}, config) for config in {list(cases)!r}]
os.chdir({str(ROOT)!r})
print(json.dumps([elsewhere, [compute("glue_eval/metrics.py", config) for config in {list(cases)!r}]]))
"""
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    elsewhere, from_root = run_python(code, tmp_path, **offline)
    assert elsewhere == from_root
    for (name, (predictions, labels)), found in zip(cases.items(), from_root):
        assert tuple(found) == TASKS[name].metrics
        for metric, value in found.items():
            assert value == pytest.approx(by_hand(metric, np.array(predictions), np.array(labels)))


def test_every_scored_task_is_a_configuration():
    from glue_eval.metrics import Glue

    for name in (*SCORED, "mnli_matched", "mnli_mismatched"):
        expected = dict.fromkeys(TASKS[name].metrics if name in ONE_SPLIT else ["accuracy"], 1.0)
        found = Glue(config_name=name).compute(predictions=[0, 1, 1], references=[0, 1, 1])
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("config", ["mrcp", "ax", None])
def test_an_unknown_configuration_is_named_with_those_there_are(config):
    from glue_eval.metrics import Glue

    with pytest.raises(
        KeyError, match=f"config_name {config or 'default'}: allowed: cola, .*mnli_mismatched"
    ):
        Glue(config_name=config)


def test_scores_are_imported_without_the_libraries(tmp_path):
    code = """
import json, sys
import glue_eval.tasks
before = set(sys.modules)
import glue_eval.scores
print(json.dumps([sorted(set(sys.modules) - before), sorted(sys.modules)]))
"""
    added, loaded = run_python(code, tmp_path)
    assert {"evaluate", "sklearn", "scipy"}.isdisjoint(added)
    assert {"evaluate", "sklearn"}.isdisjoint(loaded)
