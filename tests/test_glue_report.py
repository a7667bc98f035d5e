"""From finished runs to tables, results.json and the trajectory."""

import json
import statistics

import pytest
from scipy import stats

from glue_eval.report import result_line, table_lines, trajectory_lines, write_report
from glue_eval.results import summarise
from recipes.glue_results import trajectories
from tests.glue_fixtures import make_model, make_result, make_track

SETTINGS = {"load_best_model_at_end": False}
SCORES = [0.71, 0.74, 0.69]


def test_mean_deviation_and_interval_are_those_of_the_seeds():
    (entry,) = summarise([make_result(seed=i, score=s) for i, s in enumerate(SCORES, 1)])
    low, high = stats.t.interval(0.95, 2, statistics.mean(SCORES), stats.sem(SCORES))
    assert entry["mean"]["f1"] == pytest.approx(statistics.mean(SCORES))
    assert entry["std"]["f1"] == pytest.approx(statistics.stdev(SCORES))
    assert entry["interval"]["f1"] == pytest.approx([low, high])
    assert [row["accuracy"] for row in entry["seeds"]] == SCORES
    assert entry["n"] == 3


def test_one_seed_has_no_interval():
    (entry,) = summarise([make_result()])
    assert entry["interval"]["score"] == [None, None] and entry["std"]["score"] is None
    (line,) = table_lines([entry])
    assert "1 seed: no interval" in line


def test_the_best_setting_is_selected_among_the_complete_ones():
    results = [make_result(seed=i, score=0.6, learning_rate=1e-5) for i in (1, 2)]
    results += [make_result(seed=i, score=0.7, learning_rate=2e-5) for i in (1, 2)]
    results += [make_result(seed=1, score=0.9, learning_rate=3e-5)]  # a second seed is missing
    entries = summarise(results)
    (best,) = [entry for entry in entries if entry["selected"]]
    assert best["setting"]["learning_rate"] == 2e-5
    assert {entry["settings_tried"] for entry in entries} == {3}
    assert "best of 3 settings" in next(table_lines(entries))


def test_a_score_that_is_not_defined_leaves_the_mean_undefined():
    (entry,) = summarise([make_result("stsb", 1, 0.8), make_result("stsb", 2, None)])
    assert entry["mean"]["pearson"] is None and entry["diverged"] == 1
    assert "–" in next(table_lines([entry]))


def test_degenerate_runs_are_counted_and_flagged():
    runs = [make_result(seed=1, degenerate=True), make_result(seed=2)]
    (entry,) = summarise(runs)
    assert entry["degenerate"] == 1
    assert "degenerate" in result_line(runs[0]) and "degenerate" not in result_line(runs[1])
    assert "1 degenerate" in next(table_lines([entry]))


def test_models_and_tasks_are_kept_apart():
    other = make_model("output/post")
    results = [make_result(), make_result(model=other), make_result("rte")]
    entries = summarise(results)
    assert [(e["task"], e["model"]["name"]) for e in entries] == [
        ("mrpc", "output/post"),
        ("mrpc", "output/pre"),
        ("rte", "output/pre"),
    ]
    assert all(entry["selected"] for entry in entries)


def track():
    rising = {100: [0.60, 0.62, 0.61], 900: [0.70, 0.71, 0.72], 2000: [0.75, 0.76, 0.77]}
    flat = {100: [0.60, 0.70, 0.65], 2000: [0.61, 0.71, 0.66]}
    return make_track("output/pre", "pre", rising) + make_track("output/post", "post", flat)


def test_a_trajectory_is_in_the_order_of_steps():
    tracks = trajectories(summarise(track()))
    steps = {track.run: track.steps.tolist() for track in tracks}
    assert steps == {"output/pre": [100, 900, 2000], "output/post": [100, 2000]}


