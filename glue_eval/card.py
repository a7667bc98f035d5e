"""Results of fine-tuning in a checkpoint's model card: metadata that the Hub reads, and a table for people.

The metadata is `model-index`. The newer `.eval_results/*.yaml` files of huggingface_hub are not written: an
entry there is one value for a `task_id` of the data set, without metric and split, and nothing in
huggingface_hub 2.4 says which ids `nyu-mll/glue` has.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, metadata_load
from huggingface_hub.utils import yaml_dump

from glue_eval.arguments import Setting
from glue_eval.tasks import HUB_DATASET, SCORED, TASKS
from recipes.errors import UserError
from recipes.files import aside_of, sync

# Names in GLUE to ids of the Hub, which are names of modules of `evaluate`, and words.
METRICS = {
    "accuracy": ("accuracy", "accuracy"),
    "accuracy_mm": ("accuracy", "accuracy, mismatched"),
    "f1": ("f1", "F1"),
    "matthews_correlation": ("matthews_correlation", "Matthews correlation"),
    "pearson": ("pearsonr", "Pearson correlation"),
    "spearmanr": ("spearmanr", "Spearman correlation"),
}
START, END = "<!-- GLUE results: start -->", "<!-- GLUE results: end -->"
BLOCK = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)
TABLE = """\
{start}
## Fine-tuned on GLUE

