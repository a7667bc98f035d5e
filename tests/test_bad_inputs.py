"""Every mistake of the user's is one line that names it, exit code 2, and nothing changed on disk."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer

import glue_eval.run
import recipes.compare
import recipes.hub_access
import recipes.pretrain
from recipes.checkpointing import checksums
from recipes.files import LOCK
from tests.conftest import ROOT, TINY, accelerate
from tests.glue_made_up import write_model_folder, write_task

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
MAIN = {
    "pretrain": (recipes.pretrain.main, "recipes/pretrain.py"),
    "store": (recipes.pretrain.main, "recipes/pretrain.py"),
    "glue": (glue_eval.run.main, "glue_eval/run.py"),
    "compare": (recipes.compare.main, "recipes/compare.py"),
}


@dataclass(frozen=True)
class Bad:
    """A mistake."""

    words: str
    """What is on the command line besides the options of a run that would work; paths are relative."""
    says: tuple
    """What the line must contain."""
    make: object = None
    """Makes what the words name, in the folder in which the command is started."""
    program: str = "pretrain"


def bad(name, words, *says, make=None, program="pretrain"):
    return name, Bad(words, says, make, program)


# --- What the words name ----------------------------------------------------------------------------


def holds(**files):
    """Files by name, `_` for the dot, with their text or bytes."""

    def make(here, templates):
        for name, content in files.items():
            path = here / name.replace("_", ".")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return make


def yaml(text):
    return holds(bad_yaml=text)


def with_template(name, change=lambda folder: None):
    """A good folder, then what is done to it."""

    def make(here, templates):
        shutil.copytree(templates / name, here / name)
        change(here / name)

    return make


def edit(file, change):
    """Change the values of a JSON file."""

    def do(folder):
        values = json.loads((folder / file).read_text())
        values = change(values) or values
        (folder / file).write_text(json.dumps(values))

    return do


def put(file, content):
    def do(folder):
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return do


def cut(file, size):
    def do(folder):
        (folder / file).write_bytes((folder / file).read_bytes()[:size])

    return do


def flip(file):
    """Another last bit."""

    def do(folder):
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    return do


def remove(file):
    def do(folder):
        path = folder / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return do


def signed(change):
    """What is done to the newest checkpoint, of which the marker then says that it is whole."""

    def do(run):
        folder = run / "checkpoint-2"
        change(folder)
        edit("complete.json", lambda marker: marker | {"files": checksums(folder)})(folder)

    return do


class Malicious:
    """Unpickled by an ordinary unpickler it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def other_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.popitem()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_moments(folder):
    optimizer = torch.optim.AdamW([torch.zeros(3, requires_grad=True)])
    torch.save(optimizer.state_dict(), folder / "trainer/optimizer.pt")


def column(name, *values, file="bad.parquet"):
    def make(here, templates):
        pq.write_table(pa.table({name: list(values)}), here / file)

    return make


def gzipped(here, templates):
    (here / "bad.txt").write_bytes(gzip.compress(b"text " * 100))


def zipped(here, templates):
    with zipfile.ZipFile(here / "bad.txt", "w") as file:
        file.writestr("../../escaped.txt", "text " * 100)


def truncated_parquet(here, templates):
    column("text", *("some text " * 50 for _ in range(200)))(here, templates)
    cut("bad.parquet", 2000)(here)


def overlap(here, templates):
    lines = "".join(f"line {i} of the training text\n" for i in range(300))
    (here / "train.txt").write_text(lines)
    (here / "validation.txt").write_text(
        "nothing of it\nline 7 of the training text\nline 9 of the training text"
    )


def unreadable(here, templates):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    holds(bad_txt="text")(here, templates)
    (here / "bad.txt").chmod(0)


def tokenizer_of(*tokens):
    def make(here, templates):
        BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}).save_pretrained(here / "tokenizer")

    return make


def without_mask(folder):
    edit("tokenizer_config.json", lambda values: values | {"mask_token": None})(folder)


def with_code(folder):
    """A tokenizer whose class is in a file beside it, which makes a folder when it is imported."""
    own = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    put("tokenizer_config.json", json.dumps(own))(folder)
    put("evil.py", "import os\nos.mkdir('executed')\nclass Evil: pass\n")(folder)


def with_holes(folder):
    def spread(values):
        vocabulary = values["model"]["vocab"]
        last = max(vocabulary, key=vocabulary.get)
        vocabulary[last] += 1000

    edit("tokenizer.json", spread)(folder)


