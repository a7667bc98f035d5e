"""Push what is queued, one commit a checkpoint; a run starts this beside itself as a process of its own.

A process, because an upload that hangs can be left behind with it, because it shares no interpreter lock
with the training, and because a thread of an upload would hold up the exit. It ends when the queue is empty,
or with the run that started it.
"""

import argparse
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_session, get_token
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import build_hf_headers, disable_progress_bars
from huggingface_hub.utils import logging as hub_logging

from recipes.errors import UserError
from recipes.hub_queue import (
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
from recipes.hub_session import set_timeout
from recipes.loss_figure import FIGURE, can_draw, save_loss_figure

# Seconds without a byte from the server after which a request is given up and tried again.
SILENCE = 120.0
# Seconds after which an upload is given up, with its process.
LONGEST_ATTEMPT = 3 * 3600
# Seconds to wait after a failure: doubled each time.
FIRST_WAIT, LONGEST_WAIT = 2.0, 300.0
# Attempts at what nobody else will push after us: the last entry of a run, or a user's command.
TRIES = 5
# Answers that another try may change: a time-out, a conflict with another commit, too many requests.
PASSING = {408, 409, 412, 425, 429}

Say = Callable[[str], None]


def push_pending(run: Path, patient: bool, say: Say) -> bool:
    """Push entries until the queue is empty or nothing can be done.

    Args:
        run: Folder of the run.
        patient: Keep trying and wait for our turn, as long as the run goes on; else give up after TRIES.
        say: Takes a line for people.

    Returns:
        Whether the queue is empty.
    """
    with only_pusher(run) as alone:
        if not alone:
            say(f"{run}: another process is pushing it")
            return False
        failures, said = 0, None
        while pending(run):
            hurry = not patient or _is_last(run)
            if not hurry:
                _wait_for_turn(run)
            folder = take_next(run)
            error = _attempt(run, folder, say)
            if error is None:
                failures, said = 0, None
                continue
            failures += 1
            is_over = is_final(error) or (hurry and failures >= TRIES)
            if is_over and (hurry or not _is_last(run)):
                say(f"{_not_pushed(folder, error)}, send it later with: {push_command(run)}")
                return False
            if said != (said := words(error)):
                say(f"{_not_pushed(folder, error)} and is tried again")
            if _wait(run, _pause(failures, error), cut_short=not hurry):
                failures = 0  # the last entry has come: its tries begin
    return True


def _attempt(run: Path, folder: Path, say: Say) -> Exception | None:
    """Push an entry and take it out of the queue; returns what went wrong."""
    entry = read_entry(folder)
    try:
        commit = _push(entry, folder / "files", is_first=not read_status(run).pushed)
    except Exception as error:  # whatever an upload raises must not end the loop
        write_status(run, error=words(error))
        return error
    pushed = (read_status(run).pushed or {}) | {entry.name: commit}
    write_status(run, repo_id=entry.repo_id, pushed=pushed, pushed_at=time.time(), error=None)
    remove(folder)
    say(f"step {entry.step:>7,}  pushed to {entry.repo_id} as {entry.name}")
    return None


def _not_pushed(folder: Path, error: Exception) -> str:
    entry = read_entry(folder)
    return f"step {entry.step:>7,}  not pushed to {entry.repo_id}: {words(error)}; it stays queued"


def _is_last(run: Path) -> bool:
    return any(entry.last for entry in pending(run))


def _wait_for_turn(run: Path) -> None:
    """Until the interval between two pushes has passed, or the run has ended and its last entry is there."""
    interval = max(entry.min_interval for entry in pending(run))
    _wait(run, read_status(run).pushed_at + interval - time.time(), cut_short=True)


def _wait(run: Path, seconds: float, cut_short: bool) -> bool:
    """Sleep; returns whether it was cut short, because the run's last entry has come."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if cut_short and _is_last(run):
            return True
        time.sleep(min(left, 0.5))
    return False


def _pause(failures: int, error: Exception) -> float:
    """Seconds until the next try: as the server says, else longer after each failure."""
    response = getattr(error, "response", None)
    after = response.headers.get("Retry-After", "") if response is not None else ""
    return max(float(after) if after.isdigit() else 0.0, min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT))


def is_final(error: Exception) -> bool:
    """Whether another try would end the same: the user has to do something first."""
    if isinstance(error, HfHubHTTPError) and not isinstance(error, BadRequestError):
        status = error.response.status_code
        return 400 <= status < 500 and status not in PASSING
    kinds = (BadRequestError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, UserError)
    return isinstance(error, kinds)


def words(error: BaseException) -> str:
    """An error in one line, without a token and without the queries of addresses, which may hold secrets."""
    response = getattr(error, "response", None)
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.split(" For more information check:")[0]
    text = re.sub(r"(https?://)[^\s/@]*@", r"\1", text)
    text = re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)
    if token := get_token():
        text = text.replace(token, "[token]")
    text = re.sub(r"hf_\w{8,}", "[token]", text)[:300]
    cause = f" ({words(error.__cause__)})" if isinstance(error, RuntimeError) and error.__cause__ else ""
    status = (
        f"{response.status_code} " if response is not None and str(response.status_code) not in text else ""
    )
    return f"{status}{text}{cause}"


def _push(entry: Entry, files: Path, is_first: bool) -> str:
    """One push, with the figure of its card; returns the commit. One without end ends this process."""
    _end_after(LONGEST_ATTEMPT)
    try:
        lines = [json.loads(line) for line in (files / "metrics.jsonl").read_text().splitlines()]
        if can_draw(lines) and not (files / FIGURE).exists():
            save_loss_figure(lines, files / FIGURE)
        return push_files(entry, files, is_first)
    finally:
        _end_after(0)


def _end_after(seconds: int) -> None:
    """End this process, whatever it hangs in, unless asked again; 0 takes it back. Not on Windows."""
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def push_files(entry: Entry, files: Path, is_first: bool) -> str:
    """Push a folder as one commit on main, and tag it; returns the commit.

    What a lost answer leaves undone is done by the next try: the same files make no second commit.
    """
    api = HfApi()
    # Without a namespace, where the Hub could not be asked when it was queued, it is the user's own.
    repo_id = entry.repo_id if "/" in entry.repo_id else f"{api.whoami()['name']}/{entry.repo_id}"
    if is_first:
        api.create_repo(repo_id, private=entry.private, exist_ok=True)
    _use_xet_where_spoken(repo_id)
    paths = {f.relative_to(files).as_posix(): f for f in sorted(files.rglob("*")) if f.is_file()}
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
    if get_session().get(address, headers=build_hf_headers()).status_code == 404:
        constants.HF_HUB_DISABLE_XET = True


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
    done = push_pending(given.run, patient=True, say=partial(print, flush=True))
    sys.stdout.flush()
    # Threads of an upload that hangs are not waited for.
    os._exit(0 if done else 1)


if __name__ == "__main__":
    main()
