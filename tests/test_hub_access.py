"""Before a run begins: whether it may push there, and where `hub:REPO` leads."""

import json
import re
import threading
from pathlib import Path

import pytest
from hub_fixtures import MODEL, hub_for_this_process, no_sleep_in_the_client, read_folder, set_endpoint
from huggingface_hub import constants
from transformers import BertConfig

from recipes import hub_access
from recipes.checkpointing import FORMAT, MARKER, damage_of
from recipes.command_line import build_arguments
from recipes.errors import UserError
from recipes.hub_access import (
    cached_checkpoint,
    check_access,
    check_same_on_hub,
    fetch_checkpoint,
    is_reference,
    parse_reference,
    step_of_checkpoint,
    step_revisions,
)
from recipes.hub_queue import hub_folder, pending, write_status
from tests.hub_server import TOKEN, Token, sha256

TOKENS = {
    TOKEN: Token("writer", orgs={"lab": "write", "press": "read"}),
    "hf_reader": Token("writer", "read"),
    "hf_stranger": Token("stranger"),
    "hf_one_repo": Token("writer", "fineGrained", scoped={MODEL: ["repo.write"]}),
    "hf_own": Token("writer", "fineGrained", scoped={"writer": ["repo.write"]}),
    "hf_read_own": Token("writer", "fineGrained", scoped={"writer": ["repo.content.read"]}),
    "hf_nothing": Token("writer", "fineGrained"),
}
AUTH_CHECK = "GET .*/auth-check/write$"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    no_sleep_in_the_client(monkeypatch)
    with hub_for_this_process(monkeypatch, tmp_path, TOKENS) as hub:
        yield hub


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


def record(**changes):
    """The description of a run, as far as it is known before its data is prepared."""
    return json.loads(json.dumps({"options": build_arguments(changes).to_dict()}))


def check(run, repo_id=MODEL, private=None, **changes):
    return check_access(repo_id, private, record(**changes), run)[:2]


def refusal(run, repo_id=MODEL, **changes):
    """The one line that the user is told."""
    with pytest.raises(UserError) as raised:
        check(run, repo_id, **changes)
    line = str(raised.value)
    assert "\n" not in line
    assert not any(token in line for token in TOKENS)
    return line


# --- Who may push -----------------------------------------------------------------------------------


@pytest.mark.parametrize("private", [None, True])
@pytest.mark.parametrize(
    ("given", "full"),
    [(MODEL, MODEL), ("model", MODEL), ("lab/model", "lab/model"), ("a.b-c_1", "writer/a.b-c_1")],
)
def test_a_repository_of_ones_own_is_made(hub, run, given, full, private):
    for _ in range(2):
        assert check(run, given, private) == (full, None)
    assert {name: repo.private for name, repo in hub.repos.items()} == {full: bool(private)}
    assert len(hub.repos[full].commits) == 1


@pytest.mark.parametrize("token", ["hf_one_repo", "hf_own"])
@pytest.mark.parametrize("private", [False, True])
def test_a_fine_grained_token_with_the_right_to_the_repository_will_do(hub, run, monkeypatch, token, private):
    hub.add(MODEL, {"README.md": "empty yet"}, private)
    monkeypatch.setenv("HF_TOKEN", token)
    assert check(run) == (MODEL, None)


@pytest.mark.parametrize("exists", [False, True, "private"])
@pytest.mark.parametrize("token", ["hf_reader", "hf_read_own", "hf_nothing", "hf_stranger"])
def test_a_token_that_may_not_write_there_is_refused(hub, run, monkeypatch, token, exists):
    if exists:
        hub.add(MODEL, private=exists == "private")
    monkeypatch.setenv("HF_TOKEN", token)
    line = refusal(run)
    assert "may" in line and "token" in line and ("stranger" if token == "hf_stranger" else "writer") in line
    assert all(len(repo.commits) == 1 for repo in hub.repos.values()) and len(hub.repos) == bool(exists)


