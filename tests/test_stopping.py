"""Ended early and lost nothing: signals, time limits, launchers and processes that die, one run a folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from recipes import validation
from recipes.errors import UserError
from recipes.files import FolderLock
from recipes.pretraining import pretrain
from recipes.stopping import OWNER, Stopped
from recipes.study import read_study
from recipes.study_runner import run_study
from recipes.training import Trainer
from tests.conftest import ROOT, TINY, accelerate, metrics_of
from tests.test_training import DROPOUT, digest

# Lines every five updates: an interruption falls between two of them.
OPTIONS = DROPOUT | {"logging_steps": 5, "max_steps": 12}
# Long enough to be interrupted from outside, with lines that show how far it is.
LONG = DROPOUT | {"logging_steps": 7, "max_steps": 120, "save_steps": 50, "eval_steps": 30}
SLOW = pytest.mark.slow
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": 138, "SIGHUP": 129}


def signal_at(monkeypatch, step, name, when=lambda trainer: True):
    """Let a signal arrive in the middle of that update."""
    update = Trainer._update

    def receiving(self, micro_batches):
        if self.state.step + 1 == step and when(self):
            os.kill(os.getpid(), getattr(signal, name))
        update(self, micro_batches)

    monkeypatch.setattr(Trainer, "_update", receiving)


@pytest.fixture
def whole(tiny, tmp_path):
    pretrain(tiny(output_dir=str(tmp_path / "whole"), **OPTIONS))
    return tmp_path / "whole"


def assert_equal(run, whole, last):
    assert digest(run / f"checkpoint-{last}") == digest(whole / f"checkpoint-{last}")
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert metrics_of(run) == metrics_of(whole)


@pytest.mark.parametrize("name", CODES)
def test_a_signal_saves_the_update_that_runs(tiny, tmp_path, whole, monkeypatch, name, capsys):
    handlers = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"at update 7: {name}") as stopped:
        signal_at(patch, 7, name)
        pretrain(tiny(**OPTIONS))
    assert stopped.value.exit_code == CODES[name]
    assert signal.getsignal(getattr(signal, name)) is handlers
    assert "step       7  saved" in capsys.readouterr().out
    pretrain(tiny(**OPTIONS))
    assert_equal(tmp_path / "run", whole, 12)


@pytest.mark.parametrize("step", [4, 5, 12])
def test_a_signal_where_something_else_is_due(tiny, tmp_path, whole, monkeypatch, step):
    """At 4 a validation is due, which is made up for; at 5 a line; 12 is the last update."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_at(patch, step, "SIGTERM")
        pretrain(tiny(**OPTIONS))
    assert not [line for line in metrics_of(tmp_path / "run", "validation_loss") if line["step"] == step]
    pretrain(tiny(**OPTIONS))
    assert_equal(tmp_path / "run", whole, 12)


@pytest.mark.parametrize("at", [1, 3])
def test_a_validation_is_cut_short(tiny, tmp_path, whole, monkeypatch, at):
    loss_and_hits, calls = validation._loss_and_hits, []

    def receiving(*words):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_and_hits(*words)

    options = OPTIONS | {"per_device_eval_batch_size": 8}
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(validation, "_loss_and_hits", receiving)
        pretrain(tiny(**options))
    assert len(calls) == at
    assert (tmp_path / "run" / "checkpoint-4").exists()
    pretrain(tiny(**options))
    assert_equal(tmp_path / "run", whole, 12)


def test_a_time_limit_of_one_update_at_a_time(tiny, tmp_path, whole):
    for step in range(1, 13):
        with pytest.raises(Stopped, match=f"at update {step}: max_train_time is over") as stopped:
            pretrain(tiny(max_train_time=1e-6, **OPTIONS))
        assert stopped.value.exit_code == 0
    pretrain(tiny(**OPTIONS))
    assert_equal(tmp_path / "run", whole, 12)


def test_before_training_a_signal_ends_the_program_at_once(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("recipes.pretraining.prepare_data", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="outside training: SIGTERM"):
        pretrain(tiny(**OPTIONS))
    assert not (tmp_path / "run").exists()


def test_what_a_parent_has_switched_off_stays_off(tiny, tmp_path, whole, monkeypatch):
    """nohup ignores SIGHUP for its child; a shell ignores SIGINT for jobs in the background."""
    before = {name: signal.signal(getattr(signal, name), signal.SIG_IGN) for name in ("SIGHUP", "SIGINT")}
    try:
        signal_at(monkeypatch, 3, "SIGHUP")
        signal_at(monkeypatch, 5, "SIGINT")
        pretrain(tiny(**OPTIONS))
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)
    assert_equal(tmp_path / "run", whole, 12)


# --- Processes: each started as a user would, and hit from outside ------------------------------------


@pytest.fixture(scope="module")
def long_runs(launch, tmp_path_factory):
    """Undisturbed runs of one and of two processes."""
    folder = tmp_path_factory.mktemp("long")
    for processes in (1, 2):
        done = launch(processes=processes, output_dir=folder / str(processes), **LONG)
        assert done.returncode == 0, done.stderr
    return folder


