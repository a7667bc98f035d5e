"""Studies: which runs they are, what they share, and what they refuse before anything runs."""

from pathlib import Path

import pytest
import yaml

from recipes.errors import UserError
from recipes.study import read_study
from tests.conftest import ROOT, TINY

STREAM = {"streaming": True, "dataset_name": "some/text"}
CONFIGS = ROOT / "recipes" / "configs"


@pytest.fixture
def write(tmp_path):
    """Writes a study's YAML."""

    def to_file(**table):
        file = tmp_path / "mine.yaml"
        file.write_text(
            yaml.safe_dump({"base": TINY, "arms": [{"norm_placement": "post"}]} | table, sort_keys=False)
        )
        return file

    return to_file


def test_the_lists_of_a_table_are_multiplied_out_and_tables_added(write):
    arms = [
        {"norm_placement": ["post", "pre"], "learning_rate": ["1e-4", 3e-3], "warmup_steps": 5},
        {"norm_placement": "pre", "learning_rate": 1.0},
    ]
    study = read_study(write(arms=arms, seeds=[3, 4]), {})
    settings = [(a.options["norm_placement"], a.options["learning_rate"]) for a in study.arms]
    assert settings == [("post", 1e-4), ("post", 3e-3), ("pre", 1e-4), ("pre", 3e-3), ("pre", 1.0)]
    assert study.arms[0].name == "norm_placement=post,learning_rate=0.0001,warmup_steps=5"
    assert study.arms[0].label == "post, learning_rate 0.0001, warmup_steps 5"
    folders = {study.folder(arm, seed) for arm in study.arms for seed in study.seeds}
    assert len(folders) == 10
    assert study.folder(study.arms[4], 3) == Path(
        "output/mine/runs/norm_placement=pre,learning_rate=1/seed-3"
    )


def test_a_value_that_is_a_table_is_shown_to_people_and_hidden_in_names(write):
    table = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"min_lr_ratio": 0.125}}
    (arm,) = read_study(write(arms=[table]), {}).arms
    assert "min_lr_ratio" in arm.label and "0.125" in arm.label
    assert not set(arm.name) & set("{}' /:")


def test_an_option_that_is_a_list_is_a_list_in_a_list(write):
    stages = [[{"steps": 12, "max_seq_length": 16}], [{"steps": 12, "max_seq_length": 32}]]
    study = read_study(write(arms=[{"stages": stages}]), {})
    assert [arm.options["stages"] for arm in study.arms] == stages
    assert study.arms[0].name != study.arms[1].name


def test_layers_default_run_then_config_then_base_then_command_line_then_arm(write, tmp_path):
    (tmp_path / "below.yaml").write_text("weight_decay: 0.5\nadam_beta1: 0.5\nwarmup_steps: 1\n")
    base = {"config": "below.yaml", "adam_beta1": 0.6, "max_steps": 12, "adam_beta2": 0.7}
    study = read_study(write(base=base), {"adam_beta2": "0.8"}, seeds=[9])
    args = study.arguments(study.arms[0], 9)
    assert args.vocab_size == 8192  # of the default run
    assert (args.weight_decay, args.adam_beta1, args.adam_beta2) == (0.5, 0.6, 0.8)
    assert (args.model["norm_placement"], args.seed, args.warmup_steps) == ("post", 9, 1)


def test_confound_has_both_placements_at_both_rates():
    study = read_study(CONFIGS / "confound.yaml", {}, seeds=[1])
    runs = [study.arguments(arm, 1) for arm in study.arms]
    settings = {(run.model["norm_placement"], run.learning_rate, run.warmup_steps) for run in runs}
    assert settings >= {(p, rate, 10_000) for p in ("post", "pre") for rate in (1e-4, 3e-4)}


def test_the_small_studies_differ_in_rates_and_seeds_only():
    small, cpu = (read_study(CONFIGS / f"compare_{name}.yaml", {}) for name in ("small", "cpu"))
    assert small.base == cpu.base
    assert {arm.name for arm in small.arms} < {arm.name for arm in cpu.arms}
    assert (len(small.arms), len(small.seeds), len(cpu.arms), len(cpu.seeds)) == (4, 1, 12, 3)


