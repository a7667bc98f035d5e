"""Curves of runs that compare, and a refusal of those that do not."""

import json
import subprocess
import sys

import pytest

from recipes.arguments import UserError
from recipes.curves import read_runs, table
from tests.conftest import ROOT


@pytest.fixture
def run(tmp_path):
    def make(name, losses, masks="abc"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"unigram_cross_entropy": 6.5}))
        lines = [{"step": s, "validation_loss": v, "mask_fingerprint": masks} for s, v in losses.items()]
        text = "".join(json.dumps(line) + "\n" for line in [{"step": 1, "train_loss": 9.0}, *lines])
        (folder / "metrics.jsonl").write_text(text)
        return folder

    return make


def test_figure_and_table(run, tmp_path):
    folders = [run("pre", {100: 7.0, 200: 6.25}), run("post", {100: 7.5})]
    command = [sys.executable, str(ROOT / "recipes" / "curves.py"), *map(str, folders)]
    result = subprocess.run(
        [*command, "--output", str(tmp_path / "c.png")], capture_output=True, text=True, check=True
    )
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert result.stdout.split("\n")[2:4] == ["| 100 | 7.000 | 7.500 |", "| 200 | 6.250 |  |"]


def test_other_masks_are_refused(run):
    with pytest.raises(UserError, match="other masks"):
        read_runs([run("a", {1: 7.0}), run("b", {1: 7.0}, masks="xyz")])


def test_no_run(tmp_path, run):
    with pytest.raises(UserError, match=r"holds no run\.json"):
        read_runs([tmp_path])
    with pytest.raises(UserError, match="not been validated"):
        read_runs([run("a", {})])
    assert table(read_runs([run("b", {5: 1.0})])).endswith("| 5 | 1.000 |")
