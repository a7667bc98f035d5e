"""Pushes to the tests' own Hub: one commit and one tag a checkpoint, whatever goes wrong on the way."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hub_fixtures import (
    MODEL,
    Clock,
    checkpoint_files,
    expected_files,
    hub_for_this_process,
    no_sleep_in_the_client,
    queue,
    write_files,
)
from huggingface_hub import constants

from recipes import hub_upload
from recipes.checkpointing import MARKER
from recipes.hub_queue import Entry, only_pusher, pending, read_status
from recipes.hub_session import asked_to_wait, timeout
from recipes.hub_upload import push_pending, words
from recipes.publishing import queue_checkpoint
from tests.hub_server import TOKEN, Token

TOKENS = {
    TOKEN: Token("writer", orgs={"lab": "write", "press": "read"}),
    "hf_reader_only": Token("writer", "read"),
}
COMMIT, TAG, PREUPLOAD = "POST .*/commit/", "POST .*/tag/", "POST .*/preupload/"
PUT, CREATE, YAML = "PUT ", "POST .*/repos/create", "POST .*/validate-yaml"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    no_sleep_in_the_client(monkeypatch)
    with hub_for_this_process(monkeypatch, tmp_path, TOKENS) as hub:
        yield hub


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """That of the pusher."""
    clock = Clock()
    monkeypatch.setattr(hub_upload, "time", clock)
    return clock


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def push(run, monkeypatch):
    """Pushes what is queued, as a new process would; returns whether all of it went, and what was said."""

    def go(patient=False):
        said = []
        forget_about_xet(monkeypatch)
        done = push_pending(run, said.append, None if patient else hub_upload.TRIES)
        return done, said

    return go


def forget_about_xet(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    for function in vars(hub_upload).values():
        if hasattr(function, "cache_clear") and function.__module__ == hub_upload.__name__:
            function.cache_clear()


def puts(hub):
    return [path for method, path, status, _ in hub.requests if method == "PUT" and status == 200]


def pushes(hub, repo_id=MODEL):
    """The messages of commits, without that of the empty repository."""
    return [commit.message for commit in hub.repos[repo_id].commits[1:]]


def stored(hub, revision, repo_id=MODEL):
    files = dict(hub.repos[repo_id].at(revision).files)
    files.pop(".gitattributes", None)
    return files


def check_pushed_once(hub, run, step=4, repo_id=MODEL):
    """One commit with all files, the tag at it, nothing left and no error."""
    repo, status = hub.repos[repo_id], read_status(run)
    assert len(pushes(hub, repo_id)) == 1
    assert stored(hub, "main", repo_id) == expected_files(step)
    assert repo.tags == {f"step-{step}": repo.branches["main"]}
    assert (status.repo_id, status.pushed) == (repo_id, {f"step-{step}": repo.branches["main"]})
    assert status.error is None and pending(run) == []


# --- What arrives -----------------------------------------------------------------------------------


def test_one_commit_holds_weights_metrics_card_and_description_and_has_a_tag(hub, run, push, clock):
    queue(run, 4)
    done, said = push()
    assert done and len(said) == 1 and MODEL in said[0] and "step-4" in said[0]
    check_pushed_once(hub, run)
    assert {"model.safetensors", "metrics.jsonl", "README.md", "run.json"} <= set(stored(hub, "step-4"))
    assert read_status(run).pushed_at == clock.now


def test_main_is_the_newest_and_each_tag_keeps_its_step(hub, run, push):
    for step in (4, 8, 12):
        queue(run, step, keep=step < 12)
        if step == 4:
            assert push()[0]
    queue(run, 16, keep=True)
    assert push()[0]
    repo = hub.repos[MODEL]
    assert [stored(hub, f"step-{step}") for step in (4, 16)] == [expected_files(step) for step in (4, 16)]
    assert repo.branches["main"] == repo.tags["step-16"]
    assert read_status(run).pushed == repo.tags


def test_all_are_pushed_in_order_where_all_are_wanted(hub, run, push):
    for step in (4, 8, 12):
        queue(run, step, keep=True)
    assert push()[0]
    assert len(pushes(hub)) == 3
    for step in (4, 8, 12):
        assert stored(hub, f"step-{step}") == expected_files(step)
    assert list(read_status(run).pushed) == ["step-4", "step-8", "step-12"]


def test_an_empty_queue_asks_nothing(hub, run, push):
    assert push() == (True, []) and hub.requests == []


def test_the_loss_figure_comes_in_the_same_commit(hub, run, push):
    pytest.importorskip("matplotlib", reason="the figure is drawn with it")
    queue(run, 4)
    (metrics,) = run.rglob("files/metrics.jsonl")
    line = {"validation_loss": 7.0, "below_unigram_cross_entropy": 0.1}
    metrics.write_text("".join(json.dumps(line | {"step": step}) + "\n" for step in (2, 4)))
    assert push()[0]
    assert len(pushes(hub)) == 1
    assert stored(hub, "step-4")["validation_loss.png"].startswith(b"\x89PNG")


def test_the_state_of_the_trainer_comes_too_and_weights_go_up_once(hub, run, push):
    state = {"trainer/state.pt": b"moments", "trainer/state.json": b"{}", MARKER: b"{}"}
    files = {path: run / "checkpoint-4" / path for path in [*checkpoint_files(4), *state]}
    write_files(run / "checkpoint-4", checkpoint_files(4) | state)
    record = json.dumps({"options": {"max_steps": 4}}).encode()
    state["trainer/run.json"] = record
    write_files(run, {"checkpoint-4/trainer/run.json": record, "README.md": b"# Card", "metrics.jsonl": b""})
    queue_checkpoint(Entry(4, MODEL, None, "checkpoint", last=True), run / "checkpoint-4", {"step": 4})
    assert push()[0]
    files = stored(hub, "step-4")
    assert {name: files[name] for name in checkpoint_files(4)} == checkpoint_files(4)
    last = {k.removeprefix("last-checkpoint/"): v for k, v in files.items() if k.startswith("last-")}
    assert last == checkpoint_files(4) | state
    assert not any(name.startswith("trainer/") or name == MARKER for name in files)
    assert len(puts(hub)) == len(set(puts(hub))) == 2


@pytest.mark.parametrize("private", [None, False, True])
def test_a_repository_is_made_as_private_as_wanted(hub, run, push, private):
    queue(run, 4, private=private)
    assert push()[0]
    assert hub.repos[MODEL].private == bool(private)
    check_pushed_once(hub, run)


def test_a_private_repository_that_exists_takes_pushes(hub, run, push):
    hub.add(MODEL, private=True)
    queue(run, 4)
    assert push()[0]
    check_pushed_once(hub, run)
    assert hub.repos[MODEL].private


@pytest.mark.parametrize(("given", "full"), [("lab/model", "lab/model"), ("model", MODEL)])
def test_a_name_without_a_namespace_is_the_users_own(hub, run, push, given, full):
    queue(run, 4, repo_id=given)
    assert push()[0]
    assert set(hub.repos) == {full} and stored(hub, "step-4", full) == expected_files(4)


def test_a_tag_of_an_earlier_push_of_the_step_is_moved(hub, run, push):
    repo = hub.add(MODEL, {"config.json": "old"})
    repo.tags["step-4"] = repo.at().sha
    queue(run, 4)
    assert push()[0]
    check_pushed_once(hub, run)


def test_a_step_that_is_pushed_again_unchanged_makes_no_second_commit(hub, run, push):
    for _ in range(2):
        queue(run, 4)
        assert push()[0]
        check_pushed_once(hub, run)


# --- Xet --------------------------------------------------------------------------------------------


def test_a_hub_without_xet_works_though_the_client_would_speak_it(hub, run, push):
    """In the process that makes the repository and in a later one."""
    pytest.importorskip("hf_xet", reason="without it the client asks for no Xet")
    for step in (4, 8):
        queue(run, step)
        assert push()[0]
        assert stored(hub, f"step-{step}") == expected_files(step)


# --- What goes wrong and passes ---------------------------------------------------------------------

PASSING = [
    *[(at, kind, 2) for at in (COMMIT, TAG, PREUPLOAD, CREATE, PUT, YAML) for kind in (503, "drop")],
    *[(at, 500, 1) for at in (COMMIT, YAML, "POST .*batch")],
    ("GET .*/xet-write-token/", 500, 1),
    *[(at, 429, 1) for at in (COMMIT, CREATE, PUT)],
    *[(at, "drop_after", 1) for at in (COMMIT, TAG, CREATE, PUT, "POST .*batch")],
    *[(at, "hang", 1) for at in (COMMIT, TAG, PREUPLOAD, CREATE, PUT)],
    *[(at, "slow", 1) for at in (COMMIT, PUT)],
    (COMMIT, 409, 1), (COMMIT, 412, 1),
    (PUT, "corrupt", 1), ("POST .*verify", "wrong hash", 1), ("POST .*batch", "wrong hash", 1),
]  # fmt: skip


@pytest.mark.parametrize(("match", "kind", "times"), PASSING)
def test_what_passes_is_tried_again_and_pushed_exactly_once(hub, run, push, match, kind, times):
    queue(run, 4)
    hub.fail(match, times, kind, seconds={"hang": 60, "slow": 0.05}.get(kind))
    with timeout(0.4 if kind == "hang" else 30):
        done, said = push(patient=True)
    assert done, said
    check_pushed_once(hub, run)
    assert all(fault.left == 0 for fault in hub.faults)


@pytest.mark.parametrize("kind", ["drop_after", "slow"])
def test_an_answer_that_is_lost_makes_no_second_commit(hub, run, push, kind):
    """Also where the answer came too late for us."""
    queue(run, 4)
    hub.fail(COMMIT, 2, kind, seconds=60)
    with timeout(0.4):
        assert push()[0]
    check_pushed_once(hub, run)


def test_a_wait_is_as_long_as_the_server_says(hub, run, push, clock):
    queue(run, 4)
    hub.fail(COMMIT, with_=429, seconds=1234)
    assert push()[0]
    assert 1234 <= sum(clock.naps) < 1300
    check_pushed_once(hub, run)


def test_waits_grow(hub, run, push, clock):
    queue(run, 4)
    times = []
    hub.fail(COMMIT, 4, 503)
    note = hub.note

    def noting(method, path, had_token):
        if "/commit/" in path:
            times.append(clock.now)
        return note(method, path, had_token)

    hub.note = noting
    assert push()[0]
    gaps = [after - before for before, after in pairwise(times)]
    assert len(gaps) == 4 and all(0 < gap <= 300 for gap in gaps)
    assert all(later >= 2 * earlier * 0.99 for earlier, later in pairwise(gaps))


def test_a_failure_is_said_once_and_told_by_the_status(hub, run, push, clock):
    queue(run, 4)
    hub.fail(COMMIT, 3, 503)
    clock.events = {clock.now + 1: lambda: told.append(read_status(run).error)}
    told = []
    done, said = push()
    assert done and len(said) == 2
    assert "503" in said[0] and "tried again" in said[0] and "pushed" in said[1]
    assert "503" in told[0] and read_status(run).error is None


# --- What stays -------------------------------------------------------------------------------------


@pytest.mark.parametrize("patient", [False, True])
@pytest.mark.parametrize("match", [COMMIT, TAG, PREUPLOAD, CREATE])
@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_is_final_and_the_entry_stays(hub, run, push, clock, match, status, patient):
    queue(run, 4)
    hub.fail(match, None, status)
    done, said = push(patient)
    assert not done and clock.naps == []
    (line,) = said
    assert "hub.py push --pending" in line and str(run) in line and str(status) in line and "\n" not in line
    assert [entry.step for entry in pending(run)] == [4]
    assert str(status) in read_status(run).error and TOKEN not in line
    hub.heal()
    assert push()[0]
    check_pushed_once(hub, run)


def test_a_token_that_may_not_write_is_final(hub, run, push, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader_only")
    queue(run, 4)
    done, said = push(patient=True)
    assert not done and len(said) == 1 and "hf_reader_only" not in said[0]
    assert [entry.step for entry in pending(run)] == [4]


def test_without_a_token_and_offline_nothing_is_asked_twice(hub, run, push, clock, monkeypatch):
    queue(run, 4, repo_id="model")
    monkeypatch.setenv("HF_TOKEN", "")
    done, said = push(patient=True)
    assert not done and len(said) == 1 and clock.naps == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    done, said = push(patient=True)
    assert not done and len(said) == 1 and clock.naps == []
    assert len(hub.requests) == asked and [entry.step for entry in pending(run)] == [4]


@pytest.mark.parametrize("last", [False, True])
def test_a_command_gives_up_after_some_tries(hub, run, push, last):
    queue(run, 4, last=last)
    hub.fail(COMMIT, None, 503)
    done, said = push()
    assert not done and "push --pending" in said[-1]
    assert [path for _, path, *_ in hub.requests if "/commit/" in path] == [
        f"/api/models/{MODEL}/commit/main"
    ] * hub_upload.TRIES
    assert [entry.step for entry in pending(run)] == [4] and "503" in read_status(run).error
    hub.heal()
    assert push()[0]
    check_pushed_once(hub, run)


def test_a_server_that_is_down_is_no_crash(hub, run, push):
    hub.stop()
    queue(run, 4)
    done, said = push()
    assert not done and "push --pending" in said[-1] and [entry.step for entry in pending(run)] == [4]
    hub.start()
    assert push()[0]
    check_pushed_once(hub, run)


def test_a_card_that_the_hub_does_not_take_is_final(hub, run, push, clock):
    queue(run, 4)
    hub.fail(YAML, None, 400)
    done, said = push(patient=True)
    assert not done and len(said) == 1 and clock.naps == [] and "Invalid metadata" in said[0]


def test_another_repository_is_made_and_its_pushes_are_counted_anew(hub, run, push):
    queue(run, 4)
    assert push()[0]
    queue(run, 8, repo_id="lab/other", private=True)
    assert push()[0]
    assert hub.repos["lab/other"].private and pushes(hub, "lab/other") == ["Step 8"]
    assert list(read_status(run).pushed) == ["step-8"] and read_status(run).repo_id == "lab/other"


def test_what_shall_be_private_is_not_pushed_to_a_public_repository(hub, run, push, clock):
    hub.add(MODEL)
    queue(run, 4, private=True)
    done, (line,) = push(patient=True)
    assert not done and f"{MODEL} is public" in line and clock.naps == [] and pushes(hub) == []


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"ratelimit": '"api";r=0;t=55'}, 55),
        ({"ratelimit": '"api";r=3;t=55'}, 0),
        ({"Retry-After": "30"}, 30),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0),
        ({}, 0),
    ],
)
def test_the_server_may_say_when_to_come_back(headers, seconds):
    error = ValueError()
    error.response = SimpleNamespace(headers=headers)
    assert asked_to_wait(error) == seconds and asked_to_wait(ValueError()) == 0


# --- Beside a run -----------------------------------------------------------------------------------


def test_who_is_patient_keeps_trying(hub, run, push):
    queue(run, 4)
    hub.fail(COMMIT, 4 * hub_upload.TRIES, 503)
    done, said = push(patient=True)
    assert done and len(said) == 2
    check_pushed_once(hub, run)


def test_after_a_failure_the_newest_is_taken(hub, run, push, clock):
    queue(run, 4)
    hub.fail(COMMIT, 3, 503)
    clock.events = {clock.now + 1: lambda: queue(run, 8)}
    assert push(patient=True)[0]
    check_pushed_once(hub, run, 8)


def test_the_last_entry_cuts_a_wait_short(hub, run, push, clock):
    queue(run, 4)
    hub.fail(COMMIT, None, 503)
    start = clock.now
    clock.events = {start + 3000: lambda: (hub.heal(), hub.fail(COMMIT, hub_upload.TRIES - 1, 503), queue(run, 8, last=True))}  # noqa: E501  # fmt: skip
    assert push(patient=True)[0]
    check_pushed_once(hub, run, 8)
    assert clock.now - start < 3100


@pytest.mark.parametrize(("last", "waits"), [(False, True), (True, False)])
def test_an_interval_lies_between_two_pushes_but_not_before_the_last(hub, run, push, clock, last, waits):
    queue(run, 4, min_interval=600.0)
    assert push(patient=True)[0] and clock.naps == []
    clock.now += 100
    before = clock.now
    queue(run, 8, min_interval=600.0, last=last)
    assert push(patient=True)[0]
    assert clock.now - before == pytest.approx(500 if waits else 0)
    assert len(pushes(hub)) == 2


def test_what_comes_while_waiting_for_its_turn_is_pushed_instead(hub, run, push, clock):
    queue(run, 4, min_interval=600.0)
    assert push(patient=True)[0]
    queue(run, 8, min_interval=600.0)
    clock.events = {
        clock.now + 200: lambda: queue(run, 12, min_interval=600.0),
        clock.now + 300: lambda: queue(run, 16, min_interval=600.0, last=True),
    }
    before = clock.now
    assert push(patient=True)[0]
    assert list(read_status(run).pushed) == ["step-4", "step-16"]
    assert 300 <= clock.now - before < 302


def test_a_user_who_pushes_does_not_wait_for_an_interval(hub, run, push, clock):
    for step in (4, 8):
        queue(run, step, min_interval=600.0)
        assert push(patient=False)[0]
    assert clock.naps == []


def test_a_second_pusher_leaves_the_queue_to_the_first(hub, run, push):
    pytest.importorskip("fcntl", reason="this system has no such locks")
    queue(run, 4)
    with only_pusher(run):
        done, said = push()
    assert not done and len(said) == 1 and hub.requests == []
    assert [entry.step for entry in pending(run)] == [4]


@pytest.fixture
def start(hub, run, tmp_path):
    """Starts a process with words of ours before the folder of the run."""
    others = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = others | hub.environment(tmp_path / "cache", TOKEN)

    def go(*words, parent=None):
        command = [sys.executable, *words, str(run), "--parent", *([str(parent)] if parent else [])]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    return go


def test_a_process_of_its_own_pushes_and_ends(hub, run, start):
    queue(run, 4)
    with start(hub_upload.__file__, parent=os.getpid()) as process:
        out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and len(out.splitlines()) == 1 and "step-4" in out
    check_pushed_once(hub, run)


def test_it_ends_with_the_process_that_started_it_though_the_server_hangs(hub, run, start):
    """And what it was sending waits for the next."""
    queue(run, 4)
    hub.fail(COMMIT, None, "hang")
    code = "import os, subprocess, sys; subprocess.run([*sys.argv[1:], str(os.getpid())])"
    with start("-c", code, sys.executable, hub_upload.__file__) as parent:
        hub.wait_for(COMMIT)
        parent.kill()
        parent.communicate(timeout=60)  # until the pusher has closed it too
    assert [entry.step for entry in pending(run)] == [4]
    with only_pusher(run) as alone:
        assert alone


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="this system has no such signal")
def test_an_upload_without_end_ends_its_process(hub, run, start):
    queue(run, 4)
    hub.fail(COMMIT, None, "hang")
    code = "from recipes import hub_upload; hub_upload.LONGEST_ATTEMPT = 1; hub_upload.main()"
    with start("-c", code, parent=os.getpid()) as process:
        assert process.wait(timeout=60) == -signal.SIGALRM
    assert [entry.step for entry in pending(run)] == [4]


# --- Words ------------------------------------------------------------------------------------------

SECRET = "s3cr3t-v4lue"


@pytest.mark.parametrize(
    "text",
    [
        f"GET https://hub.example/file?X-Amz-Signature={SECRET} failed",
        f"503 for url 'https://hub.example/a/b?sig={SECRET}&x=1' (Request ID: 1)",
        f'"https://hub.example/a?token={SECRET}", "http://hub.example/?b={SECRET}"',
        f"Cannot connect to http://me:{SECRET}@proxy.example:3128",
        f"Cannot connect to http://me:{SECRET}@proxy.example:3128/path?key={SECRET}",
        f"Proxy <https://{SECRET}@proxy.example> refused",
        f"Redirect to HTTPS://me:{SECRET}@hub.example/",
        f"ProxyError: socks5://me:{SECRET}@proxy.example:1080",
        f"Connection to hub.example: Max retries exceeded with url: /file?signature={SECRET}",
        f"GET https://hub.example/file#access_token={SECRET}",
        f"bad header 'Bearer {TOKEN}'",
        f"bad header 'Bearer hf_{'A1b2' * 8}'",
        "x" * 290 + f" {TOKEN} hf_{'A1b2' * 8}",
    ],
)
def test_an_error_in_one_line_holds_no_secret(monkeypatch, text):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for error in (ValueError(text), chained(text), ValueError(f"a\n{text}\nb")):
        line = words(error)
        assert line and "\n" not in line
        assert not any(secret in line for secret in (SECRET, TOKEN, TOKEN[:10], "A1b2"))


def chained(text):
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = ValueError(text)
    return error


def test_a_token_of_any_shape_is_left_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "plainword")
    assert "plainword" not in words(ValueError("the token plainword is unknown"))


def test_an_error_in_one_line_still_says_what_and_where():
    line = words(ValueError("503 Service Unavailable for url https://hub.example/api/models?x=1"))
    assert "503 Service Unavailable" in line and "https://hub.example/api/models" in line
    assert words(TimeoutError()) == "TimeoutError"
    error = ValueError("Refused")
    error.response = SimpleNamespace(status_code=403)
    assert words(error) == "403 Refused"
    assert "disk" in words(chained("the disk is full")) and "model.safetensors" in words(chained("x"))
    assert len(words(ValueError("long " * 1000))) < 400
