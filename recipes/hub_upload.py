"""Push what is queued, one commit a checkpoint; a run starts this beside itself as a process of its own.

A process, because an upload that hangs can be left behind with it, because it shares no interpreter lock
with the training, and because a thread of an upload would hold up the exit. It ends when the queue is empty,
or with the run that started it.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, hf_raise_for_status
from huggingface_hub.utils import logging as hub_logging

from recipes.errors import UserError
from recipes.files import write_text
from recipes.hub_queue import (
    PLACEHOLDER,
    Entry,
    only_pusher,
    pending,
    push_command,
    read_entry,
    read_status,
    remove,
    take_next,
    write_status,
)
from recipes.hub_session import asked_to_wait, is_final, set_timeout, words
from recipes.loss_figure import FIGURE, draw_loss

# Seconds without a byte from the server after which a request is given up and tried again.
SILENCE = 120.0
# Seconds after which an upload is given up, with its process.
LONGEST_ATTEMPT = 3 * 3600
# Seconds to wait after a failure: doubled each time.
FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0
# Attempts of a command, for which somebody waits.
TRIES = 5

Say = Callable[[str], None]


def push_pending(run: Path, say: Say, tries: int | None = None) -> bool:
    """Push entries until the queue is empty or nothing can be done.

    Args:
        run: Folder of the run.
        say: Takes a line for people.
        tries: Attempts after which to give up; None: as long as the run lives, at its interval.

    Returns:
        Whether the queue is empty.
    """
    with only_pusher(run) as alone:
        if not alone:
            say(f"{run}: another process is pushing it")
            return False
        failures, said = 0, None
        while pending(run):
            if tries is None:
                _wait_for_turn(run)
            was_last, folder = _is_last(run), take_next(run)
            error = _attempt(run, folder, say) if folder else None
            if error is None:
                failures, said = 0, None
                continue
            failures += 1
            # The last entry may have come meanwhile: it is tried in any case.
            if failures == tries or (is_final(error) and was_last == _is_last(run)):
                say(f"{_not_pushed(folder, error)}, send it later with: {push_command(run)}")
                return False
            if said != (said := words(error)):
                say(f"{_not_pushed(folder, error)} and is tried again")
            _wait(run, max(asked_to_wait(error), min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)))
            if was_last != _is_last(run):
                failures = 0
    return True


def _attempt(run: Path, folder: Path, say: Say) -> Exception | None:
    """Push an entry and take it out of the queue; returns what went wrong."""
    entry, status = read_entry(folder), read_status(run)
    try:
        repo_id = full_name(entry.repo_id)
        is_first = repo_id != status.repo_id
        commit = _push(repo_id, entry, folder / "files", is_first)
    except Exception as error:  # whatever an upload raises must not end the loop
        # One that is gone is made anew by the next command.
        known = None if isinstance(error, RepositoryNotFoundError) else status.repo_id
        write_status(run, repo_id=known, error=words(error))
        return error
    pushed = ({} if is_first else status.pushed or {}) | {entry.name: commit}
    write_status(run, repo_id=repo_id, pushed=pushed, pushed_at=time.time(), error=None)
    remove(folder)
    say(f"step {entry.step:>7,}  pushed to {repo_id} as {entry.name}")
    return None


def _not_pushed(folder: Path, error: Exception) -> str:
    entry = read_entry(folder)
    return f"step {entry.step:>7,}  not pushed to {entry.repo_id}: {words(error)}; it stays queued"


def _is_last(run: Path) -> bool:
    return any(entry.last for entry in pending(run))


def _wait_for_turn(run: Path) -> None:
    """Until the interval between two pushes has passed, unless the run has ended."""
    interval = max((entry.min_interval for entry in pending(run)), default=0.0)
    if not _is_last(run):
        _wait(run, read_status(run).pushed_at + interval - time.time())


def _wait(run: Path, seconds: float) -> None:
    """Sleep, but no longer than until the last entry of the run comes."""
    was_last, end = _is_last(run), time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and was_last == _is_last(run):
        time.sleep(min(left, 0.5))


@cache
def full_name(repo_id: str) -> str:
    """The repository with its namespace: without one it is the user's own."""
    return repo_id if "/" in repo_id else f"{HfApi().whoami()['name']}/{repo_id}"


