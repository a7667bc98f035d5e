"""Files and folders that are complete or absent."""

import json
import os
import socket
import subprocess
import sys

import pytest

from recipes.files import cached_folder, write_json


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder(tmp_path / "x", fail)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_dead_processes_are_removed_and_of_living_ones_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f"x.tmp-{dead.pid}-{socket.gethostname()}", f"x.tmp-{os.getppid()}-{socket.gethostname()}"]
    for name in [*names, "x.tmp-1-elsewhere", "x.tmp-2-elsewhere"]:
        (tmp_path / name).mkdir()
    os.utime(tmp_path / "x.tmp-2-elsewhere", (0, 0))
    cached_folder(tmp_path / "x", lambda folder: (folder / "whole").write_text(""))
    assert {path.name for path in tmp_path.iterdir()} == {"x", names[1], "x.tmp-1-elsewhere"}


def test_a_replaced_file_is_old_or_new(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("no space")))
    with pytest.raises(OSError, match="no space"):
        write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
