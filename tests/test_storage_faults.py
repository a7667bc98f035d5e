"""Whichever call fails, whole checkpoints remain, and a run ends with the same bits or one error."""

import errno
import os
import random
import re
import shutil
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer
from transformers.utils.logging import disable_progress_bar

from bert_ln import BertLnConfig, BertLnForMaskedLM
from recipes.checkpointing import (
    NotWritten,
    TrainState,
    checkpoint_folders,
    damage_of,
    find_checkpoint,
    is_complete,
    prune,
    save_checkpoint,
)
from tests.conftest import TINY, metrics_of
from tests.fault_layer import WRITES, Fault, arm, build, calls_of, forked, why_not
from tests.test_training import digest

resource = pytest.importorskip("resource", reason="needs a Unix")
PRELOAD = ["torch", "transformers", "pytest", "recipes.pretraining", "recipes.command_line"]
KILLED = -signal.SIGKILL
REFUSED = 9
# Deleting and flushing need no room.
NEEDS_ROOM = (*WRITES, "open", "truncate", "rename", "mkdir", "link")


def faults(calls, kind):
    """A fault of one kind at every call that it can befall."""
    names, fault = {
        "the disk is full once": (NEEDS_ROOM, {}),
        "the disk is full from then on": (NEEDS_ROOM, {"lasts": True}),
        "input/output error": (None, {"error": errno.EIO}),
        "read-only from then on": (None, {"error": errno.EROFS, "lasts": True}),
        "permission denied": (("open", "rename", "mkdir", "unlink"), {"error": errno.EACCES}),
        "short write": (WRITES, {"action": "short"}),
        "half a write, then full": (WRITES, {"action": "half", "lasts": True}),
        "killed before": (None, {"action": "kill before"}),
        "killed after": (None, {"action": "kill after"}),
    }[kind]
    return [Fault(call.number, **fault) for call in calls if names is None or call.name in names]


KINDS = (
    "the disk is full once",
    "the disk is full from then on",
    "input/output error",
    "read-only from then on",
    "permission denied",
    "short write",
    "half a write, then full",
    "killed before",
    "killed after",
)


def try_to_arm(library, folder):
    try:
        arm(library, folder)
    except OSError:
        os._exit(REFUSED)


@pytest.fixture(scope="module")
def layer(tmp_path_factory):
    """The compiled layer."""
    if reason := why_not():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("layer")
    library = build(folder)
    code = forked(PRELOAD, try_to_arm, library, folder)
    if code == REFUSED:
        pytest.skip("the kernel takes no filter for system calls")
    assert code == 0
    return library


# --- One save ---------------------------------------------------------------------------------------


def save(folder, step, limit=1):
    """Checkpoint `step` of a tiny model, and then the pruning, as in training."""
    disable_progress_bar()
    torch.manual_seed(step)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertLnForMaskedLM(BertLnConfig(vocab_size=20, **sizes))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmno"]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})
    model(input_ids=torch.tensor([[2, 5, 3]]), labels=torch.tensor([[2, 6, 3]])).loss.backward()
    optimizer.step()
    yield  # whoever wants faults arms them here
    save_checkpoint(folder, TrainState(step=step), model, tokenizer, optimizer, {"options": {}})
    prune(folder, limit, newest=step)


def save_well(folder, step):
    list(save(folder, step))