def test_no_token_says_how_to_get_one(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    line = refusal(run)
    assert "no token" in line and "hf auth login" in line and "HF_TOKEN" in line
    assert hub.requests == []


def test_a_token_that_the_hub_does_not_know(hub, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped_one")
    line = refusal(run)
    assert "does not know the token" in line and "hf_mistyped_one" not in line


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("repo_id", ["stranger/model", "press/model"])
def test_a_repository_of_somebody_else_is_refused(hub, run, repo_id, exists):
    if exists:
        hub.add(repo_id)
    assert repo_id in refusal(run, repo_id)
    assert len(hub.repos) == exists


@pytest.mark.parametrize(
    "repo_id",
    ["", "a/b/c", "my model", "writer/", "/model", "a--b", "-model", "model.git", "x" * 97, "w/mödel"],
)
def test_a_bad_name_is_refused_before_the_hub_is_asked(hub, run, repo_id):
    assert "hub_model_id" in refusal(run, repo_id)
    assert hub.requests == []


def test_a_hub_without_the_question_lets_the_namespace_decide(hub, run):
    hub.fail(AUTH_CHECK, None, 404)
    hub.add("stranger/model")
    assert check(run) == (MODEL, None) and check(run, "lab/model") == ("lab/model", None)
    assert "stranger/model" in refusal(run, "stranger/model")


# --- What is in it ----------------------------------------------------------------------------------


def test_a_repository_with_another_type_of_model_is_refused(hub, run):
    hub.add(MODEL, {"config.json": BertConfig().to_json_string(), "model.safetensors": b"theirs"})
    line = refusal(run)
    assert MODEL in line and "type bert" in line
    assert hub.repos[MODEL].at().files["model.safetensors"] == b"theirs"


def test_a_repository_with_another_run_is_refused_and_the_difference_named(hub, run):
    theirs = record(learning_rate=2e-4, norm_placement="post")
    hub.add(MODEL, {"run.json": json.dumps(theirs), "config.json": "{}"})
    line = refusal(run, learning_rate=3e-4, norm_placement="pre")
    assert re.search(r"learning_rate is 0\.0003, was 0\.0002", line)
    assert re.search('norm_placement is "pre", was "post"', line) and "seed" not in line


@pytest.mark.parametrize("private", [False, True])
def test_a_repository_with_the_same_run_is_accepted(hub, run, private):
    """Also with what does not change it, and what was not known yet."""
    theirs = record(learning_rate=2e-4, save_steps=10) | {
        "results": {"step": 4},
        "corpus_fingerprints": ["ab"],
    }
    hub.add(MODEL, {"run.json": json.dumps(theirs), "config.json": "{}"}, private)
    assert check(run, learning_rate=2e-4, save_steps=20, push_to_hub=True, hub_model_id=MODEL) == (
        MODEL,
        None,
    )


@pytest.mark.parametrize("theirs", ["[]", "{}", '{"options": 1}', '"run"'])
def test_a_description_that_is_none_of_ours_is_refused(hub, run, theirs):
    hub.add(MODEL, {"run.json": theirs})
    assert "different run" in refusal(run)


@pytest.mark.parametrize("name", ["run.json", "config.json"])
def test_a_description_that_cannot_be_read_is_no_failure_of_the_hub(hub, run, name):
    hub.add(MODEL, {name: "{"})
    line = refusal(run)
    assert MODEL in line and "does not answer" not in line


def test_files_that_are_no_model_do_not_matter(hub, run):
    hub.add(MODEL, {"README.md": "# Soon", "data/notes.txt": ""})
    assert check(run) == (MODEL, None)


# --- A Hub that does not answer ---------------------------------------------------------------------


def down(hub, monkeypatch):
    hub.stop()


def nowhere(hub, monkeypatch):
    set_endpoint(monkeypatch, "http://hub.invalid")


def hangs(hub, monkeypatch):
    monkeypatch.setattr(hub_access, "PATIENCE", 0.2)
    hub.fail(".", None, "hang")


def hangs_later(hub, monkeypatch):
    monkeypatch.setattr(hub_access, "PATIENCE", 0.2)
    hub.fail("auth-check", None, "hang")


def in_trouble(hub, monkeypatch):
    hub.fail(".", None, 503)


def drops(hub, monkeypatch):
    hub.fail(".", None, "drop")


def busy(hub, monkeypatch):
    hub.fail("POST .*create", None, 429)


@pytest.mark.parametrize("trouble", [down, nowhere, hangs, hangs_later, in_trouble, drops, busy])
def test_it_is_an_error_before_the_first_push_and_a_note_after_it(hub, run, monkeypatch, trouble):
    trouble(hub, monkeypatch)
    line = refusal(run)
    assert "does not answer" in line and constants.ENDPOINT in line and "HF_ENDPOINT" in line
    hub_folder(run).mkdir(parents=True)
    write_status(run, repo_id=MODEL, pushed={"step-4": "0" * 40})
    repo_id, note = check(run)
    assert repo_id == MODEL and constants.ENDPOINT in note and "queued" in note and "\n" not in note
    assert pending(run) == []


def test_what_was_pushed_elsewhere_is_no_excuse(hub, run, monkeypatch):
    hub_folder(run).mkdir(parents=True)
    write_status(run, repo_id="writer/other", pushed={"step-4": "0" * 40})
    down(hub, monkeypatch)
    assert "does not answer" in refusal(run)


def test_a_public_repository_is_none_that_shall_be_private(hub, run):
    hub.add(MODEL)
    assert "hub_private_repo" in refusal(run, private=True)
    hub.repos[MODEL].private = True
    assert check(run, private=True) == (MODEL, None)


def test_the_run_of_the_repository_can_be_compared_again(hub, run):
    """When it is known which text it is."""
    theirs = record() | {"corpus_fingerprints": ["a"]}
    hub.add(MODEL, {"run.json": json.dumps(theirs)})
    found = check_access(MODEL, None, record(), run).record
    assert found == theirs
    with pytest.raises(UserError, match="corpus_fingerprints"):
        check_same_on_hub(MODEL, record() | {"corpus_fingerprints": ["b"]}, found)


def test_a_refusal_stays_an_error_where_the_run_has_pushed_before(hub, run, monkeypatch):
    hub_folder(run).mkdir(parents=True)
    write_status(run, repo_id=MODEL, pushed={"step-4": "0" * 40})
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "may only read" in refusal(run)


@pytest.mark.parametrize("token", [TOKEN, ""])
def test_offline_nothing_is_asked_and_a_note_says_so(hub, run, monkeypatch, token):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", token)
    repo_id, note = check(run, "model")
    assert repo_id == "model" and "HF_HUB_OFFLINE" in note and "queued" in note
    assert "hub_model_id" in refusal(run, "a/b/c")
    assert hub.requests == []


def in_time(hub, call, *args):
    """What a call said that was refused while the server hangs; it must not wait for the server."""
    said = []

    def target():
        try:
            call(*args)
        except UserError as error:
            said.append(str(error))

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(timeout=60)
    waits = thread.is_alive()
    hub.stop()
    thread.join()
    assert not waits
    return said


@pytest.mark.parametrize(
    "match",
    [
        "whoami",
        "repos/create",
        "auth-check",
        f"GET /api/models/{MODEL}$",
        "resolve/main/run.json",
    ],
)
def test_a_question_that_hangs_is_given_up(hub, run, monkeypatch, match):
    hub.add(MODEL, {"run.json": "{}"})
    monkeypatch.setattr(hub_access, "PATIENCE", 0.2)
    hub.fail(match, None, "hang")
    (line,) = in_time(hub, check, run)
    assert "does not answer" in line


@pytest.mark.parametrize("match", [f"GET /api/models/{MODEL}$", "/tree/", "resolve/.*/optimizer.pt"])
def test_a_download_that_hangs_is_given_up(with_states, monkeypatch, match):
    monkeypatch.setattr(hub_access, "PATIENCE", 0.2)
    with_states.fail(match, None, "hang")
    (line,) = in_time(with_states, fetch_checkpoint, "resume_from_checkpoint", f"hub:{MODEL}")
    assert "cannot be loaded" in line


# --- References -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hub:me/model", ("me/model", None)),
        ("hub:model", ("model", None)),
        ("hub:me/model@step-10000", ("me/model", "step-10000")),
        ("hub:me/model@runs/one", ("me/model", "runs/one")),
        ("hub:me/model@", ("me/model", None)),
    ],
)
def test_a_reference_names_a_repository_and_perhaps_a_revision(name, expected):
    assert is_reference(name) and parse_reference("run_dir", name) == expected


