"""Curves read from runs in any state."""

import json

import numpy as np
import pytest

from recipes.errors import UserError
from recipes.study_results import read_run, read_runs, read_study_curves
from tests.study_fixtures import FINGERPRINTS, UNIGRAM, curve, make_study, write_run

ARMS = {"post": {"norm_placement": "post"}, "pre": {"norm_placement": "pre"}}


def test_a_run_gives_its_columns_and_what_was_no_number_is_nan(tmp_path):
    run = read_run(write_run(tmp_path / "run", 3, [6.0, None, 5.0]))
    assert (run.seed, run.status, run.final_loss) == (3, "finished", 5.0)
    assert run.steps.tolist() == run.train["step"].tolist() == [100, 200, 300]
    assert np.array_equal(run.losses, [6.0, np.nan, 5.0], equal_nan=True)
    assert np.isnan(run.train["train_loss"][1])


def test_tokens_and_seconds_at_a_validation_lie_between_the_training_lines(tmp_path):
    folder = write_run(tmp_path / "run", 0, [6.0, 5.5, 5.0])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    # Logged at update 200 only: update 100 is between the start and there, 300 is told by the results.
    kept = [line for line in lines if "validation_loss" in line or line["step"] == 200]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    run = read_run(folder)
    assert run.at_validations("tokens_seen") == pytest.approx([102_400, 204_800, 307_200])
    assert run.at_validations("elapsed_seconds") == pytest.approx([10, 20, 30])


def test_every_state_of_a_run_is_told(tmp_path):
    study = make_study(tmp_path, ARMS, range(5))
    post, pre = study.arms
    write_run(study.folder(post, 0), 0, [6.0, None], diagnosis="diverged")
    write_run(study.folder(post, 1), 1, [6.9, 6.9], diagnosis="plateau")
    write_run(study.folder(post, 2), 2, [6.9], finished=False)
    write_run(study.folder(post, 3), 3, [6.9]).joinpath("run.json").write_text("{")
    statuses = [run.status for run in read_study_curves(study).arms[0].runs]
    assert statuses == [
        "diverged by update 200",
        "finished, plateau at update 200",
        "unfinished at update 100",
        "not readable",
        "not started",
    ]


def test_a_loss_that_rose_diverged_at_an_update_whatever_came_later(tmp_path):
    folder = write_run(tmp_path / "run", 0, [6.0, 6.5, None], diagnosis="diverged")
    file = folder / "run.json"
    record = json.loads(file.read_text())
    record["results"]["diagnosis_step"] = 200  # it rose before it was no number
    file.write_text(json.dumps(record))
    assert read_run(folder).status == "diverged at update 200"


def test_a_plateau_that_was_left_is_no_plateau(tmp_path):
    folder = write_run(tmp_path / "run", 0, [6.9, 6.5], finished=False, diagnosis="plateau")
    assert read_run(folder).diagnosis == "plateau"
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 300, "diagnosis": null}\n')
    assert read_run(folder).diagnosis is None


def test_a_study_without_runs_is_read(tmp_path):
    curves = read_study_curves(make_study(tmp_path, ARMS, [0, 1]))
    assert [arm.label for arm in curves.arms] == ["post", "pre"]
    assert np.isnan(curves.unigram_cross_entropy)
    assert all(len(arm.steps) == 0 for arm in curves.arms)


def test_means_are_over_finished_runs_that_did_not_diverge(tmp_path):
    study = make_study(tmp_path, ARMS, range(4))
    arm = study.arms[0]
    write_run(study.folder(arm, 0), 0, [6.0, 5.0])
    write_run(study.folder(arm, 1), 1, [6.2, 5.4])
    write_run(study.folder(arm, 2), 2, [9.0, None], diagnosis="diverged")
    write_run(study.folder(arm, 3), 3, [8.0], finished=False)
    curves = read_study_curves(study).arms[0]
    assert curves.losses.mean(0) == pytest.approx([6.1, 5.2])
    assert (len(curves.finished), len(curves.diverged)) == (3, 1)


def test_what_the_hardware_decided_is_common_only_where_it_is(tmp_path):
    study = make_study(tmp_path, ARMS, [0, 1])
    for seed in study.seeds:
        write_run(study.folder(study.arms[0], seed), seed, [6.0], bf16=seed == 0, torch_compile=True)
    curves = read_study_curves(study)
    assert "bf16" not in curves.common
    assert curves.common["torch_compile"] is True
    assert len(curves.arms) == 2


def test_runs_that_differ_in_the_seed_only_are_one_arm(tmp_path):
    folders = [
        write_run(tmp_path / f"{p}{seed}", seed, curve(5), norm_placement=p, learning_rate=rate)
        for p, rate in (("post", 1e-4), ("pre", 3e-4))
        for seed in (0, 1)
    ]
    curves = read_runs(folders)
    assert [(arm.label, len(arm.runs)) for arm in curves.arms] == [
        ("post, learning_rate 0.0001", 2),
        ("pre, learning_rate 0.0003", 2),
    ]
    assert curves.unigram_cross_entropy == UNIGRAM
    assert "learning_rate" not in curves.common
    assert curves.common["weight_decay"] == 0.01


def test_how_a_run_is_carried_out_makes_no_arm_and_a_lone_arm_is_named_by_its_folder(tmp_path):
    folders = [
        write_run(tmp_path / "alone", 0, curve(5), per_device_train_batch_size=16),
        write_run(tmp_path / "other", 1, curve(5), per_device_train_batch_size=8, cache_dir="elsewhere"),
    ]
    assert [arm.label for arm in read_runs(folders).arms] == ["alone"]


@pytest.mark.parametrize("key", FINGERPRINTS)
def test_losses_that_do_not_compare_are_refused(tmp_path, key):
    other = write_run(tmp_path / "b", 1, [5.0], fingerprints=FINGERPRINTS | {key: "other"})
    with pytest.raises(UserError, match="do not compare"):
        read_runs([write_run(tmp_path / "a", 0, [5.0]), other])


def test_a_folder_without_a_run_and_a_run_given_twice_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no run\.json"):
        read_runs([tmp_path])
    one = write_run(tmp_path / "a", 0, [5.0])
    with pytest.raises(UserError, match="same settings and seed"):
        read_runs([one, one])
