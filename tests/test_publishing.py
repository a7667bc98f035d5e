"""Runs that are pushed: what arrives loads anywhere, and what happens to the Hub does not reach training."""

import json
import os
import re
import shutil
import subprocess
import sys

import psutil
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load, load_file

from bert_ln import BertLnForMaskedLM
from tests.conftest import ROOT, metrics_of
from tests.hub_server import TOKEN, Hub
from tests.test_loading import run_without_package

REPO = "writer/tiny"
PUSHED = {"push_to_hub": True, "hub_model_id": "tiny", "hub_min_interval": 0, "hub_exit_timeout": 100}


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def pushed(launch, tmp_path_factory):
    """A run of three checkpoints, all pushed with the trainer's state, and the Hub that has them."""
    folder = tmp_path_factory.mktemp("pushed")
    with Hub() as hub:
        options = PUSHED | {"hub_strategy": "all_checkpoints", "data_license": "CC-BY-4.0"}
        environment = hub.environment(folder / "home", TOKEN)
        done = launch(env=environment, output_dir=folder / "run", **options)
        assert done.returncode == 0, done.stderr
        yield hub, folder / "run", done


def command(*words, env, timeout=240):
    program = [sys.executable, str(ROOT / "recipes" / "hub.py"), *map(str, words)]
    return subprocess.run(program, env=os.environ | env, capture_output=True, text=True, timeout=timeout)


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- What arrives -----------------------------------------------------------------------------------


def test_each_checkpoint_is_a_revision_with_its_own_metrics_and_card(pushed):
    hub, run, _ = pushed
    repo = hub.repos[REPO]
    assert list(repo.tags) == ["step-4", "step-8", "step-12"]
    for step in (4, 8, 12):
        files = repo.at(f"step-{step}").files
        folder = run / f"checkpoint-{step}"
        assert equal(load(files["model.safetensors"]), weights(folder))
        lines = [json.loads(line) for line in files["metrics.jsonl"].splitlines()]
        assert max(line["step"] for line in lines) == step
        options = json.loads(files["run.json"])["options"]
        assert options["seed"] == 42 and options["train_file"] == "corpus0" and "output_dir" not in options
        assert f"| updates | {step} of 12 |" in files["README.md"].decode()
        state = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert state == {n.split("/", 1)[1]: c for n, c in files.items() if n.startswith(folder.name)}
    assert repo.branches["main"] == repo.tags["step-12"]
    assert "results" in json.loads(repo.at().files["run.json"])
    assert repo.at().files["validation_loss.png"].startswith(b"\x89PNG")


def test_the_card_says_what_the_run_was(pushed):
    hub, run, _ = pushed
    card = ModelCard(hub.repos[REPO].at().files["README.md"].decode())
    data = card.data.to_dict()
    results = json.loads((run / "run.json").read_text())["results"]
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "fill-mask")
    (evaluation,) = data["model-index"][0]["results"]
    measured = {metric["type"]: metric["value"] for metric in evaluation["metrics"]}
    assert measured["loss"] == results["validation_loss"]
    assert measured["accuracy"] == results["validation_accuracy"]
    for words in (
        "`x <- x + f(LN(x))`", "CC-BY-4.0", f'"{REPO}"', "loss against update](validation_loss.png)",
        "@inproceedings", f"| validation loss (nats a masked token) | {results['validation_loss']:.4f} |",
        "12 updates of 8 x 32 tokens", f"torch {torch.__version__}", "0.001, linear",
    ):  # fmt: skip
        assert words in card.text, words
    assert "PATH_OF_THIS_FOLDER" not in card.text and str(run) not in card.text