def test_xiong2020_is_as_in_the_paper():
    """Section 4.1: Post-LN at 1e-4 with 10,000 updates of warm-up and at 3e-4, Pre-LN at 3e-4 without."""
    study = read_study(CONFIGS / "xiong2020_bert.yaml", {})
    runs = [study.arguments(arm, 1) for arm in study.arms]
    settings = [(run.model["norm_placement"], run.learning_rate, run.warmup_steps) for run in runs]
    assert settings == [("post", 1e-4, 10_000), ("post", 3e-4, 10_000), ("pre", 3e-4, 0)]
    size = {(run.model["num_hidden_layers"], run.model["hidden_size"], run.max_steps) for run in runs}
    assert size == {(12, 768, 1_000_000)}


def test_the_warmup_ablation_crosses_warmup_rate_and_optimiser():
    study = read_study(CONFIGS / "warmup_ablation.yaml", {})
    runs = [study.arguments(arm, 1) for arm in study.arms]
    assert len({(run.optim, run.learning_rate, run.warmup_steps) for run in runs}) == 18
    assert {run.optim for run in runs} == {"adamw_torch_fused", "radam", "sgd"}
    assert len({run.warmup_steps for run in runs}) == 3
    assert {run.model["norm_placement"] for run in runs} == {"post"}


@pytest.mark.parametrize(
    ("table", "overrides", "message"),
    [
        ({"arm": []}, {}, "arm: unknown; did you mean arms"),
        ({"arms": []}, {}, "arms .*must be a list of tables"),
        ({"arms": ["post"]}, {}, "arms .*must be a list of tables"),
        (
            {"arms": [{"norm_placment": "post"}]},
            {},
            "norm_placment: unknown option; did you mean norm_placement",
        ),
        ({"arms": [{"norm_placement": ["post", "past"]}]}, {}, "norm_placement=past, seed 0: .*'past'"),
        ({"arms": [{"norm_placement": ["post", "post"]}]}, {}, "norm_placement=post is there 2 times"),
        ({"arms": [{"learning_rate": "fast"}]}, {}, "learning_rate 'fast': must be of type float"),
        ({"arms": [{"warmup_steps": 12}]}, {}, "warmup_steps 12: must be less than max_steps 12"),
        ({"arms": [{"mlm_probability": [0.1, 0.2]}]}, {}, "mlm_probability: must be the same for all arms"),
        ({"arms": [{"train_file": ["a", "b"]}]}, {}, "train_file: must be the same for all arms"),
        ({"arms": [{"isolate_documents": [True, False]}]}, {}, "isolate_documents: must be the same"),
        (
            {"base": TINY | STREAM, "arms": [{"max_steps": [12, 24]}]},
            {},
            "streaming true: .*different amounts",
        ),
        ({"arms": [{"seed": [1, 2]}]}, {}, "seed: is set by the study"),
        ({"base": TINY | {"seed": 3}}, {}, "seed: is set by the study"),
        ({"base": [1]}, {}, r"base \[1\]: must be a table"),
        ({"base": {"config": "no.yaml"}}, {}, "no.yaml: no such file"),
        ({"seeds": []}, {}, r"seeds \[\]: must be a list of different integers"),
        ({"seeds": [1, 1]}, {}, "seeds .*different"),
        ({"seeds": ["a"]}, {}, "seed 'a': must be of type int"),
        ({}, {"norm_placement": "pre"}, "norm_placement pre: the arms of mine differ in it"),
        ({}, {"learning_rat": "1"}, "learning_rat: unknown option; did you mean learning_rate"),
    ],
)
def test_mistakes_are_named(write, table, overrides, message):
    with pytest.raises(UserError, match=message):
        read_study(write(**table), overrides)


def test_a_study_that_is_not_there():
    with pytest.raises(UserError, match=r"nowhere.yaml: no such file"):
        read_study(Path("nowhere.yaml"), {})