def test_first_and_last_checkpoint_are_compared_by_their_intervals():
    lines = {line.split(":")[0]: line for line in trajectory_lines(trajectories(summarise(track())))}
    assert lines["mrpc, output/pre"].endswith(": above")
    assert lines["mrpc, output/post"].endswith(": the intervals overlap")
    falling = make_track("output/x", "pre", {1: [0.9, 0.91], 2: [0.1, 0.11]})
    (line,) = trajectory_lines(trajectories(summarise(falling)))
    assert line.endswith(": BELOW")


def test_the_files_of_a_report(tmp_path):
    scratch = make_model("output/pre, from scratch", run="output/pre", step=2000, from_scratch=True)
    results = track() + [make_result(seed=i, model=scratch, score=0.5 + i / 100) for i in (1, 2)]
    entries = summarise(results)
    names = [file.name for file in write_report(entries, SETTINGS, tmp_path)]
    assert names == ["results.json", "results.md", "trajectory.svg", "trajectory.png"]
    kept = json.loads((tmp_path / "results.json").read_text())
    assert (kept["results"], kept["settings"]) == (entries, SETTINGS)
    figure = (tmp_path / "trajectory.svg").read_text()
    for words in (
        "output/pre (pre)",
        "output/post (post)",
        "from scratch",
        "update of pre-training",
        "validation loss",
    ):
        assert words in figure
    text = (tmp_path / "results.md").read_text()
    assert (
        "| mrpc | output/pre/checkpoint-900 | learning rate 5e-05, batch 32, 3 epochs | accuracy | 0.7100 |"
        in text
    )
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table if "accuracy" in line}) == 1


def test_the_best_epoch_is_said_to_be_chosen(tmp_path):
    write_report(summarise([make_result()]), {"load_best_model_at_end": True}, tmp_path)
    assert "the epoch with the best validation score" in (tmp_path / "results.md").read_text()
    write_report(summarise([make_result(seed=2)]), SETTINGS, tmp_path)
    assert "The last epoch is reported" in (tmp_path / "results.md").read_text()


def test_how_inputs_were_cut_is_said(tmp_path):
    write_report(summarise([make_result()]), SETTINGS | {"max_seq_length": 32, "bf16": False}, tmp_path)
    assert "Inputs of at most 32 tokens; trained in float32." in (tmp_path / "results.md").read_text()


def test_runs_of_one_class_are_marked_where_they_are_read_first(tmp_path):
    write_report(summarise([make_result(degenerate=True), make_result(seed=2)]), SETTINGS, tmp_path)
    assert "(1 of 2 degenerate) |" in (tmp_path / "results.md").read_text().split("## Metrics")[0]


def test_settings_of_a_grid_are_told_apart_whatever_they_vary(tmp_path):
    results = [
        make_result(weight_decay=decay, warmup_steps=share) for decay in (0.0, 0.01) for share in (0.1, 5.0)
    ]
    write_report(summarise(results), SETTINGS, tmp_path)
    rows = [line for line in (tmp_path / "results.md").read_text().splitlines() if "| accuracy |" in line]
    assert len({row.replace("*", "") for row in rows}) == 4


def test_a_model_in_two_spellings_of_its_path_is_one(tmp_path):
    here, there = make_model("out/m", fingerprint="a"), make_model("/home/out/m", fingerprint="a")
    (entry,) = summarise([make_result(seed=1, model=here), make_result(seed=2, model=there)])
    assert entry["n"] == 2


@pytest.mark.parametrize("damage", ["results.md", "results.json"])
def test_a_report_that_is_not_whole_is_written_again(tmp_path, damage):
    entries = summarise(track())
    write_report(entries, SETTINGS, tmp_path)
    whole = (tmp_path / damage).read_text()
    if damage == "results.md":
        (tmp_path / damage).unlink()
    else:
        (tmp_path / damage).write_text(whole[:50])
    assert write_report(entries, SETTINGS, tmp_path)
    assert (tmp_path / damage).read_text() == whole


def test_a_report_that_would_not_change_is_not_written(tmp_path):
    entries = summarise(track())
    assert write_report(entries, SETTINGS, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert write_report(entries, SETTINGS, tmp_path) == []
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
