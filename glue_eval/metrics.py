"""The metrics of GLUE as a module of the `evaluate` library, which needs no network.

    evaluate.load("glue_eval/metrics.py", "mrpc").compute(predictions=[1, 0, 1], references=[1, 1, 1])

`evaluate` takes seconds to import: what needs only the numbers calls `glue_eval.scores`.
"""

import datasets
import evaluate
import numpy as np

from glue_eval.scores import score
from glue_eval.tasks import SCORED, TASKS

# MNLI is scored one part at a time here, because `compute` takes one list of predictions.
_ACCURACY_OF_ONE_PART = ("mnli", "mnli_matched", "mnli_mismatched")
CONFIGS = {name: TASKS[name].metrics for name in SCORED} | dict.fromkeys(_ACCURACY_OF_ONE_PART, ("accuracy",))

_DESCRIPTION = """
Scores predictions on one task of GLUE, with the metrics that the benchmark defines for it: accuracy, with F1
for mrpc and qqp; Matthews correlation for cola; Pearson and Spearman correlation for stsb.
"""
_INPUTS = """
Args:
    predictions: class numbers, or similarities for stsb, one for each example.
    references: the labels, in the same order.

Returns:
    The metrics by name: accuracy, f1, matthews_correlation, pearson, spearmanr. A correlation with constant
    predictions is undefined: nan.

Example:
    >>> metric = evaluate.load("glue_eval/metrics.py", "mrpc")
    >>> metric.compute(predictions=[1, 0, 1], references=[1, 1, 1])
    {'accuracy': 0.6666666666666666, 'f1': 0.8}
"""
_CITATION = """
Alex Wang, Amanpreet Singh, Julian Michael, Felix Hill, Omer Levy and Samuel R. Bowman: GLUE: A Multi-Task
Benchmark and Analysis Platform for Natural Language Understanding. 2018, arXiv:1804.07461.
"""


class Glue(evaluate.Metric):
    """The metrics of one task of GLUE, which the configuration names.

    Raises:
        KeyError: No configuration, or an unknown one.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in CONFIGS:
            raise KeyError(f"config_name {self.config_name}: allowed: {', '.join(CONFIGS)}")
        kind = datasets.Value("float64" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": kind, "references": kind}),
            reference_urls=["https://gluebenchmark.com"],
            format="numpy",
        )

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {metric: score(metric, predictions, references) for metric in CONFIGS[self.config_name]}