LOAD = """
import torch
from transformers import (
    AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline
)

repo, target = sys.argv[1:]
ids = torch.arange(5, 25).unsqueeze(0)
logits = {}
for revision in ("step-4", "step-8", "main"):
    model = AutoModelForMaskedLM.from_pretrained(repo, revision=revision, trust_remote_code=True)
    logits[revision] = model.eval()(ids).logits.detach()
torch.save(logits, target)
model, info = AutoModelForSequenceClassification.from_pretrained(
    repo, num_labels=3, trust_remote_code=True, output_loading_info=True
)
assert {key.split(".")[0] for key in info["missing_keys"]} <= {"bert", "classifier"}
assert all(".pooler." in key or "classifier" in key for key in info["missing_keys"])
tokenizer = AutoTokenizer.from_pretrained(repo)
assert model(**tokenizer("the nation", return_tensors="pt")).logits.shape == (1, 3)
fill = pipeline("fill-mask", repo, trust_remote_code=True)
assert len(fill("the [MASK] of the nation")) == 5
assert "bert_ln" not in sys.modules
"""


def test_revisions_load_in_a_process_that_has_nothing_of_ours(pushed, tmp_path):
    hub, run, _ = pushed
    # Its own settings come last: this process is offline but for this Hub.
    environment = hub.environment(tmp_path, TOKEN)
    code = f"import os\nos.environ.update({environment!r})\n" + LOAD
    done = run_without_package(code, tmp_path, REPO, tmp_path / "logits.pt")
    assert done.returncode == 0, done.stderr
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    for revision, folder in (("step-4", "checkpoint-4"), ("step-8", "checkpoint-8"), ("main", ".")):
        model = BertLnForMaskedLM.from_pretrained(run / folder).eval()
        expected = model(torch.arange(5, 25).unsqueeze(0)).logits
        torch.testing.assert_close(logits[revision], expected)


@pytest.mark.parametrize("revision", ["@step-8", ""])
def test_another_machine_continues_from_the_hub(pushed, launch, tmp_path, revision):
    hub, run, _ = pushed
    reference = f"hub:{REPO}{revision}"
    environment = hub.environment(tmp_path / "home", TOKEN)
    done = launch(env=environment, output_dir=tmp_path / "run", resume_from_checkpoint=reference)
    assert done.returncode == 0, done.stderr
    assert "Continuing from" in done.stdout
    assert equal(weights(tmp_path / "run"), weights(run))
    assert metrics_of(tmp_path / "run") == metrics_of(run)
    assert (tmp_path / "run" / "checkpoint-12" / "complete.json").exists()
    assert not list((tmp_path / "run").glob("hub"))


def test_a_newer_checkpoint_of_ones_own_goes_before_the_hubs(pushed, launch, tmp_path):
    """As where a scheduler starts the same command again; also if the Hub is away by then."""
    hub, run, _ = pushed
    options = {"resume_from_checkpoint": f"hub:{REPO}@step-4", "output_dir": tmp_path / "run"}
    environment = hub.environment(tmp_path / "home", TOKEN)
    assert launch(env=environment, **options).returncode == 0
    unfinished(tmp_path / "run")
    again = launch(env=environment | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "new")}, **options)
    assert again.returncode == 0, again.stderr
    assert "as new or newer" in again.stdout and "checkpoint-8" in again.stdout
    assert equal(weights(tmp_path / "run"), weights(run))
    assert metrics_of(tmp_path / "run") == metrics_of(run)


def unfinished(run):
    """Take a run back to where its second checkpoint had just been saved."""
    record = json.loads((run / "run.json").read_text())
    del record["results"]
    (run / "run.json").write_text(json.dumps(record))
    shutil.rmtree(run / "checkpoint-12")


def test_a_run_of_other_options_does_not_continue_from_the_hub(pushed, launch, tmp_path):
    hub, _, _ = pushed
    environment = hub.environment(tmp_path / "home", TOKEN)
    reference = f"hub:{REPO}@step-8"
    done = launch(
        env=environment, output_dir=tmp_path / "run", resume_from_checkpoint=reference, learning_rate=0.5
    )
    assert done.returncode == 2 and "learning_rate is 0.5, was 0.001" in done.stderr


