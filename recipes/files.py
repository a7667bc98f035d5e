"""Files and folders that are complete or absent, and survive a power cut."""

import errno
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from recipes.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two runs apart
    fcntl = None

# The file by which a process keeps a folder for itself.
LOCK = ".lock"
# Errors of a disk that is full, broken, gone, or that one may not write to.
_NAMES = "EACCES EDQUOT EFBIG EIO ENOENT ENOSPC ENOTCONN EPERM EROFS ESHUTDOWN ESTALE ETIMEDOUT"
STORAGE_ERRORS = {getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name)}
# Without a change for so long, a folder in the making has been given up.
STALE_SECONDS = 3600.0


def is_storage_error(error: OSError) -> bool:
    """Whether an error is the disk's or its rights', and no mistake of the program's."""
    return error.errno in STORAGE_ERRORS


def write_json(file: Path, value: Any) -> None:
    """Replace a file by `value` as JSON: whole or not at all."""
    write_text(file, json.dumps(value, indent=2) + "\n")


def write_text(file: Path, text: str) -> None:
    """Replace a file: whole or not at all, also where several processes write it at once."""
    write_bytes(file, text.encode("utf-8"))


def write_bytes(file: Path, data: bytes) -> None:
    """As `write_text`."""
    aside = aside_of(file)
    aside.write_bytes(data)
    sync(aside)
    os.replace(aside, file)


def aside_of(file: Path) -> Path:
    """Where this process makes a file before it gets its name."""
    return file.with_name(f".{file.name}.{os.getpid()}-{socket.gethostname()}.partial")


def is_aside(file: Path, of: str = "*") -> bool:
    """Whether a file is what a process left that was killed while it wrote one of the name `of`."""
    return file.match(f".{of}.*-*.partial")


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder and everything in it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


class FolderLock:
    """Keeps other processes from working in a folder, once acquired, until left or until the process ends."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK
        self._stream: TextIO | None = None
        self._made_folder = False

    def acquire(self) -> None:
        """Take the lock; the folder is made if need be, and goes again if nothing else comes into it.

        Raises:
            UserError: Another process has it, or the folder cannot be made or written to.
        """
        try:
            self._made_folder |= not self.file.parent.exists()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            if not self._stream and fcntl:
                self._acquire()
        except OSError as error:
            raise UserError(f"output_dir {self.file.parent}: cannot be used ({error.strerror})") from error

    def _acquire(self) -> None:
        stream = self.file.open("a+", encoding="utf-8")
        try:
            # Not flock, which workers and other children would inherit and keep.
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                stream.seek(0)
                owner = stream.read().strip() or "another process"
                stream.close()
                raise UserError(
                    f"output_dir {self.file.parent}: {owner} is working in it; wait for its end"
                ) from None
            # A file system without locks: better without than never.
        self._stream = stream
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stream:
            if self._made_folder:
                with suppress(OSError):  # there is more in it: something came of it
                    if list(self.file.parent.iterdir()) == [self.file]:
                        self.file.unlink()
                        self.file.parent.rmdir()
            self._stream.close()
            self._stream = None


def make_cache_dir(cache_dir: str) -> Path:
    """The cache folder, made if need be.

    Raises:
        UserError: It cannot be made.
    """
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache_dir {cache_dir}: {error.strerror}; give a folder that can be made") from error
    return Path(cache_dir)


def cached_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, which `build` fills beside it before it gets its name; nothing is built if it exists.

    Where several processes build the same folder, the first to finish wins.

    Raises:
        UserError: The disk is full.
    """
    if not folder.exists():
        _build_aside(folder, build)
    return folder


def _build_aside(folder: Path, build: Callable[[Path], None]) -> None:
    for other in folder.parent.glob(f"{folder.name}.tmp-*"):
        if _is_stale(other):
            shutil.rmtree(other, ignore_errors=True)
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-{socket.gethostname()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        build(aside)
        sync_tree(aside)
        os.replace(aside, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"cache_dir {folder.parent}: the disk is full; free space or give another"
            ) from error
        if not folder.exists():  # else another process finished the same folder meanwhile
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync(folder.parent)


def _is_stale(aside: Path) -> bool:
    """Whether the process that made a folder is gone."""
    pid, host = aside.name.rpartition(".tmp-")[2].split("-", 1)
    if host == socket.gethostname() and Path("/proc").exists() and not Path(f"/proc/{pid}").exists():
        return True
    return time.time() - _last_change(aside) > STALE_SECONDS


def _last_change(folder: Path) -> float:
    """Newest modification time of a folder and its files, seconds since the epoch; 0 if it is gone."""
    try:
        return max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
    except FileNotFoundError:
        return 0.0