def save_badly(library, folder, log, fault):
    """In a process of its own: checkpoint 2, while `fault` happens."""
    saving = save(folder, 2)
    next(saving)
    arm(library, folder, log, fault)
    try:
        next(saving, None)
    except (NotWritten, OSError):
        os._exit(REFUSED)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A folder with checkpoint-1, and what the save of a second one is made of."""
    folder = tmp_path_factory.mktemp("before") / "run"
    folder.mkdir()
    save_well(folder, 1)
    return folder


@pytest.fixture(scope="module")
def calls(layer, before, tmp_path_factory):
    """Every call of a save that nothing happens to."""
    folder = tmp_path_factory.mktemp("calls")
    shutil.copytree(before, folder / "run")
    assert forked(PRELOAD, save_badly, layer, folder / "run", folder / "log", None) == 0
    return calls_of(folder / "log")


def test_every_write_is_counted(calls, before):
    """Also that of safetensors and torch, which go other ways than Python."""
    print(f"{len(calls)} calls:", *(f"{n} {[c.name for c in calls].count(n)}," for n in NEEDS_ROOM))
    written = {Path(call.path).name for call in calls if call.name in WRITES}
    renamed = {Path(call.path).name for call in calls if call.name == "rename"}
    copied = {f.name for f in (before / "checkpoint-1").rglob("*") if f.is_file()}
    # What is not written under its own name is written under another and renamed.
    assert copied <= written | renamed
    assert "optimizer.pt" in written and {"model.safetensors", "complete.json", "checkpoint-2"} <= renamed
    # All is flushed; then the marker; flushed; the name; flushed; then the old one goes.
    names = [(call.name, Path(call.path).name) for call in calls]
    marker, name = names.index(("rename", "complete.json")), names.index(("rename", "checkpoint-2"))
    deleted = names.index(("unlink", "complete.json"))
    flushed = [i for i, call in enumerate(names) if call[0] == "fsync"]
    assert {"model.safetensors", "optimizer.pt"} <= {names[i][1] for i in flushed if i < marker}
    assert any(marker < i < name for i in flushed) and any(name < i < deleted for i in flushed)


def check_fault(layer, before, folder, fault):
    """A save while `fault` happens; then what is found, and a save to which nothing happens."""
    run = folder / str(fault).replace(" ", "-")
    shutil.copytree(before, run)
    code = forked(PRELOAD, save_badly, layer, run, None, fault)
    assert code in (0, REFUSED, KILLED)
    assert (code == KILLED) == fault.action.startswith("kill")
    whole = [f for f in checkpoint_folders(run) if damage_of(f) is None]
    assert whole, "no checkpoint is left"
    assert [f for f in checkpoint_folders(run) if is_complete(f)] == whole, "one only looks whole"
    assert find_checkpoint(run, None)[0] == whole[-1]
    if code == 0:
        assert whole[-1].name == "checkpoint-2"
    save_well(run, 2)
    assert find_checkpoint(run, None)[0] == run / "checkpoint-2"
    assert [f for f in checkpoint_folders(run) if is_complete(f)] == [run / "checkpoint-2"]
    assert not list(run.glob(".checkpoint*"))
    shutil.rmtree(run)
    return code


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_call_fails_a_whole_checkpoint_remains(layer, before, calls, tmp_path, kind):
    """At calls drawn by chance."""
    possible = faults(calls, kind)
    for fault in random.Random(6).sample(possible, 5):
        check_fault(layer, before, tmp_path, fault)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_at_every_call_a_whole_checkpoint_remains(layer, before, calls, tmp_path, kind):
    codes = [check_fault(layer, before, tmp_path, fault) for fault in faults(calls, kind)]
    print(f"{kind}: {len(codes)} saves, {codes.count(0)} done, {codes.count(REFUSED)} refused", end=", ")
    print(f"{codes.count(KILLED)} killed")


# --- A whole run ------------------------------------------------------------------------------------


def command(words, output, library=None, folder=None, log=None, fault=None):
    """recipes/pretrain.py in a process of its own, its standard streams in files."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["recipes/pretrain.py", *words]
    from recipes.pretrain import main

    if library:
        arm(library, folder, log, fault)
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@pytest.fixture(scope="module")
def run(layer, corpus_dir, tmp_path_factory):
    """Runs the command in a folder, perhaps with a fault in it; and how it ends undisturbed."""

    def start(folder, fault=None, log=None, cache_dir=None):
        options = TINY | {"save_steps": 3, "hidden_dropout_prob": 0.1, "save_total_limit": 2}
        options |= {"train_file": corpus_dir, "cache_dir": cache_dir or folder / "cache"}
        options |= {"output_dir": folder / "run"}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        output = folder.with_name(folder.name + "-output")
        for made in (folder, output):
            made.mkdir(exist_ok=True)
        armed = (layer, folder, log, fault) if fault or log else ()
        code = forked(PRELOAD, command, words, output, *armed)
        return code, (output / "out").read_text(), (output / "err").read_text()

    whole = tmp_path_factory.mktemp("whole")
    code, _, err = start(whole / "all", log=whole / "log")
    assert code == 0, err
    start.whole, start.cache = whole / "all" / "run", whole / "all" / "cache"
    start.calls = calls_of(whole / "log")
    return start


