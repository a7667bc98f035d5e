"""What GLUE measures: scores of predictions against labels.

Wang et al. 2018, "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding",
section 3. scikit-learn and scipy take seconds to import, hence inside the functions that call them.
"""

import warnings
from collections.abc import Callable
from statistics import fmean
from typing import Any

import numpy as np

from glue_eval.tasks import Task

# Sentence similarities lie between 0 and 5: predictions closer together than 1 % of that say nothing.
MIN_SPREAD = 0.05
_OF_MISMATCHED = "_mm"


def task_scores(task: Task, splits: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """The metrics of a task, in the order of `task.metrics`.

    Args:
        task: A row of the table of tasks.
        splits: Predictions and labels, each [examples], for each split of `task.validation`; class numbers,
            or similarities for a regression.

    Raises:
        ValueError: Other splits than the task's, no examples, or not one prediction for each label.
    """
    if set(splits) != set(task.validation):
        raise ValueError(f"splits of {task.name}: {sorted(splits)}; must be {sorted(task.validation)}")
    return {metric: score(metric, *splits[_split(task, metric)]) for metric in task.metrics}


def _split(task: Task, metric: str) -> str:
    return task.validation[-1 if metric.endswith(_OF_MISMATCHED) else 0]


def score(metric: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """One metric of GLUE.

    A correlation with a constant is undefined: nan. Matthews of a constant, and F1 without a positive (class
    1), are 0, as scikit-learn has it.

    Args:
        metric: One of `METRICS`.
        predictions: [examples]
        labels: [examples]

    Raises:
        ValueError: No examples, or not one prediction for each label.
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim != 1 or predictions.shape != labels.shape or not len(labels):
        raise ValueError(
            f"predictions {list(predictions.shape)}, labels {list(labels.shape)}: "
            "must be one prediction for each label, and at least one"
        )
    return float(METRICS[metric](predictions, labels))


def headline(task: Task, scores: dict[str, float]) -> float:
    """One number for a task: the unweighted mean of its metrics, which GLUE's macro average is taken over.

    Raises:
        ValueError: The task has no metrics.
    """
    if not task.metrics:
        raise ValueError(f"{task.name}: has no metrics")
    return fmean(scores[metric] for metric in task.metrics)


def is_degenerate(task: Task, predictions: np.ndarray) -> bool:
    """Whether predictions, [examples], do not depend on the input: one class, or similarities that are all
    but equal or not numbers.

    Raises:
        ValueError: No predictions.
    """
    spread = np.ptp(np.asarray(predictions, dtype=np.float64))
    # Not "<": nan, where training diverged, is no spread either.
    return not spread >= (MIN_SPREAD if task.is_regression else 1)


def _accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return (predictions == labels).mean()


def _f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return f1_score(labels, predictions, zero_division=0.0)


def _matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A single label was found")
        return matthews_corrcoef(labels, predictions)


def _pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, labels)


def _spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, labels)


def _correlation(function: Callable[..., Any], predictions: np.ndarray, labels: np.ndarray) -> float:
    from scipy.stats import DegenerateDataWarning

    if len(labels) == 1:  # scipy refuses it, and it is a constant like any other
        return np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)
        return function(predictions.astype(np.float64), labels.astype(np.float64)).statistic


METRICS = {
    "accuracy": _accuracy,
    "accuracy" + _OF_MISMATCHED: _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _pearson,
    "spearmanr": _spearman,
}
