"""What waits to be pushed: folders beside the checkpoints, complete or absent, that outlive the process.

    OUTPUT_DIR/hub/step-STEP/          an entry: files/ as the repository shall have them, and entry.json
    OUTPUT_DIR/hub/step-STEP.sending/  the entry that is being pushed, or was when its process ended
    OUTPUT_DIR/hub/status.json         what has been pushed, and why the last attempt failed

Files are hard links to those of a finished checkpoint where the file system has them: an entry costs no
space and no time, and pruning the checkpoint does not take it away. The run adds entries, the one process
that pushes takes them and writes the status.
"""

import json
import os
import secrets
import shlex
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes.errors import UserError
from recipes.files import write_json, write_text

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two commands from pushing a run at once
    fcntl = None

SENDING = ".sending"
# Where the strategy `checkpoint` puts the trainer's state.
LAST_CHECKPOINT = "last-checkpoint"
# In the model card, until it is known which repository it is pushed to.
PLACEHOLDER = "PATH_OF_THIS_FOLDER"


@dataclass(frozen=True)
class Entry:
    """One push: the files of a checkpoint, and where they go."""

    step: int
    repo_id: str
    private: bool | None
    strategy: str
    """As `hub_strategy`."""
    min_interval: float = 0.0
    """Seconds that must have passed since the last push."""
    keep: bool = False
    """Whether entries that wait already are wanted too; else the newest wins."""
    last: bool = False
    """Of a run that has ended: it does not wait for its turn, and failing is given up after a few tries."""

    @property
    def name(self) -> str:
        """Of its folder, and of its revision on the Hub."""
        return f"step-{self.step}"


@dataclass
class Status:
    """What `status` tells."""

    repo_id: str | None = None
    pushed: dict[str, str] | None = None
    """Commits by the names of their revisions, in the order of pushing."""
    pushed_at: float = 0.0
    """When the last push ended, seconds since the epoch."""
    error: str | None = None
    """Why the last attempt failed; None after a success."""


def hub_folder(run: Path) -> Path:
    """Where a run keeps what concerns the Hub."""
    return run / "hub"


def push_command(run: Path) -> str:
    """What sends the queue of a run, as a user in the current folder would type it."""
    program = os.path.relpath(Path(__file__).with_name("hub.py"))
    return f"python {shlex.quote(program)} push --pending {shlex.quote(str(run))}"


def add_entry(run: Path, entry: Entry, files: Iterable[tuple[Path, Path]], texts: dict[str, str]) -> None:
    """Queue a checkpoint. Unless all are wanted, those that wait already are dropped.

    Args:
        run: Folder of the run.
        entry: What it is and where it goes.
        files: Finished files that nobody changes any more, and their paths in the repository.
        texts: Further files of the repository's root, by name: card, metrics, description of the run.
    """
    folder = hub_folder(run) / entry.name
    aside = folder.with_name(f".{entry.name}.partial")
    for leftover in hub_folder(run).glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for source, target in files:
        _link(source, aside / "files" / target)
    for name, text in texts.items():
        write_text(aside / "files" / name, text)
    write_json(aside / "entry.json", asdict(entry))
    remove(folder)
    os.replace(aside, folder)
    if not entry.keep:
        for older in _waiting(run)[:-1]:
            remove(older)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def remove(folder: Path) -> None:
    """Take an entry out of the queue, if it is there: at once, so that half of one is never seen."""
    gone = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    try:
        os.replace(folder, gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def _waiting(run: Path) -> list[Path]:
    """Entries that nobody has taken, in the order of their steps."""
    folders = [f for f in hub_folder(run).glob("step-*") if f.name.removeprefix("step-").isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))


def _folders(run: Path) -> list[Path]:
    """Entries, the one that is being sent first; some may be gone a moment later."""
    waiting = _waiting(run)  # first: what is taken in between is seen twice, and not missed
    return [*hub_folder(run).glob(f"step-*{SENDING}"), *waiting]


def pending(run: Path) -> list[Entry]:
    """What has not been pushed yet, the one that is being pushed first.

    Raises:
        UserError: One cannot be read.
    """
    found = (read_entry(folder) for folder in _folders(run))
    return [entry for entry in found if entry]


def read_entry(folder: Path) -> Entry | None:
    """The entry of a folder; None where it is gone, or only half there.

    Raises:
        UserError: It is none that this version knows.
    """
    try:
        return Entry(**json.loads((folder / "entry.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}: is no entry of a queue ({error}); remove it") from error


def take_next(run: Path) -> Path | None:
    """Take what is to be pushed now, if there is something; ask again after a failure.

    In the order of steps where all are wanted; else only the newest, and the others are dropped.
    """
    folders = [folder for folder in _folders(run) if (folder / "entry.json").exists()]
    if not folders:
        return None
    newest = read_entry(folders[-1])
    chosen = folders[0] if newest and newest.keep else folders[-1]
    for older in folders[: folders.index(chosen)]:
        remove(older)
    if chosen.name.endswith(SENDING):
        return chosen
    sending = chosen.with_name(chosen.name + SENDING)
    try:
        os.replace(chosen, sending)
    except FileNotFoundError:  # the run has replaced it meanwhile by a newer one
        return take_next(run)
    return sending


def read_status(run: Path) -> Status:
    """What has been pushed so far."""
    file = hub_folder(run) / "status.json"
    return Status(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else Status()


def write_status(run: Path, **changes: Any) -> None:
    """Change some fields of the status."""
    write_json(hub_folder(run) / "status.json", asdict(read_status(run)) | changes)


@contextmanager
def only_pusher(run: Path) -> Iterator[bool]:
    """Whether this process may push: false while another one does. The lock goes with its process."""
    hub_folder(run).mkdir(parents=True, exist_ok=True)
    with (hub_folder(run) / "lock").open("w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass  # a file system without locks: better without than never
        yield True
