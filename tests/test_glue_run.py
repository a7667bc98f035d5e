"""`glue_eval/run.py` as a user starts it."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.conftest import ROOT, accelerate
from tests.glue_hub import GlueHub
from tests.glue_made_up import results_of, write_model_folder, write_task
from tests.hub_server import TOKEN, Hub

SLOW_START = 240  # seconds; imports alone take some


@pytest.fixture
def glue(tmp_path):
    """Starts the command on made-up data and a small model in a folder that is not the repository."""
    write_model_folder(tmp_path / "model", "pre")
    for name in ("mrpc", "stsb"):
        write_task(tmp_path / "data", name)

    def start(*words, launcher=None, wait=True, environment=None, **options):
        options = {
            "data_dir": "data", "model_name_or_path": "model", "allow_other_sizes": True, "seeds": 2,
            "learning_rate": 1e-3, "bf16": False, "task": "mrpc",
        } | options  # fmt: skip
        flags = [w for name, value in options.items() if value is not None for w in (f"--{name}", str(value))]
        command = [*(launcher or [sys.executable]), str(ROOT / "glue_eval/run.py"), *flags, *words]
        fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
        process = subprocess.Popen(
            command, cwd=tmp_path, env=os.environ | fixed | (environment or {}),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if not wait:
            return process
        out, err = process.communicate(timeout=SLOW_START)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return start


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_command_leaves_results_and_a_folder_can_grow(glue, tmp_path):
    """More seeds and tasks are added; what is finished stays; a finished folder is left alone."""
    done = glue()
    assert done.returncode == 0, done.stderr
    assert "initialised bert.pooler.dense.bias" in done.stdout
    output = tmp_path / "output" / "glue"
    results = json.loads((output / "results.json").read_text())["results"]
    (entry,) = results
    assert (entry["task"], entry["n"], set(entry["mean"])) == (
        "mrpc", 2, {"accuracy", "f1", "score", "validation_loss"},
    )  # fmt: skip
    assert "| mrpc | model |" in (output / "results.md").read_text()
    first = results_of(output)
    assert len(first) == 2 and all(r["validation_examples"] == 40 for r in first.values())

    before = contents(output)
    assert "2 of them are there already" in (again := glue()).stdout and again.returncode == 0
    assert "accuracy" in again.stdout.splitlines()[-1]
    assert contents(output) == before

    assert glue(task="mrpc,stsb", seeds=3).returncode == 0
    grown = results_of(output)
    assert len(grown) == 6 and first.items() <= grown.items()

    other = glue(learning_rate=2e-3)
    assert other.returncode == 2
    assert (
        "output_dir output/glue: holds results of other settings (learning_rate is 0.002, was 0.001)"
        in other.stderr
    )
    assert results_of(output) == grown


def test_scores_do_not_depend_on_how_runs_are_spread(glue, tmp_path):
    """One process, a pool of two, and two processes of accelerate launch give the same files."""
    assert glue(parallel_runs=1, output_dir="one").returncode == 0
    assert glue(parallel_runs=2, output_dir="pool").returncode == 0
    two = [accelerate(), "launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    launched = glue(launcher=two, output_dir="launched")
    assert launched.returncode == 0, launched.stderr
    assert "2 processes of the launcher" in launched.stdout
    one = results_of(tmp_path / "one")
    assert len(one) == 2
    assert results_of(tmp_path / "pool") == one
    assert results_of(tmp_path / "launched") == one


SLOW_SIGNALS = [pytest.param(sent, marks=pytest.mark.slow) for sent in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("sent", [*SLOW_SIGNALS, signal.SIGKILL])
def test_an_interrupted_command_goes_on_where_it_stopped(glue, tmp_path, sent):
    options = {"seeds": 8, "num_train_epochs": 40, "parallel_runs": 2}
    process = glue(wait=False, **options)
    output = tmp_path / "output" / "glue"
    while not list(output.glob("runs/*/*/*/seed-*.json")):
        assert process.poll() is None
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == (-sent if sent == signal.SIGKILL else 130)
    assert psutil.wait_procs(workers, timeout=60)[1] == []  # nobody trains on
    kept = results_of(output)
    assert 0 < len(kept) < 8
    assert glue(**options).returncode == 0
    whole = results_of(output)
    assert len(whole) == 8 and kept.items() <= whole.items()


def test_a_run_dir_is_fine_tuned_checkpoint_by_checkpoint(glue, tmp_path):
    for step in (10, 20):
        folder = write_model_folder(tmp_path / f"run/checkpoint-{step}", initializer_range=step / 100)
        (folder / "complete.json").write_text("{}")
    (tmp_path / "run" / "checkpoint-30").mkdir()
    done = glue(model_name_or_path=None, run_dir="run")
    assert done.returncode == 0, done.stderr
    output = tmp_path / "output" / "glue"
    entries = json.loads((output / "results.json").read_text())["results"]
    assert [entry["model"]["step"] for entry in entries] == [10, 20]
    assert (output / "trajectory.png").stat().st_size > 10_000
    assert "mrpc, run: score" in (output / "results.md").read_text()


@pytest.mark.slow
def test_the_revisions_of_a_repository_are_fine_tuned_one_by_one(glue, tmp_path):
    steps = {10: 0.01, 2: 0.02}
    local = {step: write_model_folder(tmp_path / f"{step}", initializer_range=r) for step, r in steps.items()}
    with Hub() as hub:
        for step, folder in local.items():
            files = {file.name: file.read_bytes() for file in folder.iterdir()}
            repo = hub.repos.get("writer/run") or hub.add("writer/run", {"README.md": "a run"}, private=True)
            repo.tags[f"step-{step}"] = repo.write(files).sha
        environment = hub.environment(tmp_path / "home", TOKEN)
        done = glue(model_name_or_path=None, run_dir="hub:writer/run", environment=environment)
        assert done.returncode == 0, done.stderr
        one = {"model_name_or_path": "hub:writer/run@step-2", "output_dir": "one"}
        assert glue(**one, environment=environment).returncode == 0
        refused = glue(
            model_name_or_path="hub:writer/run@step-3", output_dir="three", environment=environment
        )
        assert refused.returncode == 2 and "writer/run@step-3" in refused.stderr
    assert glue(model_name_or_path="2", output_dir="local").returncode == 0
    entries = json.loads((tmp_path / "output" / "glue" / "results.json").read_text())["results"]
    assert [entry["model"]["step"] for entry in entries] == [2, 10]
    assert [entry["model"]["run"] for entry in entries] == ["hub:writer/run"] * 2
    assert "mrpc, hub:writer/run: score" in (tmp_path / "output" / "glue" / "results.md").read_text()
    (same,), (alone,) = (
        json.loads((tmp_path / folder / "results.json").read_text())["results"] for folder in ("local", "one")
    )
    assert entries[0]["mean"] == alone["mean"] == same["mean"] and entries[1]["mean"] != same["mean"]


def test_data_come_from_the_hub_where_no_folder_is_given(glue, tmp_path):
    with GlueHub(tmp_path / "data") as hub:
        environment = hub.environment(tmp_path / "home")
        done = glue(data_dir=None, seeds=1, num_train_epochs=1, environment=environment)
        assert done.returncode == 0, done.stderr
    local = glue(seeds=1, num_train_epochs=1, output_dir="local")
    assert local.returncode == 0
    assert results_of(tmp_path / "local") == results_of(tmp_path / "output" / "glue")


def test_a_submission_and_a_model_card(glue, tmp_path):
    write_task(tmp_path / "data", "mrpc", ["train", "validation", "test"])
    done = glue("--update_model_card", seeds=1, submission="server")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "server" / "MRPC.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 18
    assert "nyu-mll/glue" in (tmp_path / "model" / "README.md").read_text()


def test_a_submission_can_follow_later_without_other_results(glue, tmp_path):
    write_task(tmp_path / "data", "mrpc", ["train", "validation", "test"])
    assert glue(seeds=1).returncode == 0
    before = results_of(tmp_path / "output" / "glue")
    assert glue(seeds=1, submission="server").returncode == 0
    assert (tmp_path / "server" / "MRPC.tsv").exists()
    assert results_of(tmp_path / "output" / "glue") == before


def test_rte_may_start_from_a_model_of_mnli(glue, tmp_path):
    write_task(tmp_path / "data", "mnli")
    write_task(tmp_path / "data", "rte")
    done = glue("--save_model", task="mnli", seeds=1, num_train_epochs=1, output_dir="mnli")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "mnli").glob("runs/*/mnli/*/seed-1-model")
    done = glue(
        task="rte", seeds=1, output_dir="rte", model_name_or_path=None, from_task_checkpoint=str(folder)
    )
    assert done.returncode == 0, done.stderr
    # The pooler comes along; three classes become two.
    assert "initialised classifier.bias, classifier.weight\n" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "mrcp"}, "error: task 'mrcp': did you mean mrpc?"),
        ({"data_dir": "nowhere"}, "error: data_dir nowhere"),
        ({"task": "qnli"}, "qnli"),
        ({"allow_other_sizes": False}, "96"),
        ({"model_name_or_path": "nowhere/"}, "nowhere"),
        ({"model_name_or_path": None}, "accelerate launch recipes/pretrain.py"),
        ({"output_dir": "data"}, "error: output_dir data: holds files but no GLUE results"),
        ({"seeds": 0}, "error: seeds 0: must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(glue, tmp_path, options, message):
    before = contents(tmp_path)
    done = glue(**options)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: ") and message in line
    assert contents(tmp_path) == before


def test_two_commands_on_one_folder_do_no_harm(glue, tmp_path):
    both = [glue(wait=False, seeds=6, num_train_epochs=1, parallel_runs=1) for _ in range(2)]
    for process in both:
        _, errors = process.communicate(timeout=SLOW_START)
        assert process.returncode == 0, errors
    assert len(results_of(tmp_path / "output" / "glue")) == 6


def test_a_process_that_comes_late_leaves_no_run_out(glue, tmp_path):
    """The second of a launcher's processes starts when the first has done its share."""
    first = glue(wait=False, seeds=4, environment={"RANK": "0", "WORLD_SIZE": "2"})
    output = tmp_path / "output" / "glue"
    while len(list(output.glob("runs/*/*/*/seed-*.json"))) < 2:
        assert first.poll() is None
        time.sleep(0.1)
    assert glue(seeds=4, environment={"RANK": "1", "WORLD_SIZE": "2"}).returncode == 0
    _, errors = first.communicate(timeout=SLOW_START)
    assert first.returncode == 0, errors
    assert len(results_of(output)) == 4


