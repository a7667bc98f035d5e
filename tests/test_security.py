"""What strangers made is read and never executed, stays where it is, and no secret leaves this machine."""

import ast
import io
import json
import pickle
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch

from glue_eval.arguments import build_glue_arguments, parse_glue_arguments
from glue_eval.models import Source, find_sources, inspect_model, load_classifier
from glue_eval.tasks import TASKS
from recipes.checkpointing import MARKER, checksums, damage_of, prune
from recipes.command_line import parse_arguments
from recipes.errors import Failure, UserError
from recipes.hub_queue import Entry
from recipes.hub_upload import push_files
from recipes.pretraining import pretrain
from recipes.publishing import queue_checkpoint
from recipes.token_store import TokenStore
from tests.conftest import ROOT, TINY
from tests.hub_fixtures import MODEL, hub_for_this_process, queue
from tests.hub_server import TOKEN, Hub
from tests.test_pretraining import contents
from tests.test_publishing import REPO

# --- Bombs ------------------------------------------------------------------------------------------


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return exec, (f"open({str(self.canary)!r}, 'w').close()",)


@pytest.fixture
def canary(tmp_path):
    """A file that is there as soon as something was executed; at the end it must not be."""
    file = tmp_path / "canary"
    pickle.loads(pickle.dumps(Bomb(file)))
    assert file.exists(), "the bomb does not work"
    file.unlink()
    yield file
    assert not file.exists(), "something was executed"


def pickled(canary):
    return pickle.dumps(Bomb(canary))


def torch_file(canary, **tensors):
    """As `torch.save` writes it, with tensors beside the bomb."""
    stream = io.BytesIO()
    torch.save({**tensors, "bomb": Bomb(canary)}, stream)
    return stream.getvalue()


def code(canary):
    """A module that makes the file when it is imported, and has classes to be asked for."""
    return (
        f"open({str(canary)!r}, 'w').close()\n"
        "from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertTokenizer\n"
        "class Config(BertConfig):\n    model_type = 'stranger'\n"
        "class Tokenizer(BertTokenizer):\n    pass\n"
        "class Model(BertForSequenceClassification):\n    config_class = Config\n"
    )


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def trained(corpus_dir, cache_dir, tmp_path_factory):
    """A run of four updates, as anybody may have made it."""
    from recipes.command_line import build_arguments

    folder = tmp_path_factory.mktemp("trained") / "run"
    options = {"train_file": str(corpus_dir), "cache_dir": str(cache_dir), "output_dir": str(folder)}
    pretrain(build_arguments(TINY | options | {"max_steps": 4}))
    return folder


@pytest.fixture
def stranger(trained, tmp_path):
    """A whole checkpoint of a stranger, and how it is made whole again after a change."""
    folder = tmp_path / "stranger" / "checkpoint-4"
    shutil.copytree(trained / "checkpoint-4", folder)

    def sign():
        marker = json.loads((folder / MARKER).read_text())
        (folder / MARKER).write_text(json.dumps(marker | {"files": checksums(folder)}))
        assert damage_of(folder) is None

    return folder, sign


@pytest.fixture
def resume(tiny, tmp_path):
    def start(folder):
        pretrain(tiny(max_steps=4, resume_from_checkpoint=str(folder), output_dir=str(tmp_path / "mine")))

    return start


def fine_tune(folder):
    """As far as a model of somebody else's matters for GLUE: it is looked at, and loaded again."""
    (source,) = find_sources(build_glue_arguments({"model_name_or_path": str(folder), "task": "mrpc"}))
    inspect_model(source, TASKS["mrpc"], 32)
    load_classifier(source, TASKS["mrpc"], seed=1)


# --- Pickles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [pickled, torch_file])
def test_moments_are_not_unpickled(stranger, resume, canary, make):
    folder, sign = stranger
    (folder / "trainer" / "optimizer.pt").write_bytes(make(canary))
    sign()
    with pytest.raises((UserError, Failure)):
        resume(folder)


