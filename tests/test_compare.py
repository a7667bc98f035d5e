"""recipes/compare.py as a user starts it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from recipes import compare
from recipes.errors import UserError
from recipes.pretraining import pretrain
from tests.conftest import ROOT, TINY


def run_compare(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["recipes/compare.py", *map(str, words)])
    return compare.main()


@pytest.fixture
def two_runs(tiny, tmp_path):
    """Post-LN and Pre-LN, ended."""
    for placement in ("post", "pre"):
        pretrain(tiny(norm_placement=placement, output_dir=str(tmp_path / placement)))
    return tmp_path / "post", tmp_path / "pre"


def test_a_study_from_its_file_to_its_report(tmp_path, corpus_dir, cache_dir):
    """A second process: the YAML, an option on the command line, and the page that shows every arm."""
    table = {"base": TINY, "arms": [{"norm_placement": ["post", "pre"]}], "seeds": [1]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
    command = [sys.executable, str(ROOT / "recipes/compare.py"), "--config", "mine.yaml", "--max_steps=4"]
    command += ["--train_file", str(corpus_dir), "--cache_dir", str(cache_dir), "--parallel_runs", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wrote output/mine/report/index.html" in done.stdout
    page = (tmp_path / "output/mine/report/index.html").read_text()
    losses = {}
    for arm in ("post", "pre"):
        folder = tmp_path / f"output/mine/runs/norm_placement={arm}/seed-1"
        results = json.loads((folder / "run.json").read_text())["results"]
        assert results["step"] == 4
        losses[arm] = f"{results['validation_loss']:.4f}"
        assert losses[arm] in page
    assert losses["post"] != losses["pre"]


def test_runs_that_are_there_already(monkeypatch, two_runs, tmp_path):
    before = {f: f.read_bytes() for run in two_runs for f in run.rglob("*") if f.is_file()}
    assert run_compare(monkeypatch, *two_runs, "--output_dir", tmp_path / "out") == 0
    page = (tmp_path / "out/report/report.md").read_text()
    for run in two_runs:
        loss = json.loads((run / "run.json").read_text())["results"]["validation_loss"]
        assert f"{loss:.4f}" in page
    assert {f: f.read_bytes() for run in two_runs for f in run.rglob("*") if f.is_file()} == before


def test_a_reference_written_and_compared_with(monkeypatch, tiny, two_runs, tmp_path, capsys):
    """The run of the reference itself is inside; the same run on other masks is refused."""
    for seed in (1, 2):
        pretrain(tiny(seed=seed, output_dir=str(tmp_path / f"seed-{seed}")))
    runs = [tmp_path / "seed-1", tmp_path / "seed-2"]
    file = tmp_path / "reference.json"
    out = ["--output_dir", tmp_path / "out"]
    assert run_compare(monkeypatch, *runs, *out, "--write_reference", file) == 0
    capsys.readouterr()
    assert run_compare(monkeypatch, runs[0], "--against", file, *out) == 0
    assert "inside" in capsys.readouterr().out
    pretrain(tiny(max_eval_samples=20, output_dir=str(tmp_path / "other")))
    assert run_compare(monkeypatch, tmp_path / "other", "--against", file, *out) == 2
    assert "validation masks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --config"),
        (["run", "--config", "study.yaml"], "give either --config"),
        (["run", "--train_file", "x"], "train_file: only together with --config"),
        (
            ["--config", "study.yaml", "--learning_rat", "1"],
            "--learning_rat: unknown option; did you mean lea",
        ),
        (
            ["--config", "study.yaml", "--report_onl"],
            "--report_onl: unknown option; did you mean report_only",
        ),
        (["--config", "study.yaml", "--parallel_runs", "0"], "parallel_runs 0: must be at least 1"),
        (["--config", "study.yaml", "--against", "x"], "against x: needs the folders"),
        (["run", "--seeds", "1"], "seeds: only together with --config"),
        (["run", "--report_only"], "report_only: only together with --config"),
        (["run", "--against", "x", "--write_reference", "y"], "write_reference: not together with against"),
        (["--config", "study.yaml", "--seeds", "a"], "argument --seeds: invalid int value: 'a'"),
    ],
)
def test_mistakes_are_named(words, message):
    with pytest.raises(UserError, match=message):
        compare.parse_command_line(words)


def test_nothing_but_a_reference_is_overwritten_by_one(monkeypatch, two_runs, tmp_path, capsys):
    (tmp_path / "thesis.md").write_text("precious")
    assert run_compare(monkeypatch, *two_runs, "--write_reference", tmp_path / "thesis.md") == 2
    assert "not a reference" in capsys.readouterr().err
    assert (tmp_path / "thesis.md").read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "runs nowhere: holds no run.json"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["nowhere", "--against", "nothing"], "against nothing"),
    ],
)
def test_mistakes_end_with_2_and_leave_nothing(monkeypatch, tmp_path, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert run_compare(monkeypatch, *words) == 2
    assert message in capsys.readouterr().err
    assert list(Path().iterdir()) == []
