"""A small kill campaign, and what its checks would notice."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import islice

import pytest

from tests.campaign import WAYS, plans
from tests.conftest import ROOT
from tests.evidence import complete_checkpoints, damaged_lines, sha256
from tests.forked import PLACES


def test_runs_that_are_killed_end_like_those_that_are_not(tmp_path):
    """Forked from a process of its own: this one has computed already."""
    words = ["--kills", "8", "--seed", "35520", "--launched", "0", "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaign", *words, "--folder", str(tmp_path / "runs")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["kills"] >= 8 and found["equal"] == found["runs"]
    assert set(found["kills_by_processes"]) == {"1", "2"}


@pytest.mark.parametrize("processes", [1, 2])
def test_every_place_meets_every_way_to_die(processes):
    met = Counter(
        (death.place, death.way) for plan in islice(plans(0, processes, False), 40) for death in plan.deaths
    )
    assert {place for place, _ in met} == set(PLACES)
    for way in ["SIGKILL", "SIGTERM", "SIGINT", "abort"] + ["out of memory"] * (processes > 1):
        assert all(met[place, way] for place in PLACES), way
    assert {way for _, way in met} <= set(WAYS)
    assert max(met.values()) - min(met.values()) <= 1


def test_a_seed_makes_the_same_plan():
    first, second = (list(islice(plans(7, 2, False), 5)) for _ in range(2))
    assert first == second
    assert first != list(islice(plans(8, 2, False), 5))


@pytest.fixture
def checkpoint(tmp_path):
    """A folder as a save leaves it, in the format and not by the code of recipes/."""
    folder = tmp_path / "checkpoint-3"
    (folder / "trainer").mkdir(parents=True)
    for name in ("model.safetensors", "trainer/optimizer.pt"):
        (folder / name).write_bytes(name.encode() * 9)
    files = {name: sha256(folder / name) for name in ("model.safetensors", "trainer/optimizer.pt")}
    (folder / "complete.json").write_text(json.dumps({"format": 1, "step": 3, "files": files}))
    return folder


def test_a_whole_checkpoint(checkpoint):
    assert complete_checkpoints(checkpoint.parent) == {3: None}


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"other"),
        lambda folder: (folder / "trainer" / "optimizer.pt").unlink(),
        lambda folder: (folder / "more").write_text("of it"),
        lambda folder: (folder / "complete.json").write_text("{"),
    ],
)
def test_a_marker_on_what_is_not_whole_is_noticed(checkpoint, harm):
    harm(checkpoint)
    assert complete_checkpoints(checkpoint.parent)[3]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"step": 1, "train_loss": 7}\n{"step": 2, "train_loss": 6}\n{"st', None),
        (
            '{"step": 4, "train_loss": 7}\n{"step": 4, "validation_loss": 7}\n{"step": 6, "train_loss": 5}\n',
            None,
        ),
        ('{"step": 1, "tra\n{"step": 2, "train_loss": 6}\n', "line 1 is damaged"),
        ('{"step": 2, "train_loss": 6}\n{"step": 2, "train_loss": 6}\n', "line 2 repeats step 2"),
    ],
)
def test_lines_that_cannot_be(tmp_path, text, words):
    (tmp_path / "metrics.jsonl").write_text(text)
    problems = damaged_lines(tmp_path / "metrics.jsonl")
    assert problems == ([] if words is None else [f"metrics.jsonl: {words}"])