def test_a_token_is_nowhere(pushed, tmp_path):
    hub, run, done = pushed
    texts = [done.stdout.encode(), done.stderr.encode()]
    texts += [file.read_bytes() for file in run.parent.rglob("*") if file.is_file()]
    texts += [content for commit in hub.repos[REPO].commits for content in commit.files.values()]
    assert len(texts) > 50 and not any(TOKEN.encode() in text for text in texts)


# --- What may go wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["refused", "hangs", "down"])
def test_training_ends_as_without_a_hub_and_the_push_follows(pushed, launch, hub, tmp_path, fault):
    _, reference, _ = pushed
    if fault == "refused":
        hub.fail("POST .*/commit/", times=None, with_=403)
    else:
        # After the check before the first step, nobody answers any more.
        hub.fail("(PUT|preupload)", times=None, with_="hang" if fault == "hangs" else "drop")
    environment = hub.environment(tmp_path / "home", TOKEN)
    options = PUSHED | {"hub_exit_timeout": 4}
    done = launch(env=environment, output_dir=tmp_path / "run", **options)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\nnot pushed: (step-\d+, )?step-12; it stays queued, .* push --pending ", done.stdout)
    assert equal(weights(tmp_path / "run"), weights(reference))
    assert hub.repos[REPO].tags == {}
    hub.heal()
    later = command("push", "--pending", tmp_path / "run", env=environment)
    assert later.returncode == 0, later.stderr
    assert list(hub.repos[REPO].tags) == ["step-12"]
    assert equal(load(hub.repos[REPO].at().files["model.safetensors"]), weights(reference))
    for text in (done.stdout, done.stderr, later.stdout, later.stderr):
        assert TOKEN not in text


def test_a_run_that_is_killed_while_it_pushes_pushes_when_it_goes_on(launch, hub, tmp_path):
    hub.fail("PUT", times=None, with_="hang")
    run = tmp_path / "run"
    # So long that both are killed in the middle.
    options = PUSHED | {"max_steps": 100_000, "save_steps": 50, "eval_steps": 100_000, "logging_steps": 50}
    start = {"wait": False, "env": hub.environment(tmp_path / "home", TOKEN), "output_dir": run}
    process = launch(**start, **options)
    hub.wait_for("PUT", seconds=200)
    assert psutil.Process(process.pid).children()
    check_killed_with_its_pusher(process)
    assert list((run / "hub").glob("step-*")) and hub.repos[REPO].tags == {}
    hub.heal()
    process = launch(**start, **options)
    hub.wait_for("POST .*/tag/", status=200, seconds=200)
    assert "Continuing from" in check_killed_with_its_pusher(process)
    (tag, *_) = hub.repos[REPO].tags
    pushed = hub.repos[REPO].at(tag).files["model.safetensors"]
    assert equal(load(pushed), weights(run / tag.replace("step", "checkpoint")))


