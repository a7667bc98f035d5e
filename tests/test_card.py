"""Results in a model card: read again by yaml and by huggingface_hub."""

import os

import pytest
import yaml
from huggingface_hub import ModelCard

from glue_eval.card import update_card
from recipes.command_line import build_arguments
from recipes.errors import UserError
from recipes.model_card import model_card
from recipes.run_record import describe_run
from recipes.stages import build_stages

FOREIGN = """\
---
license: apache-2.0
model_name: kept as well
my_key:
- 1
model-index:
- name: My model
  extra: kept
  results:
  - task: {type: fill-mask}
    dataset: {type: wikitext, name: WikiText}
    metrics:
    - {type: perplexity, value: 12.5, verified: false}
  - task: {type: text-classification}
    dataset: {type: nyu-mll/glue, name: GLUE, config: mrpc, split: validation}
    metrics:
    - {type: f1, value: 0.1}
    - {type: recall, value: 0.2}
  - task: {type: text-classification}
    dataset: {type: nyu-mll/glue, name: GLUE, config: mrpc, split: test}
    metrics:
    - {type: f1, value: 0.3}
---
# Mine

Words of my own, ünicode | and a pipe.
"""


def entry(task="mrpc", n=3, degenerate=0, fingerprint="abc", **mean):
    mean = mean or {"accuracy": 0.70123, "f1": 0.80456}
    known = {name: value for name, value in mean.items() if value is not None and n > 1}
    return {
        "task": task,
        "model": {"name": "pre-ln", "path": "x", "fingerprint": fingerprint, "run": "run", "step": 1200},
        "setting": {"learning_rate": 5e-5, "train_batch_size": 32, "num_train_epochs": 3},
        "settings_tried": 1,
        "seeds": [],
        "n": n,
        "mean": mean | {"score": 0.75},
        "std": dict.fromkeys(known, 0.01),
        "interval": {name: [v - 0.02, v + 0.02] if name in known else None for name, v in mean.items()},
        "degenerate": degenerate,
    }


def front_and_text(file):
    _, front, text = file.read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def values(file):
    """{(data set, config, split, metric): value} of the first model."""
    found = {}
    for result in front_and_text(file)[0]["model-index"][0]["results"]:
        data = result["dataset"]
        for metric in result["metrics"]:
            key = (data["type"], data.get("config"), data.get("split"), metric["type"])
            assert key not in found
            found[key] = metric["value"]
    return found


def cells(file):
    """Rows of the table, without its head."""
    text = front_and_text(file)[1]
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows][1:]


def test_a_card_is_made_where_there_is_none(tmp_path):
    file = update_card(tmp_path, [entry()], pretty_name="Pre-LN small")
    assert file == tmp_path / "README.md"
    metadata, text = front_and_text(file)
    (model,) = metadata["model-index"]
    assert model["name"] == "Pre-LN small"
    (result,) = model["results"]
    assert result["task"] == {"type": "text-classification"}
    assert result["dataset"] == {
        "type": "nyu-mll/glue", "name": "GLUE MRPC", "config": "mrpc", "split": "validation",
    }  # fmt: skip
    assert [(m["type"], m["value"]) for m in result["metrics"]] == [("accuracy", 0.70123), ("f1", 0.80456)]
    assert text.startswith("\n# Pre-LN small\n")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


def test_the_hub_reads_it(tmp_path):
    entries = [entry(), entry("stsb", pearson=0.8, spearmanr=0.79), entry("cola", matthews_correlation=-0.01)]
    results = ModelCard.load(update_card(tmp_path, entries)).data.eval_results
    found = {(r.task_type, r.dataset_config, r.metric_type): r.metric_value for r in results}
    assert found == {
        ("text-classification", "mrpc", "accuracy"): 0.70123,
        ("text-classification", "mrpc", "f1"): 0.80456,
        ("text-classification", "stsb", "pearsonr"): 0.8,
        ("text-classification", "stsb", "spearmanr"): 0.79,
        ("text-classification", "cola", "matthews_correlation"): -0.01,
    }
    assert {r.dataset_name for r in results} == {"GLUE MRPC", "GLUE STS-B", "GLUE CoLA"}


