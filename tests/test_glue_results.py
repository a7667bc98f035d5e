"""Fine-tuned scores in the comparison of the runs that they belong to."""

import json
import sys

import pytest

from glue_eval.results import summarise
from recipes import compare
from recipes.errors import UserError
from recipes.glue_results import read_tracks
from tests.glue_fixtures import make_result, make_track
from tests.study_fixtures import curve, write_run


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two runs beside a results.json with their scores and those of a third."""
    monkeypatch.chdir(tmp_path)
    for placement in ("pre", "post"):
        write_run(f"output/{placement}", 1, curve(4.0), norm_placement=placement)
    rising = {100: [0.60, 0.62, 0.61], 1000: [0.70, 0.71, 0.72]}
    results = [r for run in ("pre", "post", "other") for r in make_track(f"output/{run}", run, rising)]
    results += make_track("output/pre", "pre", {100: [0.5, 0.5], 1000: [0.5, 0.5]}, task="rte")
    (tmp_path / "results.json").write_text(json.dumps({"results": summarise(results)}))
    return tmp_path


def run_compare(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
    return compare.main()


def test_scores_join_the_report_of_their_runs(runs, monkeypatch):
    words = ["output/pre", "output/post", "--output_dir", "report_of_both"]
    assert run_compare(monkeypatch, *words, "--glue_results", "results.json") == 0
    report = runs / "report_of_both" / "report"
    text = (report / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| mrpc", "| rte"))]
    assert sorted(rows) == [
        "| mrpc | post, seed 1 | 100 | 0.6100 [0.5852, 0.6348] | 1,000 | 0.7100 [0.6852, 0.7348] | above |",
        "| mrpc | pre, seed 1 | 100 | 0.6100 [0.5852, 0.6348] | 1,000 | 0.7100 [0.6852, 0.7348] | above |",
        "| rte | pre, seed 1 | 100 | 0.5000 [0.5000, 0.5000] | 1,000 | 0.5000 [0.5000, 0.5000] "
        "| the intervals overlap |",
    ]
    assert (report / "glue.png").exists()
    page = (report / "index.html").read_text()
    for words in ("mrpc: score", "rte: validation loss", "update of pre-training"):
        assert words in page


def test_without_scores_the_report_has_no_such_section(runs, monkeypatch):
    assert run_compare(monkeypatch, "output/pre", "output/post", "--output_dir", "plain") == 0
    assert "GLUE" not in (runs / "plain" / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("{}", "is no results.json"),
        ("[1", "is no results.json"),
        (
            json.dumps({"results": summarise([make_result()])}),
            "holds two or more checkpoints of no run .*: none",
        ),
    ],
)
def test_a_file_that_does_not_belong_to_the_runs(tmp_path, text, message):
    file = tmp_path / "results.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=f"glue_results {file}: {message}"):
        read_tracks(file, [tmp_path / "run"])