def wait_for(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        assert process is None or process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.fixture
def begin(launch):
    """Starts a run, waits for its first line; returns its process and those that train."""
    families = []

    def start(folder, **options):
        started = launch(wait=False, output_dir=folder, **LONG | options)
        wait_for(lambda: (folder / "metrics.jsonl").exists() and metrics_of(folder), started)
        family = [psutil.Process(started.pid), *psutil.Process(started.pid).children(recursive=True)]
        families.extend(family)
        return started, [p for p in family if is_trainer(p.cmdline())]

    yield start
    for process in families:
        if process.is_running():
            process.kill()


def is_trainer(words):
    return str(ROOT / "recipes" / "pretrain.py") in words and "launch" not in words


def is_gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def ends_equal(launch, folder, long_runs, processes):
    again = launch(processes=processes, output_dir=folder, **LONG)
    assert again.returncode == 0, again.stderr
    assert "Continuing from" in again.stdout
    assert_equal(folder, long_runs / str(processes), 120)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGKILL", marks=SLOW)])
def test_a_launcher_that_goes_takes_the_run_with_it(launch, begin, tmp_path, long_runs, name):
    """`accelerate launch` does not forward SIGTERM, and leaves its child behind."""
    folder = tmp_path / "run"
    started, trainers = begin(folder, launcher=[accelerate(), "launch"])
    assert len(trainers) == 1 and trainers[0].pid != started.pid
    started.send_signal(getattr(signal, name))
    wait_for(lambda: is_gone(trainers[0]))
    _, err = started.communicate()
    assert "the process that started it is gone; the same command continues" in err
    ends_equal(launch, folder, long_runs, 1)


@pytest.mark.parametrize("whom", ["the launcher", pytest.param("both", marks=SLOW), "one process"])
def test_two_processes_stop_at_the_same_update(launch, begin, tmp_path, long_runs, whom):
    folder = tmp_path / "run"
    started, trainers = begin(folder, processes=2)
    assert len(trainers) == 2
    hit = {"the launcher": [started], "one process": trainers[1:], "both": trainers}[whom]
    for process in hit:
        process.send_signal(signal.SIGTERM)
    wait_for(lambda: all(map(is_gone, trainers)))
    out, err = started.communicate()
    assert err.count("SIGTERM; the same command continues") == 1, err
    assert "saved" in out.splitlines()[-1]
    ends_equal(launch, folder, long_runs, 2)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=SLOW), 1])
def test_a_process_that_dies_stops_the_other_with_a_line(launch, begin, tmp_path, long_runs, rank):
    folder = tmp_path / "run"
    started, trainers = begin(folder, processes=2)
    wait_for(lambda: list(folder.glob("checkpoint-*")), started)
    (victim,) = [p for p in trainers if p.environ()["RANK"] == str(rank)]
    victim.kill()
    wait_for(lambda: all(map(is_gone, trainers)))
    _, err = started.communicate()
    assert f"error: process {1 - rank}: another process is gone or does not answer" in err
    ends_equal(launch, folder, long_runs, 2)


def test_a_process_that_hangs_is_given_up(begin, tmp_path):
    started, trainers = begin(tmp_path / "run", processes=2, ddp_timeout=20)
    (silent,) = [p for p in trainers if p.environ()["RANK"] == "1"]
    silent.suspend()
    wait_for(lambda: any(map(is_gone, trainers)))
    silent.resume()
    _, err = started.communicate()
    assert "error: process 0: another process is gone or does not answer" in err


PREPARES = """
import os, sys, time
from pathlib import Path
from recipes import pretrain, preparation

def prepare(*_):
    Path(os.environ["SIGN"]).touch()
    time.sleep(600)

preparation.prepare_stores = prepare
sys.exit(pretrain.main())
"""