@pytest.mark.parametrize("name", ["hub:", "hub:@main", "hub:a/b/c", "hub:my model", "hub:é/b"])
def test_a_bad_reference_is_refused_with_the_option(name):
    with pytest.raises(UserError, match="run_dir"):
        parse_reference("run_dir", name)


@pytest.mark.parametrize("name", ["output/pretrain", "me/model", True, None, 4, Path("hub:a"), "HUB:a"])
def test_what_is_no_reference(name):
    assert not is_reference(name)


def state(step):
    """Files of a checkpoint with the state of its trainer."""
    files = {"model.safetensors": f"weights {step}", "trainer/optimizer.pt": f"moments {step}"}
    files |= {"trainer/state.json": json.dumps({"step": step}), "trainer/run.json": "{}"}
    hashes = {path: sha256(content.encode()) for path, content in files.items()}
    return files | {MARKER: json.dumps({"format": FORMAT, "step": step, "files": hashes})}


def inside(folder, files):
    return {f"{folder}/{path}": content for path, content in files.items()}


@pytest.fixture
def with_states(hub):
    """A repository as `checkpoint` leaves it on main, and as `all_checkpoints` does at the tag all."""
    repo = hub.add(MODEL, {"model.safetensors": "weights", "metrics.jsonl": '{"step": 8}\n'})
    old = repo.write(inside("last-checkpoint", state(4)))
    repo.tags["step-4"] = old.sha
    repo.write(inside("last-checkpoint", state(8)))
    folders = {}
    for step in (4, 8, 100):
        folders |= inside(f"checkpoint-{step}", state(step))
    folders |= {"checkpoint-900/model.safetensors": "no marker", "checkpoint-old/complete.json": "{}"}
    hub.add("writer/all", {"metrics.jsonl": "", "model.safetensors": "w"}).write(folders)
    return hub


