"""Studies as they run: what is finished is kept, what was interrupted resumes, divergence is a result."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from recipes import compare, study_runner
from recipes.errors import UserError
from recipes.study import read_study
from recipes.study_runner import check_runs, run_study
from tests.conftest import ROOT, TINY, metrics_of

LONGER = {"max_steps": 150, "save_steps": 25, "eval_steps": 75}
ARMS = [
    {"norm_placement": ["post", "pre"], "learning_rate": 1e-3},
    {"norm_placement": "post", "learning_rate": 1e30},
]


@pytest.fixture
def study(tmp_path, corpus_dir, cache_dir):
    """Makes a small study of the given arms and seeds."""

    def make(arms=ARMS, seeds=(1,), **base):
        table = {
            "base": TINY | {"train_file": str(corpus_dir), "cache_dir": str(cache_dir)} | base,
            "arms": arms,
            "seeds": list(seeds),
        }
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(table, sort_keys=False))
        return read_study(tmp_path / "mine.yaml", {}, output_dir=tmp_path / "study")

    return make


def contents(folder):
    files = (f for f in folder.rglob("*") if f.is_file() and f.name != ".lock")
    return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}


def test_every_run_comes_to_its_end_and_is_then_left_alone(study, capsys):
    """Arms share data, order and masks; an arm that is added later is run, and the others are kept."""
    mine = study()
    assert run_study(mine, parallel_runs=2) == []
    records = [json.loads((mine.folder(arm, 1) / "run.json").read_text()) for arm in mine.arms]
    assert [record["results"]["diagnosis"] for record in records] == ["plateau", "plateau", "diverged"]
    for shared in ("corpus_fingerprints", "tokenizer_fingerprint", "mask_fingerprint"):
        assert len({str(record[shared]) for record in records}) == 1
    before = contents(mine.output_dir)
    added = study([*ARMS, {"norm_placement": "pre", "learning_rate": 2e-3}])
    assert run_study(added, parallel_runs=1) == []
    after = contents(mine.output_dir)
    assert {file: after[file] for file in before} == before
    assert (added.folder(added.arms[3], 1) / "model.safetensors").exists()
    assert "done: pre, learning_rate 0.002, seed 1" in capsys.readouterr().out


def test_runs_of_other_settings_are_refused_before_anything_is_trained_or_reported(study, monkeypatch):
    mine = study([{"norm_placement": "post"}], max_steps=4)
    run_study(mine, parallel_runs=1)
    check_runs(mine)
    before = contents(mine.output_dir)
    other = study([{"norm_placement": "post"}], max_steps=4, weight_decay=0.5)
    with pytest.raises(UserError, match=r"weight_decay is 0\.5, was 0\.01"):
        check_runs(other)
    monkeypatch.setattr(sys, "argv", ["compare.py", "--config", str(mine.output_dir.parent / "mine.yaml")])
    sys.argv += ["--output_dir", str(mine.output_dir), "--report_only"]
    assert compare.main() == 2
    assert contents(mine.output_dir) == before


def test_divergence_on_several_processes_is_a_result(study, monkeypatch):
    """The launcher turns the run's exit code into that of a failure."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    mine = study([{"learning_rate": 1e30}], num_processes=2)
    assert run_study(mine, parallel_runs=1) == []
    record = json.loads((mine.folder(mine.arms[0], 1) / "run.json").read_text())
    assert (record["num_processes"], record["results"]["diagnosis"]) == (2, "diverged")


def test_more_gpus_than_there_are_cannot_be_used(study, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(UserError, match=r"parallel_runs 2: .* need 4 GPUs, and there are 3"):
        run_study(study(num_processes=2), parallel_runs=2)


def test_a_run_of_a_study_is_the_run_of_the_command_line(study, launch, tmp_path):
    mine = study([{"norm_placement": "post", "weight_decay": 0.1}], seeds=(7,))
    run_study(mine, parallel_runs=1)
    options = {"norm_placement": "post", "weight_decay": 0.1, "seed": 7}
    launch(output_dir=tmp_path / "alone", env={"OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}, **options)
    assert metrics_of(mine.folder(mine.arms[0], 7)) == metrics_of(tmp_path / "alone")


def test_a_run_that_fails_is_reported_and_the_others_go_on(study, capsys):
    mine = study(ARMS[:1])
    folder = mine.folder(mine.arms[0], 1)
    folder.mkdir(parents=True)
    (folder / "thesis.tex").write_text("precious")
    (failure,) = run_study(mine, parallel_runs=1)
    assert "failed: post, learning_rate 0.001, seed 1: error: output_dir" in failure
    assert "holds files but no run" in failure
    assert [file.name for file in folder.iterdir()] == ["thesis.tex"]
    assert (mine.folder(mine.arms[1], 1) / "model.safetensors").exists()


def test_an_interrupted_study_leaves_no_process_and_resumes(study, tmp_path):
    """It ends with the figures of a study that was not interrupted."""
    mine = study(ARMS[:1], **LONGER)
    command = [sys.executable, str(ROOT / "recipes/compare.py"), "--config", str(tmp_path / "mine.yaml")]
    command += ["--output_dir", str(mine.output_dir), "--parallel_runs", "2"]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    folders = [mine.folder(arm, 1) for arm in mine.arms]
    while not (saved := [folder for folder in folders if list(folder.glob("checkpoint-*"))]):
        time.sleep(0.05)
        assert started.poll() is None
    os.kill(started.pid, signal.SIGTERM)
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 130
    assert "the same command continues" in errors
    seen = [len(metrics_of(folder)) for folder in saved]
    assert not any("results" in json.loads((folder / "run.json").read_text()) for folder in saved)
    time.sleep(1)
    assert seen == [len(metrics_of(folder)) for folder in saved]  # nobody trains on
    assert run_study(mine, parallel_runs=1) == []
    assert all("Continuing from" in folder.with_suffix(".log").read_text() for folder in saved)
    whole = study([mine.arms[0].options | {"warmup_steps": 0}], **LONGER)  # another name, the same run
    run_study(whole, parallel_runs=1)
    assert metrics_of(whole.folder(whole.arms[0], 1)) == metrics_of(folders[0])


def test_places_share_cores_and_have_gpus_of_their_own(monkeypatch):
    monkeypatch.setattr(study_runner, "usable_cores", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    shares = [study_runner._resources(place, parallel_runs=2, processes=2) for place in range(2)]
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares] == ["4,5", "6,7"]
    assert {share["OMP_NUM_THREADS"] for share in shares} == {"4"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in study_runner._resources(0, 2, 2)