def test_the_two_parts_of_mnli_are_two_splits(tmp_path):
    file = update_card(tmp_path, [entry("mnli", accuracy=0.8, accuracy_mm=0.81)])
    assert values(file) == {
        ("nyu-mll/glue", "mnli", "validation_matched", "accuracy"): 0.8,
        ("nyu-mll/glue", "mnli", "validation_mismatched", "accuracy"): 0.81,
    }
    assert [row[:3] for row in cells(file)] == [
        ["MNLI", "accuracy", "0.8000"],
        ["MNLI", "accuracy, mismatched", "0.8100"],
    ]


def test_foreign_metadata_results_and_text_stay(tmp_path):
    file = tmp_path / "README.md"
    file.write_text(FOREIGN, encoding="utf-8")
    before, _ = front_and_text(file)
    update_card(tmp_path, [entry()])
    metadata, text = front_and_text(file)
    assert {k: v for k, v in metadata.items() if k != "model-index"} == {
        k: v for k, v in before.items() if k != "model-index"
    }
    assert list(metadata) == list(before)
    (model,) = metadata["model-index"]
    assert (model["name"], model["extra"]) == ("My model", "kept")
    assert model["results"][0] == before["model-index"][0]["results"][0]
    assert values(file) == {
        ("wikitext", None, None, "perplexity"): 12.5,
        ("nyu-mll/glue", "mrpc", "validation", "recall"): 0.2,
        ("nyu-mll/glue", "mrpc", "test", "f1"): 0.3,
        ("nyu-mll/glue", "mrpc", "validation", "accuracy"): 0.70123,
        ("nyu-mll/glue", "mrpc", "validation", "f1"): 0.80456,
    }
    assert text.startswith("# Mine\n\nWords of my own, ünicode | and a pipe.\n\n")


def test_again_changes_nothing_and_new_results_replace_old(tmp_path):
    (tmp_path / "README.md").write_text(FOREIGN, encoding="utf-8")
    file = update_card(tmp_path, [entry()])
    once = file.read_bytes()
    assert update_card(tmp_path, [entry()]).read_bytes() == once
    with file.open("a") as opened:
        opened.write("\nWords behind.\n")
    update_card(tmp_path, [entry(accuracy=0.9, f1=0.95)])
    text = front_and_text(file)[1]
    assert text.startswith("# Mine\n") and text.endswith("\nWords behind.\n")
    assert text.count("## Fine-tuned on GLUE") == 1
    assert "0.7012" not in text
    assert values(file)["nyu-mll/glue", "mrpc", "validation", "accuracy"] == 0.9


def test_tasks_may_come_one_after_the_other(tmp_path):
    update_card(tmp_path, [entry("rte", accuracy=0.6)])
    one_by_one = update_card(tmp_path, [entry("cola", matthews_correlation=0.2)]).read_text()
    assert [row[0] for row in cells(tmp_path / "README.md")] == ["CoLA", "RTE"]
    update_card(tmp_path, [entry("rte", accuracy=0.6)])
    assert [row[0] for row in cells(tmp_path / "README.md")] == ["CoLA", "RTE"]
    assert set(values(tmp_path / "README.md").values()) == {0.6, 0.2}
    assert sorted(one_by_one.splitlines()) == sorted((tmp_path / "README.md").read_text().splitlines())


def test_every_score_of_the_table_has_its_seeds_and_interval(tmp_path):
    tried = entry("rte", degenerate=1, accuracy=0.6) | {"settings_tried": 12}
    file = update_card(tmp_path, [entry(), tried])
    assert cells(file) == [
        ["MRPC", "accuracy", "0.7012", "0.6812 to 0.7212", "3",
         "learning rate 5e-05, batch 32, 3 epochs", "pre-ln, step 1200"],
        ["MRPC", "F1", "0.8046", "0.7846 to 0.8246", "3",
         "learning rate 5e-05, batch 32, 3 epochs", "pre-ln, step 1200"],
        ["RTE", "accuracy", "0.6000", "0.5800 to 0.6200", "3 (1 predicted one class)",
         "learning rate 5e-05, batch 32, 3 epochs; best of 12 on this split", "pre-ln, step 1200"],
    ]  # fmt: skip


