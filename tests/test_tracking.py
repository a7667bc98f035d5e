"""Trackers: the files they leave are read back, also after a run was killed and went on."""

import json
import os
import platform
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
from importlib.util import find_spec

import pytest
from accelerate.tracking import TensorBoardTracker

from recipes import tracking
from recipes.errors import UserError
from recipes.pretraining import pretrain
from tests.conftest import ROOT, TIMES, TINY, metrics_of
from tests.test_training import digest

SECRETS = {
    "HF_TOKEN": "hf_" + "Q7" * 17,
    "WANDB_API_KEY": "5e" * 20,
    "AWS_SECRET_ACCESS_KEY": "Zx9" * 12,
    "MY_PASSWORD": "correct-horse-battery",
}
TRACKERS = [
    pytest.param(name, marks=pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed"))
    for name in ("tensorboard", "trackio", "wandb")
]
# Dies as a pre-empted process does, where training has gone on since its last checkpoint.
PROGRAM = """
import json, os, signal, sys, time
from recipes.command_line import build_arguments
from recipes.pretraining import pretrain
from recipes.training import Trainer
count, (options, last) = Trainer._count, json.loads(sys.argv[1])
def dying(self, batches):
    count(self, batches)
    if self.state.step == last:
        time.sleep(1)  # what is written in the background may arrive, or not
        os.kill(os.getpid(), signal.SIGKILL)
Trainer._count = dying
pretrain(build_arguments(options))
"""


@pytest.fixture(scope="module")
def train(corpus_dir, cache_dir, tmp_path_factory):
    """Trains in a process of its own, as long as it lives, with secrets around and no network."""
    home = tmp_path_factory.mktemp("home")

    def start(output_dir, die_at=None, env=None, **options):
        options = TINY | {"train_file": str(corpus_dir), "cache_dir": str(cache_dir)} | options
        options |= {"output_dir": str(output_dir)}
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TRACKIO"))}
        environment |= SECRETS | {"HOME": str(home), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
        command = [sys.executable, "-c", PROGRAM, json.dumps([options, die_at])]
        run = subprocess.run(
            command, cwd=ROOT, env=environment | (env or {}), capture_output=True, text=True, timeout=240
        )
        assert run.returncode == (-signal.SIGKILL if die_at else 0), run.stdout + run.stderr
        return run.stdout

    start.home = home
    return start


@pytest.fixture(scope="module")
def killed(train, tmp_path_factory):
    """Folder of a run without a tracker that died at update 7, after the checkpoint of update 4."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    train(folder, die_at=7)
    return folder


@pytest.fixture(scope="module", params=TRACKERS)
def tracked(request, train, tmp_path_factory):
    """Tracker and folder of a run that died at update 7 and was finished by another process."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    train(folder, die_at=7, report_to=request.param)
    train(folder, report_to=request.param)
    return request.param, folder


def read(tracker, folder):
    """Curves of the one run in there, name -> [(step, value)], and its options, from the tracker's files."""
    return {"tensorboard": read_tensorboard, "trackio": read_trackio, "wandb": read_wandb}[tracker](folder)


def read_tensorboard(folder):
    import yaml
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "bert-ln"), size_guidance={"scalars": 0})
    events.Reload()
    curves = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    (options,) = (folder / "bert-ln").glob("*/hparams.yml")
    return curves, yaml.safe_load(options.read_text())


def read_trackio(folder):
    with sqlite3.connect(folder / "trackio" / "bert-ln.db") as db:
        rows = db.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY step").fetchall()
        ((options,),) = db.execute("SELECT config FROM configs").fetchall()
    assert len({row[:2] for row in rows}) == 1
    return by_name((step, json.loads(metrics)) for _, _, step, metrics in rows), json.loads(options)


def read_wandb(folder):
    """The newest of the folders, which all have one run's id."""
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1
    rows, options = [], {}
    for record in wandb_records(files[-1].read_bytes()):
        for item in record.run.config.update:
            options[item.key] = json.loads(item.value_json)
        for item in record.config.update:
            options[item.key] = json.loads(item.value_json)
        values = {(i.key or i.nested_key[0]): json.loads(i.value_json) for i in record.history.item}
        if values:
            numbers = {k: v for k, v in values.items() if not k.startswith("_")}
            rows.append((values["_step"], numbers))
    return by_name(rows), options