def test_a_damaged_result_is_named_before_training(glue, tmp_path):
    assert glue(seeds=1).returncode == 0
    output = tmp_path / "output" / "glue"
    (file,) = output.glob("runs/*/*/*/seed-1.json")
    file.write_text(file.read_text()[:100])
    before = contents(output)
    done = glue(seeds=2)
    assert done.returncode == 2
    assert "seed-1.json is damaged; move it away" in done.stderr
    assert contents(output) == before


def test_a_run_that_diverges_is_reported_and_does_not_stop_a_submission(glue, tmp_path):
    write_task(tmp_path / "data", "mrpc", ["train", "validation", "test"])
    done = glue(seeds=1, learning_rate=1e30, max_grad_norm=0, warmup_steps=0, submission="server")
    assert done.returncode == 0, done.stderr
    assert "DIVERGED" in done.stderr + done.stdout
    assert "mrpc: every run diverged; nothing to submit" in done.stdout


def test_predictions_are_made_again_when_the_test_split_changes(glue, tmp_path):
    write_task(tmp_path / "data", "mrpc", ["train", "validation", "test"])
    assert glue(seeds=1, submission="server").returncode == 0
    write_task(tmp_path / "data", "mrpc", ["test"], {"test": 9})
    assert glue(seeds=1, submission="server2").returncode == 0
    assert len((tmp_path / "server2" / "MRPC.tsv").read_text().splitlines()) == 10


def test_the_baseline_from_scratch_stands_beside_the_model_and_not_in_its_card(glue, tmp_path):
    assert glue(seeds=1).returncode == 0
    assert glue("--from_scratch", seeds=1).returncode == 0
    text = (tmp_path / "output" / "glue" / "results.md").read_text()
    assert "| model |" in text and "| model, from scratch |" in text
    refused = glue("--from_scratch", "--update_model_card", seeds=1)
    assert refused.returncode == 2 and "update_model_card: not together with from_scratch" in refused.stderr


def test_a_path_in_another_spelling_is_the_same_model(glue, tmp_path):
    assert glue(seeds=1).returncode == 0
    again = glue(seeds=1, model_name_or_path=tmp_path / "model")
    assert "1 of them are there already" in again.stdout
    assert "accuracy" in again.stdout.splitlines()[-1]