@pytest.mark.parametrize(
    ("reference", "folder", "step"),
    [
        (f"hub:{MODEL}", "last-checkpoint", 8),
        (f"hub:{MODEL}@step-4", "last-checkpoint", 4),
        ("hub:writer/all", "checkpoint-100", 100),
    ],
)
def test_the_newest_checkpoint_is_fetched_whole_with_the_metrics(
    with_states, reference, folder, step, monkeypatch
):
    fetch_checkpoint("resume_from_checkpoint", reference)
    asked = len(with_states.requests)
    found = cached_checkpoint("resume_from_checkpoint", reference)
    assert len(with_states.requests) == asked
    assert found.name == folder
    assert read_folder(found) == {path: text.encode() for path, text in state(step).items()}
    assert damage_of(found) is None
    assert (found.parent / "metrics.jsonl").exists()
    assert not (found.parent / "model.safetensors").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetch_checkpoint("resume_from_checkpoint", reference)
    assert cached_checkpoint("resume_from_checkpoint", reference) == found


@pytest.mark.parametrize(
    ("history", "revision", "expected"),
    [
        # Pushed a second time, each commit holds all of them.
        (["checkpoint-12", "checkpoint-4 checkpoint-8 checkpoint-12"], "@step-4", 4),
        (["last-checkpoint:4", "checkpoint-8"], "", 8),
        (["checkpoint-4", "last-checkpoint:8"], "", 8),
        (["last-checkpoint:4", "checkpoint-8"], "@step-8", 8),
        (["last-checkpoint:4"], "@step-12", None),
        (["last-checkpoint:4"], "@step-4", 4),
    ],
)
def test_a_revision_stands_for_its_own_step(hub, history, revision, expected):
    repo = hub.add(MODEL, {"model.safetensors": "weights", "metrics.jsonl": ""})
    for folders in history:
        for folder in folders.split():
            name, _, step = folder.partition(":")
            repo.write(inside(name, state(int(step or name.split("-")[1]))))
    if revision:
        repo.tags[revision[1:]] = repo.at().sha
    name = f"hub:{MODEL}{revision}"
    if expected is None:
        with pytest.raises(UserError, match="no trainer's state of that step"):
            fetch_checkpoint("resume_from_checkpoint", name)
        return
    assert fetch_checkpoint("resume_from_checkpoint", name) is None
    assert step_of_checkpoint(cached_checkpoint("resume_from_checkpoint", name)) == expected