def test_undefined_values_are_dashes_and_not_in_the_metadata(tmp_path):
    undefined = entry("stsb", pearson=None, spearmanr=None)
    file = update_card(tmp_path, [undefined])
    assert "model-index" not in front_and_text(file)[0]
    ModelCard.load(file)
    file = update_card(tmp_path, [undefined, entry(n=1)])
    assert [row[2:5] for row in cells(file)] == [
        ["0.7012", "–", "1"],
        ["0.8046", "–", "1"],
        ["–", "–", "3"],
        ["–", "–", "3"],
    ]
    assert {key[1] for key in values(file)} == {"mrpc"}


def test_the_card_of_a_run_keeps_its_table(tmp_path):
    args = build_arguments({})
    facts = {
        "model_config": {"norm_placement": "pre"},
        "unigram_cross_entropy": 7.0,
        "mask_fingerprint": "f00",
    }
    record = describe_run(args, build_stages(args), 1, **facts, corpus_fingerprints=["a1b2"])
    results = {"step": 12, "tokens_seen": 100, "validation_loss": 6.5, "validation_accuracy": 0.1}
    (tmp_path / "README.md").write_text(model_card("mine", record, results, has_figure=False))
    before = ModelCard.load(tmp_path / "README.md")
    after = ModelCard.load(update_card(tmp_path, [entry()]))
    assert after.text.startswith(before.text.rstrip())
    assert after.data.tags == before.data.tags and after.data.pipeline_tag == "fill-mask"
    assert after.data.model_name == "mine"
    assert after.data.eval_results[:2] == before.data.eval_results and len(after.data.eval_results) > 2


def test_line_endings_stay(tmp_path):
    file = tmp_path / "README.md"
    file.write_bytes(FOREIGN.replace("\n", "\r\n").encode())
    update_card(tmp_path, [entry()])
    update_card(tmp_path, [entry("rte", accuracy=0.6)])
    content = file.read_bytes()
    assert content.count(b"\r\n") == content.count(b"\n")
    assert {key[1] for key in values(file)} == {None, "mrpc", "rte"}


def test_an_interrupted_write_leaves_the_old_card(tmp_path, monkeypatch):
    file = tmp_path / "README.md"
    file.write_text(FOREIGN, encoding="utf-8")
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        update_card(tmp_path, [entry()])
    assert file.read_text(encoding="utf-8") == FOREIGN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"---\nmodel-index:\n- name: x\n  results:\n  - task: {}\n---\n", "mend the card"),
        (b"---\n- a list\n---\n", "mend the card"),
        (b"---\na: [\n---\n", "mend the card"),
        (b"\xff\xfe", "mend the card"),
        (b"# x\n<!-- GLUE results: start -->\nwords\n", "are no pair"),
        (b"# x\n<!-- GLUE results: end -->\n<!-- GLUE results: start -->\n", "are no pair"),
    ],
)
def test_a_card_that_cannot_be_read_is_left_alone(tmp_path, content, message):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(UserError, match=message):
        update_card(tmp_path, [entry()])
    assert (tmp_path / "README.md").read_bytes() == content


def test_a_card_speaks_for_one_model_and_one_setting(tmp_path):
    with pytest.raises(UserError, match="give those of one model"):
        update_card(tmp_path, [entry(), entry("rte", fingerprint="def", accuracy=0.6)])
    with pytest.raises(UserError, match="mrpc occurs more than once"):
        update_card(tmp_path, [entry(), entry()])
    with pytest.raises(UserError, match="is no folder"):
        update_card(tmp_path / "absent", [entry()])
    assert list(tmp_path.iterdir()) == []