def check_killed_with_its_pusher(process):
    """Kills a run and sees that nobody goes on pushing for it; returns what it had printed."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    out, _ = process.communicate(timeout=60)
    assert psutil.wait_procs(children, timeout=60)[1] == []
    return out


def test_only_the_main_process_talks_to_the_hub(launch, hub, tmp_path):
    environment = hub.environment(tmp_path / "home", TOKEN)
    done = launch(processes=2, env=environment, output_dir=tmp_path / "run", **PUSHED, hub_strategy="end")
    assert done.returncode == 0, done.stderr
    asked = [path for _, path, *_ in hub.requests]
    assert asked.count("/api/whoami-v2") == 1 and asked.count("/api/repos/create") == 2
    assert list(hub.repos[REPO].tags) == ["step-12"]


def test_two_processes_refuse_together_and_in_one_line(launch, hub, tmp_path):
    environment = hub.environment(tmp_path / "home", "hf_nobody_knows_this_one")
    done = launch(processes=2, env=environment, output_dir=tmp_path / "run", **PUSHED)
    assert done.returncode == 1  # of the launcher
    assert done.stderr.count("error: push_to_hub: ") == 1 and "does not know the token" in done.stderr
    assert "recipes/pretraining.py" not in done.stderr and "hf_nobody" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("hub_model_id", "somebody/else", "hub_model_id somebody/else: .* may not write there"),
        ("hub_model_id", "a/b/c", "hub_model_id a/b/c: "),
        ("hub_strategy", "sometimes", "hub_strategy 'sometimes': allowed: end, every_save"),
        (
            "resume_from_checkpoint",
            "hub:writer/none",
            "resume_from_checkpoint hub:writer/none: cannot be loaded",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_done(launch, hub, tmp_path, option, value, words):
    environment = hub.environment(tmp_path / "home", TOKEN)
    done = launch(env=environment, **PUSHED | {"output_dir": tmp_path / "run", option: value})
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(f"error: {words}", line), line
    assert not (tmp_path / "run").exists() and done.stdout == ""


def test_offline_everything_is_queued(launch, hub, tmp_path):
    environment = hub.environment(tmp_path / "home", TOKEN) | {"HF_HUB_OFFLINE": "1"}
    done = launch(env=environment, output_dir=tmp_path / "run", **PUSHED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("HF_HUB_OFFLINE is set") == 1 and "not pushed: step-12" in done.stdout
    assert hub.requests == []
    again = launch(env=environment, output_dir=tmp_path / "run", **PUSHED)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert "not pushed  step-12; send it with: " in again.stdout
    online = hub.environment(tmp_path / "home", TOKEN)
    assert command("push", "--pending", tmp_path / "run", env=online).returncode == 0
    # The name had no namespace, and nobody to ask for it: it is the user's own.
    assert list(hub.repos[REPO].tags) == ["step-12"]
    assert f'"{REPO}"' in hub.repos[REPO].at().files["README.md"].decode()
    assert REPO in command("status", tmp_path / "run", env=online).stdout


def test_a_study_is_not_pushed(tmp_path):
    study = [
        str(ROOT / "recipes" / "compare.py"),
        "--config",
        str(ROOT / "recipes/configs/compare_small.yaml"),
    ]
    options = ["--push_to_hub", "--output_dir", str(tmp_path / "study")]
    done = subprocess.run([sys.executable, *study, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "push_to_hub: not in a study" in done.stderr


# --- The command ------------------------------------------------------------------------------------


def test_a_run_can_be_pushed_later_as_a_whole_and_again_with_a_new_card(launch, hub, tmp_path):
    run = tmp_path / "run"
    assert launch(output_dir=run).returncode == 0
    environment = hub.environment(tmp_path / "home", TOKEN)
    done = command("push", run, "--hub_model_id", "lab", "--hub_strategy", "every_save", env=environment)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["writer/lab"]
    assert list(repo.tags) == ["step-4", "step-8", "step-12"]
    assert not any("trainer" in path for path in repo.at().files)
    card = (run / "README.md").read_text() + "\nScores that were measured later.\n"
    (run / "README.md").write_text(card)
    assert command("push", run, env=environment).returncode == 0
    assert b"measured later" in repo.at("step-12").files["README.md"] and len(repo.commits) == 5
    status = command("status", run, env=environment)
    assert status.returncode == 0 and "writer/lab" in status.stdout
    assert [line.split()[1] for line in status.stdout.splitlines() if line.startswith("pushed")] == [
        "step-4", "step-8", "step-12",
    ]  # fmt: skip
    nothing = command("push", "--pending", run, env=environment)
    assert nothing.returncode == 0 and "nothing waits" in nothing.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["push", "."], "run .: holds no run"),
        (["push", "RUN", "--hub_strateggy", "end"], "--hub_strateggy: unknown option; did you mean hub_"),
        (["push", "RUN", "--pending", "--hub_model_id", "x"], "hub_model_id: not together with pending"),
        (["push", "RUN"], "push_to_hub: no token"),
        (["pull", "RUN"], "invalid choice: 'pull'"),
    ],
)  # fmt: skip
def test_the_command_refuses_in_one_line(pushed, tmp_path, words, message):
    hub, run, _ = pushed
    words = [run if word == "RUN" else word for word in words]
    done = command(*words, env=hub.environment(tmp_path / "home", None))
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1