@pytest.mark.parametrize("make", [pickled, torch_file])
def test_a_pickle_beside_the_weights_is_passed_over(stranger, resume, canary, make):
    folder, sign = stranger
    (folder / "pytorch_model.bin").write_bytes(make(canary))
    sign()
    resume(folder)
    fine_tune(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("make", [pickled, torch_file])
def test_a_pickle_in_place_of_the_weights_is_refused(stranger, resume, canary, make, name):
    folder, sign = stranger
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(make(canary))
    sign()
    with pytest.raises((UserError, Failure)):
        resume(folder)
    with pytest.raises(UserError, match="model_name_or_path"):
        fine_tune(folder)


def test_pickled_weights_without_a_bomb_do_load(stranger):
    """What is refused above is the bomb."""
    folder, _ = stranger
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    fine_tune(folder)


@pytest.mark.parametrize("name", ["counts-train.npy", "hashes-train.npy"])
def test_pickled_arrays_of_a_token_store_are_refused(tiny, cache_dir, trained, tmp_path, canary, name):
    store = next(cache_dir.glob("tokens-*"))
    shutil.copytree(store, tmp_path / "store")
    np.save(tmp_path / "store" / name, np.array([Bomb(canary)], object), allow_pickle=True)
    with pytest.raises((UserError, ValueError)):
        opened = TokenStore.open(tmp_path / "store")
        opened.unigram_counts("train")
        opened.content_hashes("train")
    if name == "counts-train.npy":
        options = {"train_file": None, "token_store": str(tmp_path / "store")}
        with pytest.raises((UserError, ValueError)):
            pretrain(tiny(max_steps=4, validation_split_percentage=None, **options))


# --- Code -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert_ln", "bert", "stranger"])
@pytest.mark.parametrize("reference", ["strange.{}", "someone/else--strange.{}"])
def test_code_beside_a_model_is_not_imported(stranger, resume, canary, model_type, reference):
    folder, sign = stranger
    (folder / "strange.py").write_text(code(canary))
    for file in folder.glob("*_bert_ln.py"):
        file.write_text(code(canary))
    names = {"AutoConfig": "Config", "AutoModelForSequenceClassification": "Model"}
    names = {name: reference.format(value) for name, value in names.items()}
    change(folder / "config.json", auto_map=names, model_type=model_type)
    tokenizer = {"AutoTokenizer": [reference.format("Tokenizer"), reference.format("Tokenizer")]}
    change(folder / "tokenizer_config.json", auto_map=tokenizer, tokenizer_class="Tokenizer")
    sign()
    with suppress(UserError):  # refused, or loaded with the classes of this package
        fine_tune(folder)
    resume(folder)


def test_the_code_would_run_if_the_user_trusted_it(stranger, tmp_path):
    """The trap above is one."""
    folder, _ = stranger
    (folder / "strange.py").write_text(code(tmp_path / "ran"))
    change(folder / "config.json", auto_map={"AutoConfig": "strange.Config"}, model_type="stranger")
    with suppress(UserError):
        inspect_model(Source(str(folder), trust_remote_code=True), TASKS["mrpc"], 32)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("local", ["strange.Tokenizer", "someone/else--strange.Tokenizer"])
def test_code_beside_a_tokenizer_is_not_imported(tiny, stranger, canary, local):
    folder, _ = stranger
    (folder / "strange.py").write_text(code(canary))
    template = f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
    change(
        folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": [local, local]},
        tokenizer_class="Tokenizer",
        chat_template=template,
    )
    (folder / "chat_template.jinja").write_text(template)
    with suppress(UserError):
        pretrain(tiny(max_steps=1, vocab_size=None, tokenizer_name=str(folder)))


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{}']]",
        "!!python/object/apply:os.system ['touch {}']",
        "model: !!python/object/new:os.system ['touch {}']",
        "seed: !!python/name:os.system",
        "train_file: !!python/module:os",
    ],
)
@pytest.mark.parametrize("parse", [parse_arguments, parse_glue_arguments])
def test_yaml_makes_plain_values_only(tmp_path, canary, parse, text):
    file = tmp_path / "config.yaml"
    file.write_text(text.format(canary))
    with pytest.raises(UserError):
        parse(["--config", str(file)])
    with pytest.raises(UserError):
        parse(["--seed", text.format(canary).removeprefix("seed: ")])