Scores on the validation splits, each the mean over seeds of fine-tuning, with its 95 % confidence interval
(Student's t over seeds).

| task | metric | mean | 95 % interval | seeds | setting | model |
|---|---|---|---|---|---|---|
{rows}
{end}"""


def update_card(folder: Path, entries: list[dict[str, Any]], pretty_name: str | None = None) -> Path:
    """Put results into `folder/README.md`, whole or not at all; a minimal card is made where there is none.

    Results of the same task, data set, config, split and metric are replaced; all else stays.

    Args:
        folder: The model's folder.
        entries: Of one model, at most one a task, as in `results.json`; a value that is null is left out.
        pretty_name: The model's name in `model-index`; else the name there, else the folder's.

    Returns:
        The card.

    Raises:
        UserError: Entries of several models or twice a task, no such folder, or a card that cannot be read.
    """
    _refuse_mixed(entries)
    if not folder.is_dir():
        raise UserError(f"model card: {folder} is no folder; the results of a local model can be written")
    file = folder / "README.md"
    metadata, text = _read(file) if file.exists() else ({"library_name": "transformers"}, "")
    index = metadata.setdefault("model-index", [{"name": folder.resolve().name, "results": []}])
    if pretty_name:
        index[0]["name"] = pretty_name
    index[0]["results"] = _merged(index[0]["results"], _results(entries))
    if not index[0]["results"]:  # every value undefined: an empty index is invalid
        del metadata["model-index"]
    name = pretty_name or folder.resolve().name
    _write(file, metadata, _with_table(text or f"\n# {name}\n", entries, file))
    return file


def _refuse_mixed(entries: list[dict[str, Any]]) -> None:
    """A card speaks for one model, and a score in it has one setting."""
    models = {entry["model"]["fingerprint"]: entry["model"]["name"] for entry in entries}
    tasks = [entry["task"] for entry in entries]
    if len(models) > 1:
        raise UserError(
            f"model card: results of {', '.join(sorted(models.values()))}; give those of one model"
        )
    if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
        raise UserError(f"model card: {', '.join(twice)} occurs more than once; give one setting a task")


def _read(file: Path) -> tuple[dict[str, Any], str]:
    """Metadata and text of a card. The metadata is a plain dictionary: ModelCardData drops some of it."""
    try:
        text = ModelCard.load(file).text
        metadata = metadata_load(file) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:  # ValueError: no UTF-8, no dictionary, a bad index
        raise UserError(f"{file}: {error}; mend the card or remove it") from error
    if not metadata.get("model-index"):
        metadata.pop("model-index", None)
    return metadata, text


def _results(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The elements of `model-index` for the entries' values."""
    results = []
    for entry in entries:
        task = TASKS[entry["task"]]
        for metric in task.metrics:
            value = entry["mean"].get(metric)
            if value is None:
                continue
            kind, words = METRICS[metric]
            result = EvalResult(
                task_type="text-classification",  # of STS-B too: task_categories in the data set's own card
                dataset_type=HUB_DATASET,
                dataset_name=f"GLUE {_title(task.name)}",
                dataset_config=task.name,
                dataset_split=task.validation[metric == "accuracy_mm"],
                metric_type=kind,
                metric_name=f"{words[0].upper()}{words[1:]}, mean of {_counted(entry['n'])}",
                metric_value=float(value),
            )
            results.append(result)
    data = ModelCardData(model_name="any", eval_results=results).to_dict()
    return data["model-index"][0]["results"] if results else []


def _merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`old` without the metrics that `new` has, then `new`."""
    replaced = {key for result in new for key in _keys(result)}
    kept = []
    for result in old:
        pairs = zip(result["metrics"], _keys(result), strict=True)
        metrics = [metric for metric, key in pairs if key not in replaced]
        if metrics:
            kept.append(result | {"metrics": metrics})
    return kept + new


def _keys(result: dict[str, Any]) -> list[tuple[str | None, ...]]:
    """What names each metric of a result."""
    data = result["dataset"]
    where = (result["task"]["type"], data["type"], data.get("config"), data.get("split"))
    return [(*where, metric["type"]) for metric in result["metrics"]]


def _with_table(text: str, entries: list[dict[str, Any]], file: Path) -> str:
    """The text with its table replaced or appended; rows of tasks that are not among the entries stay."""
    counts = text.count(START), text.count(END)
    old = BLOCK.search(text)
    if counts != ((1, 1) if old else (0, 0)):
        raise UserError(
            f"{file}: the marks {START} and {END} are no pair; remove them, or restore the missing one"
        )
    order = [_title(name) for name in SCORED]
    others = set(order) - {_title(entry["task"]) for entry in entries}
    lines = old[0].splitlines() if old else []
    rows = [line for line in lines if line.startswith("| ") and _cell(line) in others]
    rows = sorted([*rows, *_rows(entries)], key=lambda line: order.index(_cell(line)))
    table = TABLE.format(start=START, rows="\n".join(rows), end=END)
    newline = "\r\n" if "\r\n" in text else "\n"
    table = table.replace("\n", newline)
    if old:
        return f"{text[: old.start()]}{table}{text[old.end() :]}"
    return f"{text.rstrip()}{newline * 2}{table}{newline}"


def _rows(entries: list[dict[str, Any]]) -> Iterable[str]:
    for entry in entries:
        for metric in TASKS[entry["task"]].metrics:
            cells = [_title(entry["task"]), METRICS[metric][1], *_numbers(entry, metric)]
            cells += [_seeds(entry), _setting(entry), _model(entry["model"])]
            yield f"| {' | '.join(cells)} |"


def _numbers(entry: dict[str, Any], metric: str) -> tuple[str, str]:
    """Mean and interval, a dash where undefined."""
    mean, interval = entry["mean"].get(metric), entry["interval"].get(metric)
    known = interval is not None and None not in interval
    return (
        "–" if mean is None else f"{mean:.4f}",
        f"{interval[0]:.4f} to {interval[1]:.4f}" if known else "–",
    )


def _seeds(entry: dict[str, Any]) -> str:
    flagged = entry.get("degenerate")
    return f"{entry['n']} ({flagged} predicted one class)" if flagged else str(entry["n"])


def _setting(entry: dict[str, Any]) -> str:
    words, tried = Setting(**entry["setting"]).label, entry.get("settings_tried", 1)
    words += f"; best of {tried} on this split" if tried > 1 else ""
    return words + ("; best epoch on this split" if entry.get("load_best_model_at_end") else "")


def _model(model: dict[str, Any]) -> str:
    name = model["name"].replace("|", "\\|")
    return name if model.get("step") is None else f"{name}, step {model['step']}"


def _title(name: str) -> str:
    """The task's name as GLUE spells it, which is that of its file."""
    return next(iter(TASKS[name].files.values())).removesuffix(".tsv").removesuffix("-m")


def _cell(row: str) -> str:
    """The first cell: the task."""
    return row.split("|")[1].strip()


def _counted(seeds: int) -> str:
    return f"{seeds} seed" if seeds == 1 else f"{seeds} seeds"


def _write(file: Path, metadata: dict[str, Any], text: str) -> None:
    newline = "\r\n" if "\r\n" in text else "\n"
    front = yaml_dump(metadata, sort_keys=False, line_break=newline)
    aside = aside_of(file)
    aside.write_text(f"---{newline}{front}---{newline}{text}", encoding="utf-8", newline="")
    ModelCard.load(aside)  # what cannot be read again never gets the name
    sync(aside)
    os.replace(aside, file)