def wandb_records(data):
    """wandb's file: seven bytes, then a log of LevelDB's kind, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # too little for a header: filled up with zeros
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(parts)
            parts = b""


def by_name(rows):
    curves = {}
    for step, values in rows:
        for name, value in values.items():
            curves.setdefault(name, []).append((step, value))
    return curves


def tracked_names(line):
    """Validation has curves of its own also where its line has a name that a training line has."""
    renamed = {"masked_tokens", "below_unigram_cross_entropy"} if "validation_loss" in line else ()
    return {f"validation_{k}" if k in renamed else k: v for k, v in line.items()}


def assert_curves_of(folder, curves):
    """Every number of metrics.jsonl, each step once, and nothing else."""
    written = by_name((line["step"], tracked_names(line)) for line in metrics_of(folder))
    written = {k: v for k, v in written.items() if k != "step" and isinstance(v[0][1], (int, float))}
    assert set(curves) == set(written) | set(TIMES)
    for name, points in written.items():
        assert [step for step, _ in curves[name]] == [step for step, _ in points], name
        assert [v for _, v in curves[name]] == pytest.approx([v for _, v in points]), name
    assert [step for step, _ in written["train_loss"]] == list(range(1, 13))
    assert [step for step, _ in written["validation_loss"]] == [4, 8, 12]
    for name in TIMES:  # of the process that came first to a step
        steps = [4, 8, 12] if name == "validation_seconds" else list(range(1, 13))
        assert [step for step, _ in curves[name]] == steps, name


def test_a_run_that_was_killed_continues_its_curves(tracked):
    tracker, folder = tracked
    curves, _ = read(tracker, folder)
    assert_curves_of(folder, curves)


def test_options_are_the_tracked_configuration(tracked):
    tracker, folder = tracked
    _, options = read(tracker, folder)
    expected = {"learning_rate": 1e-3, "seed": 42, "hidden_size": 32, "bf16": False, "masking_unit": "token"}
    assert {name: options[name] for name in expected} == expected


def test_no_secret_and_nothing_of_the_machine_is_written(tracked, train):
    tracker, folder = tracked
    secrets = [value.encode() for value in SECRETS.values()]
    machine = [sys.executable.encode(), platform.platform().encode(), b"torch=="]
    own = [f for f in folder.rglob("*") if f.is_file() and tracker_owns(f.relative_to(folder))]
    assert own
    for file in own:
        for word in secrets + machine:
            assert word not in file.read_bytes(), (file, word)
    for file in [*folder.rglob("*"), *train.home.rglob("*")]:
        assert not file.is_file() or not any(secret in file.read_bytes() for secret in secrets), file


def tracker_owns(path):
    return path.parts[0] in ("bert-ln", "trackio", "wandb", "tracking.json")


def test_a_finished_run_is_not_tracked_again(tracked, train):
    tracker, folder = tracked
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    assert "finished: nothing to do" in train(folder, report_to=tracker)
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_that_comes_later_gets_the_curves_from_the_start(tracker, killed, train, tmp_path):
    shutil.copytree(killed, tmp_path / "run")
    train(tmp_path / "run", report_to=tracker)
    curves, _ = read(tracker, tmp_path / "run")
    # The lines before the checkpoint come from metrics.jsonl.
    assert_curves_of(tmp_path / "run", curves)


@pytest.mark.parametrize("tracker", TRACKERS)
def test_only_the_main_process_tracks_and_the_users_folders_go_first(tracker, launch, tmp_path):
    env = {"TRACKIO_DIR": str(tmp_path / "trackio"), "WANDB_DIR": str(tmp_path), "WANDB_MODE": "offline"}
    env |= {"HF_HUB_OFFLINE": "1"}
    run = launch(processes=2, env=env, output_dir=tmp_path / "run", report_to=tracker)
    assert run.returncode == 0, run.stderr
    assert "off from here" not in run.stdout
    curves, _ = read(tracker, tmp_path / "run" if tracker == "tensorboard" else tmp_path)
    assert_curves_of(tmp_path / "run", curves)
    if tracker == "wandb":
        assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


@pytest.mark.parametrize("method", ["start", "log", "finish"])
def test_a_tracker_that_fails_changes_nothing(tiny, tmp_path, monkeypatch, capsys, method):
    pretrain(tiny(output_dir=str(tmp_path / "without")))

    def fail(self, *words, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardTracker, method, fail)
    capsys.readouterr()
    pretrain(tiny(report_to="tensorboard"))
    warned = [line for line in capsys.readouterr().out.splitlines() if "No space left" in line]
    assert len(warned) == 1 and warned[0].startswith("report_to tensorboard: off from here")
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "without")
    assert digest(tmp_path / "run" / "checkpoint-12") == digest(tmp_path / "without" / "checkpoint-12")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_under_tensorboard_stops_nothing(tiny, monkeypatch, capsys):
    """The write fails in tensorboard's own thread."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write = RecordWriter.write
    writes = []

    def fill(self, data):
        writes.append(data)
        if len(writes) > 20:
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", fill)
    pretrain(tiny(report_to="tensorboard"))
    printed = capsys.readouterr().out
    assert printed.count("report_to tensorboard: off from here") == 1
    assert "validation loss" in printed.partition("off from here")[2]


def test_a_tracker_that_is_not_installed(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="report_to wandb: not installed; pip install wandb"):
        pretrain(tiny(report_to="wandb"))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.parametrize(
    ("key", "message"),
    [("", "no API key; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline"), ("no key", "key")],
)
def test_wandb_without_a_key_is_refused_before_anything_else(launch, tmp_path, key, message):
    env = {"HOME": str(tmp_path), "WANDB_MODE": "online", "WANDB_API_KEY": key}
    run = launch(env=env, output_dir=tmp_path / "run", report_to="wandb")
    assert run.returncode == 2
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: report_to wandb: ") and message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_without_its_server_keeps_the_curves_for_later(train, tmp_path):
    """Nobody listens at the address, at the start or after."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
    env = {"WANDB_MODE": "online", "WANDB_BASE_URL": address, "WANDB_INIT_TIMEOUT": "2"}
    printed = train(tmp_path / "run", report_to="wandb", env=env)
    assert printed.count("report_to wandb: offline; `wandb sync` can send it later") == 1
    curves, _ = read_wandb(tmp_path / "run")
    assert_curves_of(tmp_path / "run", curves)


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_settings_exist_and_yield_to_the_environment(monkeypatch, tmp_path):
    import wandb

    settings = tracking._wandb_keywords(tmp_path, "12345678")["settings"]
    assert wandb.Settings(**settings).x_disable_machine_info
    for setting in settings:
        monkeypatch.setenv(tracking._wandb_variable(setting), "1")
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    keywords = tracking._wandb_keywords(tmp_path, "12345678")
    assert keywords["settings"] == {} and keywords["id"] == "mine"