def test_the_waiting_process_notices_that_nobody_prepares(tmp_path):
    """One process tokenises while the other waits for its word, in no collective."""
    shared = {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SIGN": str(tmp_path / "preparing")}
    options = ["--output_dir", str(tmp_path / "run"), "--cache_dir", str(tmp_path / "cache")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PREPARES, *options], cwd=ROOT, text=True, stderr=subprocess.PIPE,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    wait_for((tmp_path / "preparing").exists, ranks[0])
    ranks[0].kill()
    ranks[0].communicate()
    _, err = ranks[1].communicate(timeout=120)
    assert ranks[1].returncode == 1
    assert "error: the process that prepared the data is gone" in err or "another process is gone" in err
    assert "Traceback" not in err


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_runs_of_a_study_end_with_it(begin, tmp_path):
    """Killed, it can stop nobody: its runs look whether it is there."""
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started, _ = begin(tmp_path / "run", env={OWNER: str(owner.pid)})
    owner.kill()
    owner.wait()
    _, err = started.communicate(timeout=120)
    assert started.returncode == 143
    assert "the process that started it is gone" in err
    assert list((tmp_path / "run").glob("checkpoint-*"))


# --- One run a folder ---------------------------------------------------------------------------------


def test_a_second_run_is_refused_while_the_first_works(launch, begin, tmp_path, tiny):
    folder = tmp_path / "run"
    started, _ = begin(folder, max_steps=100_000)
    second = launch(output_dir=folder, **LONG | {"max_steps": 100_000})
    assert second.returncode == 2
    assert f"error: output_dir {folder}: process {started.pid} on" in second.stderr
    assert started.poll() is None
    started.kill()
    started.communicate()
    # The lock has gone with its process.
    done = launch(output_dir=folder, max_train_time=1e-6, **LONG | {"max_steps": 100_000})
    assert done.returncode == 0, done.stderr


def test_the_lock_is_not_kept_by_the_children_of_its_process(tmp_path):
    """Workers are forks, and may outlive a process that was killed by some seconds."""
    code = f"""
import os, sys, time
from pathlib import Path
from recipes.files import FolderLock
lock = FolderLock(Path({str(tmp_path)!r}))
lock.acquire()
child = os.fork()
if child == 0:
    os.close(1)
    time.sleep(600)
print(child, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(done.stdout))
    try:
        with FolderLock(tmp_path) as lock:
            lock.acquire()
    finally:
        child.kill()


def held(folder):
    """A process that works in a folder."""
    code = f"""
import sys
from pathlib import Path
from recipes.files import FolderLock
lock = FolderLock(Path({str(folder)!r}))
lock.acquire()
print("locked", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "locked\n"
    return holder


def test_a_folder_that_another_process_has_is_refused_by_name(tmp_path):
    holder = held(tmp_path)
    with pytest.raises(
        UserError, match=f"output_dir {tmp_path}: process {holder.pid} on .* is working in it"
    ):
        FolderLock(tmp_path).acquire()
    holder.communicate("")
    FolderLock(tmp_path).acquire()


def test_a_study_keeps_its_folder_too(tmp_path, corpus_dir, cache_dir):
    table = {"base": TINY | {"train_file": str(corpus_dir), "cache_dir": str(cache_dir)}, "seeds": [1]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(table | {"arms": [{"norm_placement": "pre"}]}))
    study = read_study(tmp_path / "study.yaml", {}, output_dir=tmp_path / "study")
    (tmp_path / "study").mkdir()
    holder = held(tmp_path / "study")
    with pytest.raises(UserError, match=f"process {holder.pid} on .* is working in it"):
        run_study(study, parallel_runs=1)
    assert [f.name for f in (tmp_path / "study").iterdir()] == [".lock"]
    holder.communicate("")


def test_another_number_of_processes_goes_on(tiny, launch, tmp_path, monkeypatch):
    """One process, then two with half the micro-batch, then one that accumulates: one run, to rounding."""
    options = OPTIONS | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    options |= {
        "mlm_probability": 0.2,
        "initializer_range": 0.03,
    }  # both differ in the default run
    pretrain(tiny(output_dir=str(tmp_path / "whole"), **options))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_at(patch, 3, "SIGTERM")
        pretrain(tiny(**options))
    half = {"per_device_train_batch_size": 4, "max_train_time": 1e-6, "output_dir": tmp_path / "run"}
    two = launch(processes=2, **options | half)
    assert two.returncode == 0, two.stderr
    assert "stopped at update 4: max_train_time is over" in two.stderr
    pretrain(tiny(per_device_train_batch_size=2, gradient_accumulation_steps=4, **options))
    for ours, whole in zip(metrics_of(tmp_path / "run"), metrics_of(tmp_path / "whole"), strict=True):
        assert ours.keys() == whole.keys()
        for name, value in whole.items():
            # A difference of losses has fewer digits; the losses are compared themselves.
            if isinstance(value, float) and name != "below_unigram_cross_entropy":
                assert ours[name] == pytest.approx(value, rel=1e-5), name
            elif not isinstance(value, float):
                assert ours[name] == value, name


def test_the_state_is_plain(tiny, tmp_path, monkeypatch):
    """What a checkpoint remembers between two lines is exact in JSON."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signal_at(patch, 7, "SIGTERM")
        pretrain(tiny(**OPTIONS))
    state = json.loads((tmp_path / "run" / "checkpoint-7" / "trainer" / "state.json").read_text())
    assert state["window_masked_tokens"] == 2 * 8 * round(0.15 * 30)
    assert (state["window_loss"] * 2**20).is_integer()


def test_a_worker_that_dies_is_one_line(begin, tmp_path):
    started, _ = begin(tmp_path / "run", dataloader_num_workers=2, max_steps=100_000)
    workers = [p for p in psutil.Process(started.pid).children() if is_trainer(p.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    _, err = started.communicate(timeout=120)
    assert started.returncode == 1
    assert "error: dataloader_num_workers: a worker is gone" in err
    assert "Traceback" not in err
