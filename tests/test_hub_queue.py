"""What waits for the Hub: complete or absent, the newest wins, and no process that dies takes it along."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hub_fixtures import expected_files, queue, read_folder, write_files

from recipes import hub_queue
from recipes.errors import UserError
from recipes.hub_queue import (
    Entry,
    add_entry,
    hub_folder,
    only_pusher,
    pending,
    push_command,
    read_entry,
    read_status,
    remove,
    take_next,
    write_status,
)

ROOT = Path(__file__).parent.parent
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch):
    """What a flush to the disk is for is not tested here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def steps(run):
    return [entry.step for entry in pending(run)]


def check_taken(run):
    """Takes what is to be pushed now, which is whole; its folder and step."""
    folder = take_next(run)
    if folder is None:
        return None
    step = read_entry(folder).step
    assert read_folder(folder / "files") == expected_files(step)
    return folder, step


def push_all(run):
    """Steps in the order in which a pusher would push them."""
    done = []
    while pending(run):
        folder, step = check_taken(run)
        remove(folder)
        done.append(step)
    return done


# --- Order ------------------------------------------------------------------------------------------


def test_the_newest_wins(tmp_path):
    for step in (4, 8, 12):
        queue(tmp_path, step)
        assert steps(tmp_path) == [step]
    assert push_all(tmp_path) == [12] and pending(tmp_path) == []


def test_where_all_are_wanted_they_are_pushed_in_the_order_of_their_steps(tmp_path):
    for step in (8, 100, 12):
        queue(tmp_path, step, keep=True)
    assert steps(tmp_path) == [8, 12, 100]
    assert push_all(tmp_path) == [8, 12, 100]


def test_a_step_that_is_queued_again_is_there_once_as_it_is_now(tmp_path):
    queue(tmp_path, 4, keep=True)
    queue(tmp_path, 4, keep=True, repo_id="lab/other")
    assert [(entry.step, entry.repo_id) for entry in pending(tmp_path)] == [(4, "lab/other")]
    assert push_all(tmp_path) == [4]


def test_an_entry_is_read_as_it_was_added(tmp_path):
    given = Entry(4, "lab/model", True, "checkpoint", min_interval=60.0, keep=True, last=True)
    source = write_files(tmp_path / "checkpoint-4", {"a.bin": b"a"}) / "a.bin"
    add_entry(tmp_path, given, [(source, Path("a.bin"))], {})
    assert pending(tmp_path) == [given]
    assert given.name == "step-4"


@pytest.mark.parametrize("keep", [False, True])
def test_what_was_being_sent_when_its_process_died_waits_again(tmp_path, keep):
    queue(tmp_path, 4, keep=keep)
    assert check_taken(tmp_path)[1] == 4
    assert steps(tmp_path) == [4]
    assert check_taken(tmp_path)[1] == 4
    queue(tmp_path, 8, keep=keep)
    assert steps(tmp_path) == [4, 8]
    assert push_all(tmp_path) == ([4, 8] if keep else [8])


def test_an_entry_stays_until_it_is_removed(tmp_path):
    queue(tmp_path, 4)
    folder = take_next(tmp_path)
    queue(tmp_path, 8)
    assert read_folder(folder / "files") == expected_files(4)
    remove(folder)
    assert steps(tmp_path) == [8]


# --- Files ------------------------------------------------------------------------------------------


def test_an_entry_outlives_its_checkpoint_and_shares_its_bytes(tmp_path):
    queue(tmp_path, 4)
    checkpoint = tmp_path / "checkpoint-4"
    (copy,) = hub_folder(tmp_path).glob("*/files/model.safetensors")
    assert copy.samefile(checkpoint / "model.safetensors")
    shutil.rmtree(checkpoint)
    assert check_taken(tmp_path)[1] == 4