def split(name, **columns):
    """A split of the GLUE task mrpc, as .jsonl."""

    def do(data):
        (data / "mrpc" / f"{name}.parquet").unlink()
        rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
        (data / "mrpc" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return do


def lines(name, text):
    def do(data):
        (data / "mrpc" / f"{name}.parquet").unlink()
        (data / "mrpc" / f"{name}.jsonl").write_text(text)

    return do


# --- The mistakes -----------------------------------------------------------------------------------

OPTIONS = [
    bad("unknown option", "--frobnicate 1", "--frobnicate: unknown option", "--help"),
    bad("misspelt", "--learning_rat 1", "--learning_rat: unknown option", "did you mean learning_rate"),
    bad("misspelt field of the model", "--hiden_size 8", "--hiden_size", "did you mean hidden_size"),
    bad("stray word", "stray", "stray: unknown option"),
    bad("word for a number", "--max_steps many", "max_steps 'many'", "type int"),
    bad("fraction for a count", "--max_steps 1.5", "max_steps 1.5", "type int"),
    bad("no value", "--max_steps", "max_steps", "expected one argument"),
    bad("nothing to do", "--max_steps 0", "max_steps 0", "at least 1"),
    bad("negative rate", "--learning_rate -1", "learning_rate -1.0", "at least 0"),
    bad("rate that is no number", "--learning_rate nan", "learning_rate nan", "at least 0"),
    bad("endless rate", "--learning_rate 1e999", "learning_rate inf", "at least 0"),
    bad("percent for a share", "--mlm_probability 15", "mlm_probability 15.0", "less than 1"),
    bad("seed out of range", "--seed 4294967296", "seed 4294967296", "less than 2**32"),
    bad("empty variable", "--train_file ''", "train_file ''", "1 to 255 bytes"),
    bad("empty variable for the output", "--output_dir ''", "output_dir ''", "1 to 255 bytes"),
    bad("text for a name", "--train_file '" + "word " * 60 + "'", "train_file 'word", "1 to 255 bytes"),
    bad("home of nobody", "--train_file '~nobody-here/x.txt'", "~nobody-here/x.txt", "no such file"),
    bad("boundless vocabulary", "--vocab_size 99999999999999", "vocab_size 99999999999999", "between 1 and"),
    bad("too many workers", "--dataloader_num_workers 100000", "dataloader_num_workers 100000", "1024"),
    bad("no number in the model", "--initializer_range nan", "initializer_range nan", "finite"),
    bad("negative deviation", "--initializer_range -1", "initializer_range=-1.0", "at least 0"),
    bad("negative time", "--max_train_time -1", "max_train_time -1.0", "at least 0"),
    bad("unknown way out", "--nonfinite_update ignore", "nonfinite_update 'ignore'", "skip, rollback, stop"),
    bad("unknown optimiser", "--optim adam", "optim 'adam'", "allowed: adamw_torch"),
    bad("unknown schedule", "--lr_scheduler_type linar", "lr_scheduler_type 'linar'", "linear"),
    bad("option of another schedule", "--lr_scheduler_kwargs '{min_lr_ratio: 0}'", "min_lr_ratio", "linear"),
    bad("unknown tracker", "--report_to wanddb", "report_to 'wanddb'", "tensorboard"),
    bad("unknown activation", "--hidden_act glue", "hidden_act", "glue", "gelu"),
    bad("dropout above 1", "--hidden_dropout_prob 2", "hidden_dropout_prob"),
    bad("no heads", "--num_attention_heads 0", "num_attention_heads"),
    bad("heads that do not divide", "--hidden_size 33", "hidden_size", "33", "num_attention_heads"),
    bad("warm-up as long as the run", "--warmup_steps 12", "warmup_steps 12", "max_steps 12"),
    bad(
        "shares above one", "--mask_replace_prob 0.95", "mask_replace_prob + random_replace_prob", "at most 1"
    ),
    bad("no token selected", "--mlm_probability 0.01", "mlm_probability 0.01", "block of 32"),
    bad(
        "longer than the positions", "--max_seq_length 65", "max_seq_length 65", "max_position_embeddings 64"
    ),
    bad("longer than the text", "--max_seq_length 20000 --max_position_embeddings 20000", "20000", "only"),
    bad("unknown placement", "--norm_placement prenorm", "norm_placement", "'pre'"),
    bad("norms where there are none", "--norm_placement re_zero --norm_type rms_norm", "rms_norm", "re_zero"),
    bad("factor of another placement", "--deep_norm_alpha 2", "deep_norm_alpha", "no effect"),
    bad("processes that are not there", "--num_processes 2", "num_processes 2", "1 process runs"),
    bad("two sources of text", "--dataset_name a/b", "dataset_name a/b", "train_file"),
    bad("a stream of nothing", "--streaming", "streaming", "dataset_name"),
    bad("two validations", "--validation_file a.txt", "validation_split_percentage", "validation_file"),
    bad("all for validation", "--validation_split_percentage 100", "validation_split_percentage 100.0"),
    bad("documents of no kind", "--sample_by word", "sample_by word", "document, paragraph, line"),
    bad("text and a token store", "--token_store s", "train_file", "token_store"),
    bad("fresh start over a run", "--resume_from_checkpoint false", "resume_from_checkpoint false"),
    bad("repository without a push", "--hub_model_id me/it", "hub_model_id me/it", "push_to_hub"),
    bad("bad name of a repository", "--push_to_hub --hub_model_id a/b/c", "hub_model_id a/b/c", "repo_name"),
    bad("push without a token", "--push_to_hub", "push_to_hub", "HF_TOKEN"),
    bad("unknown strategy", "--push_to_hub --hub_strategy ever", "hub_strategy 'ever'", "every_save"),
    bad("dataset without the network", "--train_file none --dataset_name a/b", "dataset_name a/b", "Hub"),
    bad("reference without the network", "--resume_from_checkpoint hub:me/it", "hub:me/it", "Hub"),
    bad("bad reference", "--resume_from_checkpoint hub:a/b/c", "resume_from_checkpoint hub:a/b/c"),
]
YAML = [
    bad("no such file", "--config bad.yaml", "config bad.yaml", "no such file"),
    bad("a folder", "--config .", "config .", "directory"),
    bad("no YAML", "--config bad.yaml", "bad.yaml", "not readable as YAML", make=yaml("a: b: c")),
    bad("not UTF-8", "--config bad.yaml", "bad.yaml", "YAML", make=holds(bad_yaml=b"optim: \xff")),
    bad("a list", "--config bad.yaml", "bad.yaml", "table of option: value", make=yaml("- optim")),
    bad("a word", "--config bad.yaml", "bad.yaml", "table of option: value", make=yaml("optim")),
    bad("unknown key", "--config bad.yaml", "learnin_rate", "learning_rate", make=yaml("learnin_rate: 1")),
    bad("key twice", "--config bad.yaml", "bad.yaml", "optim", "twice",
        make=yaml("optim: sgd\noptim: radam")),
    bad("key that is no word", "--config bad.yaml", "1: unknown option", make=yaml("1: 2")),
    bad("a date", "--config bad.yaml", "warmup_steps", "int", make=yaml("warmup_steps: 2020-01-01")),
    bad("no such date", "--config bad.yaml", "not readable as YAML", make=yaml("warmup_steps: 2020-13-01")),
    bad("endless nesting", "--config bad.yaml", "not readable as YAML", make=yaml("[" * 100_000)),
    bad("table within itself", "--config bad.yaml", "stages", make=yaml("stages: &a [*a]")),
    bad("key of two lines", "--config bad.yaml", "a b: unknown option", make=yaml('"a\\nb": 1')),
    bad("code", "--config bad.yaml", "bad.yaml", "python/object",
        make=yaml("optim: !!python/object/apply:os.mkdir [executed]")),
    bad("stages are a number", "--config bad.yaml", "stages 5", "list", make=yaml("stages: 5")),
    bad("a stage is a number", "--stages '[5]'", "stages[0] 5", "table"),
    bad("unknown key of a stage", "--stages '[{step: 12}]'", "stages[0].step", "did you mean steps"),
    bad("key of a stage twice", "--config bad.yaml", "steps", "twice",
        make=yaml("stages: [{steps: 3, steps: 12}]")),
    bad("stages that do not add up", "--stages '[{steps: 3}, {steps: 4}]'", "stages", "7", "max_steps is 12"),
    bad("stage too long", "--stages '[{steps: 12, max_seq_length: 65}]'", "max_seq_length 65", "64"),
    bad("corpora are words", "--train_file none --corpora '[x.txt]'", "corpora[0] 'x.txt'", "mapping"),
    bad("corpora beside a file", "--corpora '[{train_file: a.txt}]'", "train_file", "corpora"),
    bad("unknown key of a corpus", "--train_file none --corpora '[{train_fil: a.txt}]'",
        "corpora[0].train_fil",
        "did you mean train_file"),
    bad("key of a corpus twice", "--config bad.yaml", "weight", "twice",
        make=yaml("corpora: [{train_file: a.txt, weight: 1, weight: 2}]")),
    bad("corpus without text", "--train_file none --corpora '[{weight: 1}]'", "corpora[0]", "train_file"),
    bad("corpus without weight", "--train_file none --corpora '[{train_file: a.txt, weight: 0}]'",
        "corpora[0].weight 0", "positive"),
]  # fmt: skip
TXT, ASIDE = "--train_file bad.txt", "--validation_split_percentage 10"
TEXTS = [
    bad("missing", TXT, "train_file bad.txt", "no such file or folder"),
    bad("empty", TXT, "bad.txt", "no text", make=holds(bad_txt="")),
    bad("blank", TXT, "bad.txt", "no text", make=holds(bad_txt=" \n\t\n\n  ")),
    bad("folder without text", "--train_file .", "train_file .", ".jsonl", make=holds(readme_md="text")),
    bad("glob of nothing", "--train_file '*.txt'", "train_file *.txt", "no such file"),
    bad("other ending", "--train_file bad.html", "bad.html", "'.html'", ".parquet", make=holds(bad_html="x")),
    bad("unreadable", TXT, "bad.txt", "Permission denied", make=unreadable),
    bad("a folder with the name of a file", TXT, "bad.txt", ".jsonl",
        make=lambda here, templates: (here / "bad.txt").mkdir()),
    bad("not UTF-8", TXT, "bad.txt", "line 2", "UTF-8", make=holds(bad_txt=b"fine\ncaf\xe9\n")),
    bad("UTF-16", TXT, "bad.txt", "line 1", make=holds(bad_txt="text".encode("utf-16"))),
    bad("NUL bytes", TXT, "bad.txt", "NUL byte in line 2", make=holds(bad_txt=b"a\nb\0c\n")),
    bad("zip named .txt", TXT, "bad.txt", "NUL byte in line 1", make=zipped),
    bad("gzip named .txt", TXT, "bad.txt", "line 1", make=gzipped),
    bad("one giant line", TXT, "bad.txt", "1 documents", "too few", make=holds(bad_txt="text " * 200_000)),
    bad("too little to set aside", f"{TXT} --validation_split_percentage none", "bad.txt", "4 documents",
        "too few",
        make=holds(bad_txt="a\n\nb\n\nc\n\nd")),
    bad("too little for a vocabulary", f"{TXT} --sample_by line", "vocab_size 1000", "more text",
        make=holds(bad_txt="a\nb\nc\nd\n" * 2)),
    bad("too little for a block", f"{TXT} --sample_by line --tokenizer_name tokenizer", "max_seq_length 32",
        "only", "tokens", make=lambda here, templates: (holds(bad_txt="one\ntwo\nthree\n" * 2)(here,
        templates),
            with_template("tokenizer")(here, templates))),
    bad("validation text in the training text", "--train_file train.txt --validation_file validation.txt "
        "--sample_by line --validation_split_percentage none", "validation_file validation.txt",
        "2 validation documents", make=overlap),
    bad("validation text missing", "--validation_file bad.txt --validation_split_percentage none",
        "validation_file bad.txt", "no such file"),
    bad("no JSON", "--train_file bad.jsonl", "bad.jsonl, line 2", "JSON",
        make=holds(bad_jsonl='{"text": "a"}\n{')),
    bad("JSON that is no object", "--train_file bad.jsonl", "line 1", "list",
        make=holds(bad_jsonl='["text"]\n')),
    bad("JSON nested without end", "--train_file bad.jsonl", "bad.jsonl, line 1", "JSON",
        make=holds(bad_jsonl="[" * 100_000)),
    bad("JSON without the column", "--train_file bad.jsonl", "text_column_name text", "there are body",
        make=holds(bad_jsonl='{"body": "a"}\n')),
    bad("null for a text", "--train_file bad.jsonl", "line 2", "NoneType",
        make=holds(bad_jsonl='{"text": "a"}\n{"text": null}\n')),
    bad("number for a text", "--train_file bad.jsonl", "line 1", "int",
        make=holds(bad_jsonl='{"text": 3}\n')),
    bad("huge number for a text", "--train_file bad.jsonl", "line 1", "JSON",
        make=holds(bad_jsonl='{"text": ' + "9" * 5000 + "}\n")),
    bad("half a character", "--train_file bad.jsonl", "line 1", "Unicode",
        make=holds(bad_jsonl='{"text": "\\ud800"}')),
    bad("CSV without the column", "--train_file bad.csv", "text_column_name text", "body, title",
        make=holds(bad_csv="body,title\nx,y\n")),
    bad("CSV with an open quote", "--train_file bad.csv", "bad.csv", "CSV",
        make=holds(bad_csv='text\n"never closed\n')),
    bad("CSV with a short row", "--train_file bad.csv", "bad.csv, line 3", "NoneType",
        make=holds(bad_csv="id,text\n1,a\n2\n")),
    bad("CSV with a long row", "--train_file bad.csv", "bad.csv, line 3",
        make=holds(bad_csv="id,text\n1,a\n2,a comma, not quoted\n")),
    bad("no Parquet", "--train_file bad.parquet", "bad.parquet", "Parquet", make=holds(bad_parquet="text")),
    bad("truncated Parquet", "--train_file bad.parquet", "bad.parquet", "Parquet", make=truncated_parquet),
    bad("Parquet without the column", "--train_file bad.parquet", "text_column_name", "body",
        make=column("body", "a")),
    bad("Parquet of numbers", "--train_file bad.parquet", "row 1", "int", make=column("text", 1, 2)),
    bad("Parquet with a null", "--train_file bad.parquet", "row 2", "NoneType", make=column("text", "a",
        None)),
    bad("other column", "--train_file bad.parquet --text_column_name body", "text_column_name body", "text",
        make=column("text", "a")),
]  # fmt: skip
HERE = "--output_dir run"
RUNS = [
    bad("output is a file", "--output_dir bad.txt", "output_dir bad.txt", "no folder",
        make=holds(bad_txt="x")),
    bad("output below a file", "--output_dir bad.txt/run", "output_dir bad.txt/run", "no folder",
        make=holds(bad_txt="x")),
    bad("foreign files", "--output_dir .", "output_dir .", "holds files but no run",
        make=holds(notes_txt="x")),
    bad("another run", f"{HERE} --learning_rate 5", "output_dir run", "learning_rate is 5.0, was 0.001",
        make=with_template("run")),
    bad("run.json cut", HERE, "run.json is not readable", make=with_template("run", cut("run.json", 100))),
    bad("run.json a list", HERE, "run.json is not readable", make=with_template("run", put("run.json",
        "[]"))),
    bad("run.json without options", HERE, "run.json is not readable",
        make=with_template("run", edit("run.json", lambda values: values | {"options": None}))),
    bad("run.json not UTF-8", HERE, "run.json is not readable",
        make=with_template("run", put("run.json", b'{"options": "\xff"}'))),
    bad("run.json a folder", HERE, "run.json",
        make=with_template("run", lambda run: (run / "run.json").unlink() or (run / "run.json").mkdir())),
    bad("metrics damaged in the middle", HERE, "metrics.jsonl, line 1", "damaged",
        make=with_template("run", lambda run: put(
            "metrics.jsonl", b"{" + (run / "metrics.jsonl").read_bytes()[5:])(run))),
    bad("metrics of numbers", HERE, "metrics.jsonl, line 1", "damaged",
        make=with_template("run", put("metrics.jsonl", "1\n2\n"))),
    bad("metrics without steps", HERE, "metrics.jsonl, line 1", "damaged",
        make=with_template("run", put("metrics.jsonl", "{}\n{}\n"))),
    bad("metrics not UTF-8", HERE, "metrics.jsonl", "damaged",
        make=with_template("run", put("metrics.jsonl", b"\xff\n{}\n"))),
    bad("no such checkpoint", "--resume_from_checkpoint run/checkpoint-9",
        "resume_from_checkpoint run/checkpoint-9",
        "no such folder"),
    bad("checkpoint is a file", "--resume_from_checkpoint bad.txt", "resume_from_checkpoint bad.txt",
        "folder",
        make=holds(bad_txt="x")),
    bad("checkpoint without a marker", "--resume_from_checkpoint run/checkpoint-2",
        "incomplete (no complete.json)",
        make=with_template("run", remove("checkpoint-2/complete.json"))),
]  # fmt: skip
FROM = "--resume_from_checkpoint run/checkpoint-2"
CHECKPOINTS = [
    bad("flipped byte", FROM, "checkpoint-2", "damaged (model.safetensors)",
        make=with_template("run", flip("checkpoint-2/model.safetensors"))),
    bad("missing file", FROM, "checkpoint-2", "damaged (trainer/state.json)",
        make=with_template("run", remove("checkpoint-2/trainer/state.json"))),
    bad("other format", FROM, "checkpoint-2", "format 99",
        make=with_template("run", edit("checkpoint-2/complete.json",
        lambda marker: marker | {"format": 99}))),
    bad("marker no JSON", FROM, "damaged (complete.json)",
        make=with_template("run", put("checkpoint-2/complete.json", "{"))),
    bad("marker a list", FROM, "damaged (complete.json)",
        make=with_template("run", put("checkpoint-2/complete.json", "[]"))),
    bad("marker with files as a list", FROM, "damaged (complete.json)",
        make=with_template("run", edit("checkpoint-2/complete.json",
        lambda marker: marker | {"files": ["a"]}))),
    bad("marker of nothing", FROM, "damaged",
        make=with_template("run", edit("checkpoint-2/complete.json", lambda marker: marker | {"files": {}}))),
    bad("of a different run", f"{FROM} --seed 7", "checkpoint-2", "different run (seed is 7, was 42)",
        make=with_template("run")),
    bad("state without its fields", FROM, "checkpoint-2", "damaged",
        make=with_template("run", signed(put("trainer/state.json", "{}")))),
    bad("state with other fields", FROM, "checkpoint-2", "damaged",
        make=with_template("run", signed(edit("trainer/state.json", lambda state: state | {"momentum": 1})))),
    bad("state of words", FROM, "checkpoint-2", "damaged",
        make=with_template("run", signed(edit("trainer/state.json", lambda state: state | {"step": "two"})))),
    bad("description cut", FROM, "checkpoint-2", "run.json",
        make=with_template("run", signed(cut("trainer/run.json", 100)))),
    bad("malicious moments", FROM, "checkpoint-2", "optimizer.pt",
        make=with_template("run", signed(lambda folder: torch.save(Malicious(),
        folder / "trainer/optimizer.pt")))),
    bad("malicious plain pickle", FROM, "checkpoint-2", "optimizer.pt",
        make=with_template("run", signed(put("trainer/optimizer.pt", b"cos\nmkdir\n(S'executed'\ntR.")))),
    bad("moments of another model", FROM, "checkpoint-2", "optimizer.pt",
        make=with_template("run", signed(other_moments))),
    bad("moments cut", FROM, "checkpoint-2", "optimizer.pt",
        make=with_template("run", signed(cut("trainer/optimizer.pt", 500)))),
    bad("weights without a tensor", FROM, "checkpoint-2", "model.safetensors",
        make=with_template("run", signed(other_weights))),
    bad("weights cut in the header", FROM, "checkpoint-2", "model.safetensors",
        make=with_template("run", signed(cut("model.safetensors", 100)))),
    bad("weights of nothing", FROM, "checkpoint-2", "model.safetensors",
        make=with_template("run", signed(put("model.safetensors", b"")))),
]  # fmt: skip
NAME = "--tokenizer_name tokenizer"
TOKENIZERS = [
    bad("missing", NAME, "tokenizer_name tokenizer", "save_pretrained"),
    bad("a file", "--tokenizer_name bad.txt", "tokenizer_name bad.txt", "is a file", make=holds(bad_txt="x")),
    bad("empty folder", NAME, "tokenizer_name tokenizer",
        make=lambda here, templates: (here / "tokenizer").mkdir()),
    bad("five tokens", NAME, "tokenizer_name tokenizer", "5 entries", make=tokenizer_of(*SPECIAL)),
    bad("no mask", NAME, "tokenizer_name tokenizer", "mask_token", make=with_template("tokenizer",
        without_mask)),
    bad("ids with holes", NAME, "tokenizer_name tokenizer", "ids 0, 1, 2",
        make=with_template("tokenizer", with_holes)),
    bad("slow only", NAME, "tokenizer_name tokenizer",
        make=lambda here, templates: ((here / "tokenizer").mkdir(), (here / "tokenizer/tokenizer_config.json")
            .write_text('{"tokenizer_class": "CTRLTokenizer"}'))),
    bad("cut", NAME, "tokenizer_name tokenizer", "cannot be loaded",
        make=with_template("tokenizer", cut("tokenizer.json", 300))),
    bad("code of its own", NAME, "tokenizer_name tokenizer",
        make=with_template("tokenizer", with_code)),
    bad("more entries than rows", f"{NAME} --vocab_size 50", "vocab_size 50", "entries",
        make=with_template("tokenizer")),
    bad("of another language", f"{NAME} --max_unk_rate 0.001", "max_unk_rate 0.001", "[UNK]",
        make=tokenizer_of(*SPECIAL, *(f"w{i}" for i in range(200)))),
    bad("vocabulary too small", "--vocab_size 50", "vocab_size 50", "100"),
    bad("whole words without words", f"{NAME} --masking_unit whole_word", "masking_unit whole_word",
        "WordPiece",
        make=lambda here, templates: word_level(here / "tokenizer")),
]  # fmt: skip


def word_level(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:-'\"()$%&?! \n"]
    words += [f"w{i}" for i in range(100)]
    backend = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "mask_token": "[MASK]", "sep_token": "[SEP]", "cls_token": "[CLS]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", **names).save_pretrained(folder)


def in_store(change):
    """Change what store.json says of the shards of the training text."""
    return with_template("store", edit("store.json", lambda about: change(about["splits"]["train"])))


STORES = [
    bad("missing", "", "token store store", "missing", program="store"),
    bad("no store.json", "", "token store store", "store.json", program="store",
        make=with_template("store", remove("store.json"))),
    bad("shard missing", "", "token store store", "train-00000.bin", program="store",
        make=with_template("store", remove("train-00000.bin"))),
    bad("shard cut", "", "train-00000.bin", "tokens instead of", program="store",
        make=with_template("store", cut("train-00000.bin", 1000))),
    bad("shard with an odd byte", "", "token store store", "damaged", program="store",
        make=with_template("store", cut("train-00000.bin", 1001))),
    bad("other format", "", "format 99", program="store",
        make=with_template("store", edit("store.json", lambda about: about | {"format": 99}))),
    bad("a list", "", "token store store", "damaged", program="store",
        make=with_template("store", put("store.json", "[]"))),
    bad("splits a list", "", "token store store", "damaged", program="store",
        make=with_template("store", edit("store.json", lambda about: about | {"splits": []}))),
    bad("shards of zero tokens", "", "token store store", "damaged", program="store",
        make=with_template("store", edit("store.json", lambda about: about | {"shard_tokens": 0}))),
    bad("ids of objects", "", "token store store", "damaged", program="store",
        make=with_template("store", edit("store.json", lambda about: about | {"dtype": "O"}))),
    bad("too few tokens claimed", "", "token store store", "damaged", program="store",
        make=in_store(lambda train: train.update(tokens=-5))),
    bad("tokens without shards", "", "token store store", "damaged", program="store",
        make=in_store(lambda train: train.update(shards=[]))),
    bad("shard outside the folder", "", "../secret.bin", program="store",
        make=in_store(lambda train: train.update(shards=["../secret.bin"]))),
    bad("shard by an absolute path", "", "/etc/hostname", program="store",
        make=in_store(lambda train: train.update(shards=["/etc/hostname"]))),
    bad("shard below a folder", "", "tokenizer/vocab.txt", program="store",
        make=in_store(lambda train: train.update(shards=["tokenizer/vocab.txt"]))),
    bad("no tokenizer", "", "token store store", "tokenizer", program="store",
        make=with_template("store", remove("tokenizer"))),
    bad("tokenizer cut", "", "store", "tokenizer", program="store",
        make=with_template("store", cut("tokenizer/tokenizer.json", 300))),
    bad("other tokenizer", "", "token store store", "tokenizer", program="store",
        make=lambda here, templates: (with_template("store")(here, templates),
            shutil.rmtree(here / "store/tokenizer"),
            tokenizer_of(*SPECIAL, *(f"w{i}" for i in range(200)))(here / "store", templates))),
    bad("code of its own", "", "token store store", "tokenizer", program="store",
        make=with_template("store", lambda store: with_code(store / "tokenizer"))),
    bad("counts missing", "", "token store store", "counts-train.npy", program="store",
        make=with_template("store", remove("counts-train.npy"))),
    bad("counts of objects", "", "token store store", "counts-train.npy", program="store",
        make=with_template("store", lambda store: np.save(
            store / "counts-train.npy", np.array([Malicious()], object), allow_pickle=True))),
    bad("ids beyond the vocabulary", "", "token store", "id 65535", "delete", program="store",
        make=with_template("store", lambda store: put("validation-00000.bin", b"\xff" * (
            (store / "validation-00000.bin").stat().st_size))(store))),
]  # fmt: skip
SENTENCES = {"sentence1": ["One.", "Two."], "sentence2": ["One.", "Three."]}
GLUE = [
    bad("no task", "--task ''", "task", "mrpc", program="glue"),
    bad("unknown task", "--task mprc", "mprc", "mrpc", program="glue"),
    bad("misspelt option", "--learning_rat 1", "learning_rate", program="glue"),
    bad("no seeds", "--seeds 0", "seeds 0", "at least 1", program="glue"),
    bad("negative rate", "--learning_rate -1", "learning_rate -1.0", "at least 0", program="glue"),
    bad("unknown option of a grid", "--grid bad.yaml", "grid seed", program="glue", make=yaml("seed: [1]")),
    bad("empty grid", "--grid bad.yaml", "grid learning_rate []", program="glue",
        make=yaml("learning_rate: []")),
    bad("grid that is a list", "--grid bad.yaml", "grid bad.yaml", "table", program="glue", make=yaml("- 1")),
    bad("grid inside a file is a list", "--grid bad.yaml", "grid", "table", program="glue",
        make=yaml("grid: [1]")),
    bad("model and run", "--run_dir run", "run_dir run", "model_name_or_path", program="glue"),
    bad("empty variable", "--data_dir ''", "data_dir ''", "1 to 255 bytes", program="glue"),
    bad("no data", "--data_dir nowhere", "data_dir nowhere", "no such folder", program="glue"),
    bad("no folder of the task", "--task rte", "data_dir data", "rte", program="glue",
        make=with_template("data")),
    bad("no file of a split", "", "mrpc has no validation split", program="glue",
        make=with_template("data", remove("mrpc/validation.parquet"))),
    bad("table of tabs", "", "mrpc has no train split", "train.tsv", program="glue",
        make=with_template("data",
        lambda data: (data / "mrpc/train.parquet").rename(data / "mrpc/train.tsv"))),
    bad("other columns", "", "sentence2", "premise", program="glue",
        make=with_template("data", split("train", sentence1=["a"], premise=["b"], label=[0]))),
    bad("label out of range", "", "label", "7", program="glue",
        make=with_template("data", split("train", **SENTENCES, label=[0, 7]))),
    bad("label that is a word", "", "label 'yes'", "row 1", program="glue",
        make=with_template("data", split("train", **SENTENCES, label=[0, "yes"]))),
    bad("no rows", "", "mrpc train", "empty", program="glue", make=with_template("data", lines("train",
        "\n"))),
    bad("broken line", "", "mrpc train", "row 1", "JSON", program="glue",
        make=with_template("data", lines("train",
        '{"sentence1": "a", "sentence2": "b", "label": 0}\n{"sen'))),
    bad("endless nesting", "", "mrpc train", "row 0", "JSON", program="glue",
        make=with_template("data", lines("train", "[" * 100_000))),
    bad("cut Parquet", "", "mrpc train", "Parquet", program="glue",
        make=with_template("data", cut("mrpc/train.parquet", 500))),
    bad("other number of rows", "--allow_other_sizes false", "96 rows", "3668", program="glue",
        make=with_template("data")),
    bad("no model", "--model_name_or_path ./nowhere", "model_name_or_path", "nowhere", "no such folder",
        program="glue", make=with_template("data")),
    bad("model that is none", "--model_name_or_path data", "model_name_or_path data", "config.json",
        program="glue",
        make=with_template("data")),
    bad("no model at all", "--model_name_or_path none", "output/pretrain", "pretrain.py", program="glue",
        make=with_template("data")),
    bad("run without checkpoints", "--model_name_or_path none --run_dir data", "run_dir data",
        "no complete checkpoint", program="glue", make=with_template("data")),
]  # fmt: skip


def model(change):
    def make(here, templates):
        with_template("data")(here, templates)
        with_template("model", change)(here, templates)

    return make


MODEL = "--model_name_or_path model"
MODELS = [
    bad("without weights", MODEL, "model_name_or_path model", "no weights", program="glue",
        make=model(remove("model.safetensors"))),
    bad("without a tokenizer", MODEL, "model_name_or_path model", "tokenizer", program="glue",
        make=model(lambda folder: [remove(f.name)(folder) for f in folder.glob("*token*")])),
    bad("configuration cut", MODEL, "model_name_or_path model", "configuration", program="glue",
        make=model(cut("config.json", 50))),
    bad("configuration of nothing", MODEL, "model_name_or_path model", "configuration", program="glue",
        make=model(put("config.json", "{}"))),
    bad("weights cut", MODEL, "model_name_or_path model", "does not load", program="glue",
        make=model(cut("model.safetensors", 1000))),
    bad("weights that are a pickle", MODEL, "model_name_or_path model", "does not load", program="glue",
        make=model(lambda folder: (remove("model.safetensors")(folder),
            torch.save(Malicious(), folder / "pytorch_model.bin")))),
    bad("weights of another model", MODEL, "model_name_or_path model", "not those of its configuration",
        program="glue", make=model(edit("config.json", lambda config: config | {"num_hidden_layers": 3}))),
    bad("code of its own", MODEL, "model_name_or_path model", "configuration", program="glue",
        make=model(lambda folder: (put("config.json", json.dumps(
            {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))(folder),
            put("evil.py", "import os\nos.mkdir('executed')\nclass Evil: pass\n")(folder)))),
]  # fmt: skip
STUDY = "--config bad.yaml"
COMPARE = [
    bad("nothing", "", "--config", "folders of runs", program="compare"),
    bad("no such study", "--config nowhere.yaml", "nowhere.yaml", "no such file", program="compare"),
    bad("study that is a list", STUDY, "bad.yaml", "table", program="compare", make=yaml("- 1")),
    bad("unknown key", STUDY, "arm", "did you mean arms", program="compare", make=yaml("arm: [{}]")),
    bad("no arms", STUDY, "arms None", program="compare", make=yaml("seeds: [1]")),
    bad("empty arms", STUDY, "arms []", "list of tables", program="compare", make=yaml("arms: []")),
    bad("base is a list", STUDY, "base [1]", "table", program="compare",
        make=yaml("base: [1]\narms: [{warmup_steps: 0}]")),
    bad("unknown option in an arm", STUDY, "arms", "learnin_rate", "learning_rate", program="compare",
        make=yaml("arms: [{learnin_rate: 1}]")),
    bad("option that all must share", STUDY, "arms", "max_seq_length", "same for all", program="compare",
        make=yaml("arms: [{max_seq_length: [32, 64]}]")),
    bad("the same arm twice", STUDY, "warmup_steps=1 is there 2 times", program="compare",
        make=yaml("arms: [{warmup_steps: [1, 1]}]")),
    bad("arm without values", STUDY, "arms", "warmup_steps", program="compare",
        make=yaml("arms: [{warmup_steps: []}]")),
    bad("seeds of words", STUDY, "seed 'one'", "int", program="compare",
        make=yaml("arms: [{warmup_steps: 1}]\nseeds: [one]")),
    bad("seeds a number", STUDY, "seeds 3", "list", program="compare",
        make=yaml("arms: [{warmup_steps: 1}]\nseeds: 3")),
    bad("seed twice", STUDY, "seeds [1, 1]", "different", program="compare",
        make=yaml("arms: [{warmup_steps: 1}]\nseeds: [1, 1]")),
    bad("value out of range in an arm", STUDY, "learning_rate=-1", "at least 0", program="compare",
        make=yaml("arms: [{learning_rate: -1}]")),
    bad("no such base", STUDY, "nowhere.yaml", "no such file", program="compare",
        make=yaml("base: {config: nowhere.yaml}\narms: [{warmup_steps: 1}]")),
    bad("no such run", "nowhere", "nowhere", program="compare"),
    bad("folder that is no run", "data", "data", program="compare", make=with_template("data")),
    bad("run.json of a list", "run", "run", "run.json", program="compare",
        make=with_template("run", put("run.json", "[]"))),
    bad("run.json cut", "run", "run", "run.json", program="compare", make=with_template("run",
        cut("run.json", 100))),
    bad("metrics damaged", "run", "metrics.jsonl, line 1", program="compare",
        make=with_template("run", put("metrics.jsonl", "{\n{}\n"))),
    bad("no such reference", "run --against nowhere", "against nowhere", program="compare",
        make=with_template("run")),
    bad("no such scores", "run --glue_results nowhere.json", "nowhere.json", program="compare",
        make=with_template("run")),
    bad("no runs at a time", f"{STUDY} --parallel_runs 0", "parallel_runs 0", "at least 1",
        program="compare"),
]  # fmt: skip
GROUPS = {
    "option": OPTIONS,
    "config": YAML,
    "text": TEXTS,
    "output": RUNS,
    "checkpoint": CHECKPOINTS,
    "tokenizer": TOKENIZERS,
    "token store": STORES,
    "GLUE": GLUE,
    "GLUE model": MODELS,
    "comparison": COMPARE,
}
ROWS = {f"{group}: {name}": row for group, rows in GROUPS.items() for name, row in rows}


# --- Templates and commands -------------------------------------------------------------------------


@pytest.fixture(scope="session")
def base(corpus_dir, cache_dir):
    """The options of each command that would work."""
    run = TINY | {"train_file": corpus_dir, "cache_dir": cache_dir, "output_dir": "made"}
    not_with_store = ("train_file", "validation_split_percentage")
    store = {name: value for name, value in run.items() if name not in not_with_store}
    glue = {
        "task": "mrpc",
        "data_dir": "data",
        "model_name_or_path": "model",
        "allow_other_sizes": True,
        "seeds": 1,
        "bf16": False,
        "cache_dir": cache_dir,
        "output_dir": "made",
        "parallel_runs": 1,
    }
    return {"pretrain": run, "store": store | {"token_store": "store"}, "glue": glue, "compare": {}}


@pytest.fixture(scope="session")
def templates(base, tmp_path_factory):
    """Good folders: a run that stopped after two updates, a tokenizer, a token store, a model, GLUE data."""
    folder = tmp_path_factory.mktemp("templates")
    options = base["pretrain"] | {"output_dir": folder / "run", "save_steps": 2, "save_total_limit": 9}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain.py", *flags(options)])
        assert recipes.pretrain.main() == 0
    run = folder / "run"
    for later in set(run.glob("checkpoint-*")) - {run / "checkpoint-2"}:
        shutil.rmtree(later)
    edit("run.json", lambda record: record.pop("results") and None)(run)
    shutil.copytree(next(Path(base["pretrain"]["cache_dir"]).glob("tokens-*")), folder / "store")
    shutil.copytree(folder / "store" / "tokenizer", folder / "tokenizer")
    write_model_folder(folder / "model")
    write_task(folder / "data", "mrpc")
    return folder


def flags(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def contents(folder):
    """Everything in a folder but locks, which outlive their runs: bytes of files, None for folders."""
    paths = (path for path in folder.rglob("*") if path.name != LOCK)
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def words(base, templates, tmp_path, monkeypatch):
    """Makes what a row names, and returns the words of its command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipes.hub_access, "get_token", lambda: None)

    def prepare(row):
        # Neither a network nor a token: what needs them is refused, at once.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", "--push_to_hub" not in row.words)
        if row.make:
            row.make(tmp_path, templates)
        monkeypatch.setattr(
            sys, "argv", [MAIN[row.program][1], *flags(base[row.program]), *shlex.split(row.words)]
        )
        return sys.argv

    return prepare


def check(row, code, out, err):
    assert code == 2, (code, err or out[-2000:])
    assert err.startswith("error: ") and err.count("\n") == 1, err
    missing = [words for words in row.says if words not in err]
    assert not missing, (missing, err)
    assert "Traceback" not in out


@pytest.mark.parametrize("name", ROWS)
def test_a_mistake_is_one_line_and_changes_nothing(name, words, tmp_path, cache_dir, capfd):
    row = ROWS[name]
    words(row)
    before = contents(tmp_path)
    capfd.readouterr()
    code = MAIN[row.program][0]()
    check(row, code, *capfd.readouterr())
    assert contents(tmp_path) == before
    # What is finished in the cache may stay, and nothing else.
    names = [path.name for path in cache_dir.iterdir()]
    assert [name for name in names if not re.fullmatch("(tokenizer|tokens)-[0-9a-f]{16}", name)] == []


def started(command, tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)


@pytest.mark.parametrize(
    "name",
    ["option: misspelt", "text: not UTF-8", "checkpoint: malicious moments", "GLUE: label out of range"],
)
def test_a_process_says_the_same(name, words, tmp_path, capfd):
    row = ROWS[name]
    script, *rest = words(row)
    before = contents(tmp_path)
    capfd.readouterr()
    MAIN[row.program][0]()
    out, err = capfd.readouterr()
    process = started([sys.executable, str(ROOT / script), *rest], tmp_path)
    check(row, process.returncode, process.stdout, process.stderr)
    assert process.stderr == err
    assert contents(tmp_path) == before


def test_the_launcher_adds_a_trace_of_its_own(words, tmp_path):
    """Its exit code is 1 whatever ours is, and our line comes first."""
    script, *rest = words(ROWS["text: not UTF-8"])
    process = started([accelerate(), "launch", str(ROOT / script), *rest], tmp_path)
    lines = process.stderr.splitlines()
    (ours,) = (line for line in lines if line.startswith("error: "))
    trace = lines[lines.index("Traceback (most recent call last):") :]
    assert process.returncode == 1
    assert "bad.txt: line 2 is not UTF-8" in ours and ours not in trace
    frames = [line for line in trace if line.startswith("  File ")]
    assert "accelerate" in frames[0] and not [frame for frame in frames if str(ROOT / "recipes") in frame]
