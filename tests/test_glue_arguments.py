"""Options of fine-tuning: what is refused, and what a grid is."""

import pytest
import yaml

from glue_eval.arguments import Setting, build_glue_arguments, parse_glue_arguments
from glue_eval.tasks import TASKS, check_labels
from recipes.errors import UserError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "task: is needed; allowed: all, cola"),
        (["--task", "mrcp"], "task 'mrcp': did you mean mrpc?"),
        (["--task", "SST-2"], "task 'SST-2': did you mean sst2?"),
        (["--task", "mrpc,imdb"], "task 'imdb': allowed: all, cola"),
        (["--task", "ax"], "task 'ax': has no labels to score; for its predictions give --submission"),
        (["--task", "mrpc", "--seeds", "0"], "seeds 0: must be at least 1"),
        (["--task", "mrpc", "--seeds", "many"], "seeds 'many': must be of type int"),
        (["--task", "mrpc", "--leaning_rate", "1"], "unknown option; did you mean learning_rate?"),
        (["--task", "mrpc", "--num_train_epochs", "0"], "num_train_epochs 0: must be at least 1"),
        (["--task", "mrpc", "--grid", "nowhere.yaml"], "grid nowhere.yaml: no such file"),
        (["--task", "mrpc", "--run_dir", "a", "--model_name_or_path", "b"], "run_dir a: not together with"),
        (["--task", "cola", "--from_task_checkpoint", "a"], "cola does not start from a model of MNLI"),
        (
            ["--task", "rte", "--from_task_checkpoint", "a", "--model_name_or_path", "b"],
            "model_name_or_path: not together with from_task_checkpoint",
        ),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(UserError) as error:
        parse_glue_arguments(words)
    assert message in str(error.value)


def test_tasks_come_in_the_order_of_the_table():
    assert [t.name for t in parse_glue_arguments(["--task", "rte, mrpc"]).tasks] == ["mrpc", "rte"]
    everything = [t.name for t in parse_glue_arguments(["--task", "all"]).tasks]
    assert everything == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]


def test_the_diagnostic_set_brings_the_task_that_predicts_it():
    tasks = parse_glue_arguments(["--task", "ax", "--submission", "out"]).tasks
    assert [task.name for task in tasks] == ["mnli", "ax"]
    assert parse_glue_arguments(["--task", "all", "--submission", "out"]).tasks[-1].name == "ax"


def test_the_paper_s_protocol():
    args = parse_glue_arguments(["--task", "mrpc", "--config", "paper"])
    settings = args.settings()
    assert args.seeds == 6
    assert {s.train_batch_size for s in settings} == {16, 32}
    assert {s.num_train_epochs for s in settings} == set(range(3, 9))
    rates = {s.learning_rate for s in settings}
    assert (min(rates), max(rates)) == (1e-5, 1e-4)
    assert len(settings) == 2 * 6 * len(rates) == len({s.name for s in settings})


def test_a_grid_is_all_combinations_over_the_single_setting(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"learning_rate": ["1e-4", 2e-4], "weight_decay": 0}))
    settings = parse_glue_arguments(["--task", "mrpc", "--grid", str(file), "--seeds", "2"]).settings()
    assert settings == [
        Setting(learning_rate=1e-4, weight_decay=0),
        Setting(learning_rate=2e-4, weight_decay=0),
    ]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"learning_rates": [1]}, "grid learning_rates: unknown option; did you mean learning_rate?"),
        ({"num_train_epochs": [3, 0]}, "num_train_epochs 0: must be at least 1"),
        ({"num_train_epochs": [2.5]}, "num_train_epochs 2.5: must be of type int"),
        ({"learning_rate": []}, "grid learning_rate []: give at least one value"),
        ({"seeds": [1, 2]}, "grid seeds: unknown option"),
    ],
)
def test_mistakes_in_a_grid_are_named(grid, message):
    with pytest.raises(UserError) as error:
        build_glue_arguments({"task": "mrpc", "grid": grid})
    assert message in str(error.value)


def test_every_setting_has_a_folder_of_its_own():
    settings = [Setting(), Setting(learning_rate=1e-4), Setting(weight_decay=0.1), Setting(warmup_steps=5)]
    assert len({setting.name for setting in settings}) == 4


@pytest.mark.parametrize(
    ("task", "labels", "row"),
    [("mrpc", [0, 1, 2], 2), ("mnli", [2, -1], 1), ("stsb", [0.0, 5.0, 5.2], 2), ("rte", [0.5], 0)],
)
def test_labels_out_of_range(task, labels, row):
    with pytest.raises(UserError, match=f"label {labels[row]} in row {row}"):
        check_labels(TASKS[task], labels, task)
