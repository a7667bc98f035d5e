"""The tasks of GLUE: columns, labels, metrics, sizes and file names, in one table.

Wang et al. 2018, "GLUE: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding",
Table 1 and section 3; columns, order of the labels and row counts as in `nyu-mll/glue` on the Hub.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from recipes.arguments import nearest
from recipes.errors import UserError

HUB_DATASET = "nyu-mll/glue"
ENTAILMENT = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Task:
    """One task. `rows` maps each split to its official number of examples, `files` each unlabelled split
    to the file that the GLUE server takes for it."""

    name: str
    columns: tuple[str, ...]
    """One sentence, or two."""
    labels: tuple[str, ...]
    """Names in the order of their numbers; empty for a score between 0 and 5 (regression)."""
    metrics: tuple[str, ...]
    """Names as in GLUE; `accuracy_mm` is that of the mismatched part."""
    rows: dict[str, int]
    files: dict[str, str]
    validation: tuple[str, ...] = ("validation",)
    """Splits with public labels that are scored."""
    server_labels: bool = False
    """Whether the server wants names of labels; else it wants numbers."""

    @property
    def is_regression(self) -> bool:
        """Whether the label is a number and not a class."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Outputs of the model's head."""
        return len(self.labels) or 1


_TASKS = (
    Task(
        name="cola",
        columns=("sentence",),
        labels=("unacceptable", "acceptable"),
        metrics=("matthews_correlation",),
        rows={"train": 8551, "validation": 1043, "test": 1063},
        files={"test": "CoLA.tsv"},
    ),
    Task(
        name="sst2",
        columns=("sentence",),
        labels=("negative", "positive"),
        metrics=("accuracy",),
        rows={"train": 67349, "validation": 872, "test": 1821},
        files={"test": "SST-2.tsv"},
    ),
    Task(
        name="mrpc",
        columns=("sentence1", "sentence2"),
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        rows={"train": 3668, "validation": 408, "test": 1725},
        files={"test": "MRPC.tsv"},
    ),
    Task(
        name="stsb",
        columns=("sentence1", "sentence2"),
        labels=(),
        metrics=("pearson", "spearmanr"),
        rows={"train": 5749, "validation": 1500, "test": 1379},
        files={"test": "STS-B.tsv"},
    ),
    Task(
        name="qqp",
        columns=("question1", "question2"),
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        rows={"train": 363846, "validation": 40430, "test": 390965},
        files={"test": "QQP.tsv"},
    ),
    Task(
        name="mnli",
        columns=("premise", "hypothesis"),
        labels=NLI,
        metrics=("accuracy", "accuracy_mm"),
        rows={
            "train": 392702,
            "validation_matched": 9815,
            "validation_mismatched": 9832,
            "test_matched": 9796,
            "test_mismatched": 9847,
        },
        files={"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
        validation=("validation_matched", "validation_mismatched"),
        server_labels=True,
    ),
    Task(
        name="qnli",
        columns=("question", "sentence"),
        labels=ENTAILMENT,
        metrics=("accuracy",),
        rows={"train": 104743, "validation": 5463, "test": 5463},
        files={"test": "QNLI.tsv"},
        server_labels=True,
    ),
    Task(
        name="rte",
        columns=("sentence1", "sentence2"),
        labels=ENTAILMENT,
        metrics=("accuracy",),
        rows={"train": 2490, "validation": 277, "test": 3000},
        files={"test": "RTE.tsv"},
        server_labels=True,
    ),
    Task(
        name="wnli",
        columns=("sentence1", "sentence2"),
        labels=("not_entailment", "entailment"),
        metrics=("accuracy",),
        rows={"train": 635, "validation": 71, "test": 146},
        files={"test": "WNLI.tsv"},
    ),
    # The diagnostic set has no labels and no training split: a model of MNLI predicts it.
    Task(
        name="ax",
        columns=("premise", "hypothesis"),
        labels=NLI,
        metrics=(),
        rows={"test": 1104},
        files={"test": "AX.tsv"},
        validation=(),
        server_labels=True,
    ),
)
TASKS = {task.name: task for task in _TASKS}
SCORED = tuple(name for name, task in TASKS.items() if task.metrics)


def read_tasks(names: str, submission: bool) -> list[Task]:
    """The tasks of a comma-separated list, in the order of the table; `all` is every scored task.

    Args:
        names: What `--task` says.
        submission: Whether predictions are wanted; the diagnostic set has nothing else to give.

    Raises:
        UserError: An unknown task, or `ax` without a submission.
    """
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    if not wanted:
        raise UserError(f"task: is needed; allowed: all, {', '.join(TASKS)}")
    for name in wanted - {"all"}:
        if name not in TASKS:
            raise UserError(f"task {name!r}: {_hint(name)}")
    if "ax" in wanted and not submission:
        raise UserError("task 'ax': has no labels to score; for its predictions give --submission DIR")
    if "all" in wanted:
        wanted |= {*SCORED, *(["ax"] if submission else [])}
    if "ax" in wanted:
        wanted.add("mnli")
    return [task for task in _TASKS if task.name in wanted]


def _hint(name: str) -> str:
    close = nearest(name.lower().replace("-", "").replace("_", ""), TASKS)
    return f"{close}" if close.startswith("did") else f"allowed: all, {', '.join(TASKS)}"


def check_labels(task: Task, labels: Iterable[float], where: str) -> None:
    """Refuse labels that are none of the task's.

    Raises:
        UserError: Names the first one.
    """
    for row, label in enumerate(labels):
        fits = 0 <= label <= 5 if task.is_regression else label in range(task.num_labels)
        if not fits:
            allowed = "0 to 5" if task.is_regression else f"0 to {task.num_labels - 1}"
            raise UserError(f"{where}: label {label} in row {row}; allowed for {task.name}: {allowed}")