def _push(repo_id: str, entry: Entry, files: Path, is_first: bool) -> str:
    """Complete the files of an entry and push them; returns the commit. One without end ends this process."""
    _end_after(LONGEST_ATTEMPT)
    try:
        lines = [json.loads(line) for line in (files / "metrics.jsonl").read_text().splitlines()]
        has_figure = draw_loss(lines, files / FIGURE)
        card = (files / "README.md").read_text(encoding="utf-8").replace(PLACEHOLDER, repo_id)
        if not has_figure:
            card = "".join(line for line in card.splitlines(True) if FIGURE not in line)
        write_text(files / "README.md", card)
        return push_files(repo_id, entry, files, is_first)
    finally:
        _end_after(0)


def _end_after(seconds: int) -> None:
    """End this process, whatever it hangs in, unless asked again; 0 takes it back. Not on Windows."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def push_files(repo_id: str, entry: Entry, files: Path, is_first: bool) -> str:
    """Push a folder as one commit on main, and tag it; returns the commit.

    What a lost answer leaves undone is done by the next try: the same files make no second commit.

    Raises:
        UserError: The repository is public, and was to be private.
    """
    api = HfApi()
    if is_first:
        api.create_repo(repo_id, private=entry.private, exist_ok=True)
        if entry.private and not api.model_info(repo_id).private:
            raise UserError(f"hub_private_repo: {repo_id} is public; make it private, or give another")
    _use_xet_where_spoken(repo_id)
    # What a link points to may be anything on this machine.
    found = (f for f in sorted(files.rglob("*")) if f.is_file() and not f.is_symlink())
    paths = {f.relative_to(files).as_posix(): f for f in found}
    additions = [CommitOperationAdd(name, path) for name, path in paths.items()]
    # The root first: what lies in the state's folder a second time is then there already.
    root = [addition for addition in additions if "/" not in addition.path_in_repo]
    api.preupload_lfs_files(repo_id, root, free_memory=False)
    commit = api.create_commit(repo_id, additions, commit_message=f"Step {entry.step}").oid
    _tag(api, repo_id, entry.name, commit)
    return commit


def _tag(api: HfApi, repo_id: str, name: str, commit: str) -> None:
    """Let the revision `name` be this commit, also where an earlier push of the same step made it."""
    try:
        api.create_tag(repo_id, tag=name, revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo_id).tags}
        if tags.get(name) != commit:
            api.delete_tag(repo_id, tag=name)
            api.create_tag(repo_id, tag=name, revision=commit)


@cache
def _use_xet_where_spoken(repo_id: str) -> None:
    """A Hub of one's own may not speak Xet, for which huggingface_hub has a switch and no fallback."""
    address = f"{constants.ENDPOINT}/api/models/{repo_id}/xet-write-token/main"
    response = get_session().get(address, headers=build_hf_headers())
    if response.status_code == 404:
        constants.HF_HUB_DISABLE_XET = True
    else:
        hf_raise_for_status(response)


def _end_with(parent: int) -> None:
    """End this process as soon as the one that started it is gone, even if that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> int:
    """Push beside a run, without getting in its way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--parent", type=int, required=True)
    given = parser.parse_args()
    threading.Thread(target=_end_with, args=(given.parent,), daemon=True).start()
    if hasattr(os, "nice"):
        os.nice(10)
    disable_progress_bars()
    hub_logging.set_verbosity_error()
    set_timeout(SILENCE)
    done = push_pending(given.run, say=partial(print, flush=True))
    sys.stdout.flush()
    # Threads of an upload that hangs are not waited for.
    os._exit(0 if done else 1)


if __name__ == "__main__":
    main()