# --- Paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", ["../secret.bin", "{}/secret.bin", "sub/../../secret.bin"])
def test_a_token_store_reads_only_what_lies_in_it(cache_dir, trained, tmp_path, outside):
    shutil.copytree(next(cache_dir.glob("tokens-*")), tmp_path / "store")
    about = json.loads((tmp_path / "store" / "store.json").read_text())
    (shard,) = about["splits"]["train"]["shards"]
    (tmp_path / "store" / "sub").mkdir()
    shutil.copy(tmp_path / "store" / shard, tmp_path / "secret.bin")
    about["splits"]["train"]["shards"] = [outside.format(tmp_path)]
    (tmp_path / "store" / "store.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="token store"):
        TokenStore.open(tmp_path / "store")


def test_what_a_link_points_to_is_not_pushed(trained, tmp_path):
    """A checkpoint may be of links, as the Hub's cache is: it is read. But nothing from elsewhere leaves."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (tmp_path / "secret").write_text("private key")
    checkpoint = run / "checkpoint-4"
    (checkpoint / "notes.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "secret").write_text("private key")
    (checkpoint / "notes").symlink_to(tmp_path / "folder")
    queue_checkpoint(Entry(4, "writer/tiny", None, "all_checkpoints"), checkpoint)
    queued = [f for f in (run / "hub" / "step-4" / "files").rglob("*") if f.is_file()]
    assert {"model.safetensors", "config.json"} <= {f.name for f in queued}
    assert not [f for f in queued if b"private key" in f.read_bytes()]


def test_a_link_in_a_queue_is_not_pushed(monkeypatch, tmp_path):
    (tmp_path / "secret").write_text("private key")
    with hub_for_this_process(monkeypatch, tmp_path) as hub:
        queue(tmp_path / "run", 4)
        files = tmp_path / "run" / "hub" / "step-4" / "files"
        (files / "notes.txt").symlink_to(tmp_path / "secret")
        push_files(MODEL, Entry(4, MODEL, None, "every_save"), files, is_first=True)
        pushed = hub.repos[MODEL].at().files
    assert "config.json" in pushed and "notes.txt" not in pushed


def test_a_checkpoint_of_links_is_read(stranger, resume, tmp_path):
    """As a snapshot in the Hub's cache."""
    folder, _ = stranger
    for file in [f for f in folder.rglob("*") if f.is_file()]:
        blob = tmp_path / "blobs" / "-".join(file.relative_to(folder).parts)
        blob.parent.mkdir(exist_ok=True)
        shutil.move(file, blob)
        file.symlink_to(blob)
    resume(folder)


def test_pruning_touches_nothing_behind_a_link(trained, tmp_path):
    """Somebody put another run's checkpoint into the folder to begin from it."""
    elsewhere, run = tmp_path / "elsewhere" / "checkpoint-2", tmp_path / "run"
    shutil.copytree(trained / "checkpoint-4", elsewhere)
    shutil.copytree(trained, run)
    (run / "checkpoint-2").symlink_to(elsewhere)
    before = contents(elsewhere)
    prune(run, 1, newest=4)
    assert contents(elsewhere) == before
    assert [f.name for f in run.glob("checkpoint-*")] == ["checkpoint-4"]


# --- Secrets ----------------------------------------------------------------------------------------

SECRETS = {
    "WANDB_API_KEY": "5e" * 20,
    "AWS_SECRET_ACCESS_KEY": "Zx9" * 12,
    "MY_PASSWORD": "correct-horse-battery",
}


@pytest.mark.parametrize("fault", [403, "drop"])
def test_secrets_are_nowhere_when_pushing_fails(launch, tmp_path, fault):
    """In no file, on no stream, and in no request but as its Authorization."""
    options = {"push_to_hub": True, "hub_model_id": "tiny", "hub_min_interval": 0, "hub_exit_timeout": 2}
    options |= {"output_dir": tmp_path / "run", "cache_dir": tmp_path / "cache", "max_steps": 2}
    with Hub() as hub:
        hub.fail("(PUT|preupload|/commit/)", times=None, with_=fault)
        environment = hub.environment(tmp_path / "home", TOKEN) | SECRETS | {"HOME": str(tmp_path / "home")}
        done = launch(env=environment, **options)
        assert done.returncode == 0, done.stderr
        sent = [content for commit in hub.repos[REPO].commits for content in commit.files.values()]
        sent += [f"{method} {path}".encode() for method, path, *_ in hub.requests]
    assert "not pushed: " in done.stdout
    assert list((tmp_path / "run" / "hub").glob("step-2*/files/run.json")), "what would be pushed"
    found = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    found |= {"streams": (done.stdout + done.stderr).encode(), "sent": b"\n".join(sent)}
    for where, content in found.items():
        for secret in (TOKEN, *SECRETS.values()):
            assert secret.encode() not in content, where


# --- The source -------------------------------------------------------------------------------------

PACKAGES = ("bert_ln", "recipes", "glue_eval")
SOURCES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))
NEVER = {
    *("eval", "exec", "compile", "__import__", "pickle.load", "pickle.loads", "marshal.loads", "os.system"),
    *("os.popen", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "shelve.open", "joblib.load"),
    *("torch.hub.load", "tempfile.mktemp", "tarfile.open", "zipfile.ZipFile.extractall"),
}


def risks(text):
    """Calls that could execute what they read, as (line, what)."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None), *(alias.name for alias in node.names)]
            if {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"} & set(names):
                yield node.lineno, "imports a pickler"
        if not isinstance(node, ast.Call):
            continue
        name, words = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        risky = {
            "never": name in NEVER,
            "weights_only": name == "torch.load" and words.get("weights_only") != "True",
            "allow_pickle": words.get("allow_pickle", "False") != "False",
            "shell": words.get("shell", "False") != "False",
            "trusts": words.get("trust_remote_code") == "True",
            "yaml": name == "yaml.load" and not loads_plain_values(node),
        }
        yield from ((node.lineno, f"{name}: {what}") for what, is_so in risky.items() if is_so)


def loads_plain_values(call):
    """Whether a loader is given whose base is the safe one."""
    words = [ast.unparse(word) for word in [*call.args[1:], *(k.value for k in call.keywords)]]
    return words in (["_Loader"], ["yaml.SafeLoader"])


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_that_is_read_could_be_executed(file):
    assert list(risks(file.read_text(encoding="utf-8"))) == []


def test_the_yaml_loader_is_the_safe_one():
    import yaml

    from recipes.command_line import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)
    assert not any("python" in str(tag) for tag in _Loader.yaml_constructors)


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.load(f)",
        "from pickle import load",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "yaml.load(f, yaml.Loader)",
        "subprocess.run(c, shell=True)",
        "AutoModel.from_pretrained(p, trust_remote_code=True)",
        "eval(s)",
    ],
)
def test_what_could_be_executed_would_be_found(line):
    assert len(list(risks(line))) == 1