def test_a_newer_push_is_fetched(with_states):
    fetch_checkpoint("resume_from_checkpoint", f"hub:{MODEL}")
    with_states.repos[MODEL].write(inside("last-checkpoint", state(12)))
    fetch_checkpoint("resume_from_checkpoint", f"hub:{MODEL}")
    found = cached_checkpoint("resume_from_checkpoint", f"hub:{MODEL}")
    assert (found / "trainer" / "optimizer.pt").read_text() == "moments 12"


def test_a_private_one_needs_its_token(with_states, monkeypatch):
    with_states.repos[MODEL].private = True
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    with pytest.raises(UserError) as raised:
        fetch_checkpoint("resume_from_checkpoint", f"hub:{MODEL}")
    assert MODEL in str(raised.value) and "hf_stranger" not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch_checkpoint("resume_from_checkpoint", f"hub:{MODEL}")


def test_a_repository_without_a_state_says_with_what_it_is_pushed(hub):
    hub.add(MODEL, {"model.safetensors": "w", "last-checkpoint/model.safetensors": "w"})
    with pytest.raises(UserError, match=r"resume_from_checkpoint hub:.*hub_strategy checkpoint"):
        fetch_checkpoint("resume_from_checkpoint", f"hub:{MODEL}")


@pytest.mark.parametrize("trouble", [None, down, nowhere, in_trouble, drops])
@pytest.mark.parametrize("cached", [False, True])
def test_without_a_hub_the_cache_will_do(with_states, monkeypatch, trouble, cached):
    reference = f"hub:{MODEL}"
    if cached:
        fetch_checkpoint("resume_from_checkpoint", reference)
    if trouble:
        trouble(with_states, monkeypatch)
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if cached:
        fetch_checkpoint("resume_from_checkpoint", reference)
        assert (cached_checkpoint("x", reference) / "trainer" / "optimizer.pt").read_text() == "moments 8"
    else:
        with pytest.raises(UserError, match=f"resume_from_checkpoint {reference}") as raised:
            fetch_checkpoint("resume_from_checkpoint", reference)
        assert "\n" not in str(raised.value)
        assert cached_checkpoint("resume_from_checkpoint", reference) is None


@pytest.mark.parametrize("reference", ["hub:writer/absent", f"hub:{MODEL}@step-99"])
def test_what_is_not_there_is_named(with_states, reference):
    with pytest.raises(UserError, match=reference):
        fetch_checkpoint("resume_from_checkpoint", reference)


def test_a_checkpoint_of_which_a_part_did_not_arrive_is_none(with_states):
    with_states.fail("GET .*/last-checkpoint/trainer/optimizer.pt", None, 503)
    with pytest.raises(UserError):
        fetch_checkpoint("resume_from_checkpoint", f"hub:{MODEL}")
    with_states.heal()
    fetch_checkpoint("resume_from_checkpoint", f"hub:{MODEL}")
    found = cached_checkpoint("resume_from_checkpoint", f"hub:{MODEL}")
    assert set(read_folder(found)) == set(state(8))


# --- Revisions --------------------------------------------------------------------------------------


def test_the_revisions_of_a_run_come_in_the_order_of_their_steps(hub):
    """Tags or branches, and no others."""
    repo = hub.add(MODEL)
    sha = repo.at().sha
    repo.tags |= dict.fromkeys(["step-100", "step-8", "step-20", "v1", "step-", "step-x", "my-step-3"], sha)
    repo.branches["step-4"] = sha
    found = step_revisions("run_dir", f"hub:{MODEL}")
    assert found == [(step, f"step-{step}") for step in (4, 8, 20, 100)]


def test_revisions_that_are_not_there(hub, monkeypatch):
    hub.add(MODEL)
    for reference, said in (
        (f"hub:{MODEL}", "no revision step-N"),
        ("hub:writer/absent", "cannot be read"),
        (f"hub:{MODEL}@main", "leave @main out"),
        ("hub:a/b/c", "a/b/c"),
    ):
        with pytest.raises(UserError, match=f"run_dir {reference}.*{said}"):
            step_revisions("run_dir", reference)
    hub.stop()
    with pytest.raises(UserError, match="cannot be read"):
        step_revisions("run_dir", f"hub:{MODEL}")