def check_same(run, whole):
    assert digest(run / "checkpoint-12") == digest(whole / "checkpoint-12")
    assert (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert metrics_of(run) == metrics_of(whole)


def check_run(run, folder, fault, cache_dir=None):
    """A run to which `fault` happens, and the same command afterwards."""
    code, _, err = run(folder, fault, cache_dir=cache_dir)
    last = "\n".join(err.splitlines()[-30:])
    assert "Traceback" not in err, last
    if code == 0:
        check_same(folder / "run", run.whole)
    elif fault.action.startswith("kill"):
        assert code == KILLED, last
    else:
        assert code in (1, 2), last
        assert len(re.findall(r"^error: ", err, re.MULTILINE)) == 1, last
    again, _, err = run(folder, cache_dir=cache_dir)
    assert again == 0, err
    check_same(folder / "run", run.whole)
    assert not list((folder / "run").glob(".checkpoint*"))
    return code


def of_training(run):
    """The calls below the output folder, as a run counts them that finds its data prepared."""
    inside = [call for call in run.calls if call.path.startswith(str(run.whole))]
    return [call._replace(number=i) for i, call in enumerate(inside, 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_with_the_same_bits_or_one_error(run, tmp_path, kind):
    """While it trains, at a call drawn by chance."""
    possible = faults(of_training(run), kind)
    print(f"{len(of_training(run))} calls of a run, {len(run.calls)} with tokenizer and token store")
    fault = random.Random(KINDS.index(kind)).choice(possible)
    check_run(run, tmp_path / "run", fault, run.cache)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_runs_end_with_the_same_bits_or_one_error(run, tmp_path, kind):
    """At twenty calls, the tokenizer's and the token store's among them."""
    chance = random.Random(KINDS.index(kind) + 100)
    codes = []
    for number, fault in enumerate(chance.sample(faults(run.calls, kind), 20)):
        codes.append(check_run(run, tmp_path / str(number), fault))
    print(f"{kind}: {len(codes)} runs, {codes.count(0)} went on, {codes.count(KILLED)} killed")


# --- Damage, permissions, sizes ---------------------------------------------------------------------


def files_of(folder):
    return sorted(f.relative_to(folder) for f in folder.rglob("*") if f.is_file())


def test_a_flipped_bit_in_any_file_is_noticed_and_the_one_before_taken(before, tmp_path):
    chance = random.Random(7)
    run = tmp_path / "run"
    shutil.copytree(before, run)
    list(save(run, 2, limit=None))
    for name in files_of(run / "checkpoint-2"):
        file = run / "checkpoint-2" / name
        content = file.read_bytes()
        every = range(len(content)) if name.name == "complete.json" else chance.sample(range(len(content)), 3)
        for place in every:
            flipped = content[place] ^ 1 << chance.randrange(8)
            file.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
            found, passed_over = find_checkpoint(run, None)
            assert found == run / "checkpoint-1", f"{name}, byte {place}: {content[place]} -> {flipped}"
            assert len(passed_over) == 1 and "checkpoint-2 is passed over: " in passed_over[0]
            assert name.name in passed_over[0] or name.name == "complete.json"
        file.write_bytes(content)
        assert find_checkpoint(run, None) == (run / "checkpoint-2", [])


@pytest.mark.parametrize("change", ["cut", "gone", "empty"])
def test_a_file_that_is_cut_or_gone_is_noticed(before, tmp_path, change):
    run = tmp_path / "run"
    shutil.copytree(before, run)
    list(save(run, 2, limit=None))
    for name in files_of(run / "checkpoint-2"):
        file = run / "checkpoint-2" / name
        content = file.read_bytes()
        file.unlink()
        if change != "gone":
            file.write_bytes(content[: len(content) // 2 if change == "cut" else 0])
        assert find_checkpoint(run, None)[0] == run / "checkpoint-1", name
        file.write_bytes(content)


def without_permission(folder):
    """In a process of its own, as nobody in particular: checkpoint 2 in a folder that is not ours."""
    saving = save(folder, 2)
    next(saving)
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        next(saving, None)
    except (NotWritten, OSError) as error:
        os._exit(REFUSED if "ermission" in str(error) else 1)


def test_without_permission_the_old_one_remains(before, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(before, run)
    try:
        assert forked(PRELOAD, without_permission, run) == REFUSED
    finally:
        run.chmod(0o755)
    assert find_checkpoint(run, None) == (run / "checkpoint-1", [])
    save_well(run, 2)


def with_small_files(folder, size):
    """In a process of its own: checkpoint 2 where the kernel lets no file grow beyond `size` bytes."""
    saving = save(folder, 2)
    next(saving)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        next(saving, None)
    except (NotWritten, OSError):
        os._exit(REFUSED)


@pytest.mark.parametrize("size", [0, 1, 200, 2000, 12_000, 30_000])
def test_files_that_the_kernel_cuts_short_are_refused(before, tmp_path, size):
    """A real short write and a real error."""
    run = tmp_path / "run"
    shutil.copytree(before, run)
    assert forked(PRELOAD, with_small_files, run, size) == REFUSED
    assert find_checkpoint(run, None) == (run / "checkpoint-1", [])
    assert files_of(run) == files_of(before)
    save_well(run, 2)