def test_without_links_files_are_copied(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("this file system has no links")

    monkeypatch.setattr(os, "link", no_links)
    queue(tmp_path, 4)
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert check_taken(tmp_path)[1] == 4


def test_files_may_lie_twice_and_in_folders(tmp_path):
    source = write_files(tmp_path / "checkpoint-4", {"a.bin": b"a"}) / "a.bin"
    files = [(source, Path("a.bin")), (source, Path("last-checkpoint/trainer/a.bin"))]
    add_entry(tmp_path, Entry(4, "writer/model", None, "checkpoint"), files, {"README.md": "é"})
    stored = read_folder(take_next(tmp_path) / "files")
    assert stored == {"a.bin": b"a", "last-checkpoint/trainer/a.bin": b"a", "README.md": "é".encode()}


@pytest.mark.parametrize("broken", ["{", "[]", '{"step": 4}', '{"hue": 1}'])
def test_an_entry_that_is_none_is_named(tmp_path, broken):
    queue(tmp_path, 4)
    (file,) = hub_folder(tmp_path).glob("*/entry.json")
    file.write_text(broken)
    with pytest.raises(UserError, match="step-4"):
        pending(tmp_path)


def test_an_empty_queue(tmp_path):
    for run in (tmp_path, tmp_path / "absent"):
        assert pending(run) == []
        assert read_status(run) == hub_queue.Status()


# --- Interrupted ------------------------------------------------------------------------------------


def test_a_checkpoint_that_cannot_be_queued_leaves_nothing(tmp_path):
    queue(tmp_path, 4)
    files = [
        (tmp_path / "checkpoint-4" / "vocab.txt", Path("a")),
        (tmp_path / "checkpoint-8" / "absent", Path("b")),
    ]
    with pytest.raises(OSError):
        add_entry(tmp_path, Entry(8, "writer/model", None, "end"), files, {"README.md": ""})
    assert steps(tmp_path) == [4]
    queue(tmp_path, 12)
    assert push_all(tmp_path) == [12]
    assert [f for f in hub_folder(tmp_path).rglob("*") if f.is_file()] == []


CHANGES = ("open", "os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def dies_at(number, action):
    """Whether a process of its own died, killed as it was about to touch the disk for this time."""
    child = os.fork()
    if child == 0:
        left = [number]

        def hook(event, _):
            if event in CHANGES:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def replace_older(run):
    queue(run, 8)


def push_one(run):
    remove(take_next(run))


def take_newer(run):
    hub_queue.take_next(run)


SITUATIONS = {
    "queueing": (lambda run: queue(run, 4), replace_older, ([4], [8])),
    "queueing the same again": (lambda run: queue(run, 8), replace_older, ([8], [])),
    "pushing": (lambda run: queue(run, 4), push_one, ([4], [])),
    "taking a newer one": (
        lambda run: (queue(run, 4), take_next(run), queue(run, 8)),
        take_newer,
        ([8], [8]),
    ),
}


@needs_fork
@pytest.mark.parametrize("situation", SITUATIONS)
def test_killed_at_any_moment_it_is_complete_or_absent_and_goes_on(tmp_path, situation):
    prepare, action, outcomes = SITUATIONS[situation]
    for number in range(1, 300):
        run = tmp_path / str(number)
        prepare(run)
        write_files(run / "checkpoint-8", {})
        killed = dies_at(number, lambda run=run: action(run))
        waiting = set(steps(run))
        pushed = push_all(run)
        assert waiting <= {4, 8} and pushed in outcomes
        queue(run, 12)
        assert push_all(run) == [12]
        if not killed:
            break
    assert number > 5 and not killed


# --- A run and a pusher at once ---------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_a_run_may_replace_what_a_pusher_is_about_to_take(tmp_path, keep):
    """Many times, as fast as both can."""
    last, pushed, failures, done = 60, [], [], threading.Event()
    for step in range(1, last + 1):
        write_files(tmp_path / f"checkpoint-{step}", {})

    def push():
        try:
            while not done.is_set() or pending(tmp_path):
                # What is there a moment may be replaced the next.
                if pending(tmp_path) and (taken := check_taken(tmp_path)):
                    pushed.append(taken[1])
                    remove(taken[0])
        except Exception as error:
            failures.append(error)

    pusher = threading.Thread(target=push)
    pusher.start()
    for step in range(1, last + 1):
        queue(tmp_path, step, keep=keep)
    done.set()
    pusher.join(timeout=60)
    assert failures == [] and not pusher.is_alive()
    assert pushed == sorted(set(pushed)) and pushed[-1] == last
    if keep:
        assert pushed == list(range(1, last + 1))


@pytest.mark.parametrize("act", [pending, take_next])
def test_an_entry_that_is_being_dropped_is_gone_for_the_pusher(tmp_path, monkeypatch, act):
    """The pusher looks when half of the files are deleted."""
    queue(tmp_path, 4)
    seen, acting, delete = [], [], shutil.rmtree

    def half_way(folder, *args, **options):
        entry = Path(folder) / "entry.json"
        if not acting and entry.exists() and "step-4" in entry.parent.name:
            acting.append(entry.unlink())
            (Path(folder) / "files" / "model.safetensors").unlink()
            seen.append(act(tmp_path))
        delete(folder, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", half_way)
    queue(tmp_path, 8)
    monkeypatch.undo()
    (found,) = seen
    assert (found if act is pending else [read_entry(found)]) == [
        Entry(8, "writer/model", None, "every_save")
    ]
    assert push_all(tmp_path) == [8]


# --- Status and lock --------------------------------------------------------------------------------


def test_the_status_keeps_what_is_not_changed(tmp_path):
    hub_folder(tmp_path).mkdir()
    write_status(tmp_path, repo_id="writer/model", pushed={"step-4": "a"}, pushed_at=1.5)
    write_status(tmp_path, error="503")
    status = read_status(tmp_path)
    assert (status.repo_id, status.pushed, status.pushed_at) == ("writer/model", {"step-4": "a"}, 1.5)
    assert status.error == "503"
    write_status(tmp_path, error=None)
    assert read_status(tmp_path).error is None
    assert pending(tmp_path) == []


def test_the_command_that_sends_the_rest_can_be_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "my run's"
    shown = subprocess.run(
        ["sh", "-c", f"printf '%s\\n' {push_command(run)}"], capture_output=True, text=True
    )
    program, *words = shown.stdout.splitlines()[1:]
    assert (tmp_path / program).resolve() == ROOT / "recipes" / "hub.py"
    assert words == ["push", "--pending", str(run)]


def test_one_may_push_and_no_other_until_it_is_done(tmp_path):
    pytest.importorskip("fcntl", reason="this system has no such locks")
    with only_pusher(tmp_path) as first:
        with only_pusher(tmp_path) as second, only_pusher(tmp_path / "other") as elsewhere:
            assert (first, second, elsewhere) == (True, False, True)
        with only_pusher(tmp_path) as third:
            assert not third
    with only_pusher(tmp_path) as again:
        assert again


def test_the_lock_goes_with_a_killed_process(tmp_path):
    pytest.importorskip("fcntl", reason="this system has no such locks")
    code = (
        "import sys, time; from pathlib import Path; from recipes.hub_queue import only_pusher\n"
        "with only_pusher(Path(sys.argv[1])) as alone: print(alone, flush=True); time.sleep(600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout.readline() == "True\n"
        with only_pusher(tmp_path) as alone:
            assert not alone
        process.kill()
    with only_pusher(tmp_path) as alone:
        assert alone
