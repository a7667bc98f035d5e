"""Random and mutated input is read as the standard library reads it, or refused as the user's mistake.

Never another exception, never a hang. The cases are the same each time; FUZZ=100 in the environment tries a
hundred times as many.
"""

import csv
import datetime
import io
import json
import math
import os
import random
import shutil
import signal
import string
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import BertTokenizer

from bert_ln import BertLnConfig, BertLnForMaskedLM
from recipes.arguments import DataArguments, PretrainingArguments, model_config
from recipes.checkpointing import TrainState, damage_of, find_checkpoint, save_checkpoint
from recipes.command_line import DEFAULT_CONFIG, build_arguments, option_names, parse_arguments, read_yaml
from recipes.corpus import open_corpora
from recipes.errors import UserError

TIMES = int(os.environ.get("FUZZ", "1"))
LONGEST = 60  # seconds of one case: it hangs
# What is hard for readers: ends of lines of all kinds, what ends a field, halves of characters.
ODD = [
    "\n",
    "\r",
    "\r\n",
    "\t",
    " ",
    "\u2028",
    "\x85",
    "\x0b",
    "\x1c",
    '"',
    "'",
    ",",
    "\\",
    "{",
    "}",
    "é",
    "𝄞",
    "\ufeff",
    "",
]


def cases(name, count):
    """A source of random numbers for each case."""
    for number in range(count * TIMES):
        yield random.Random(f"{name} {number}")


@pytest.fixture(autouse=True)
def no_hang():
    """Ends a case that does not end."""

    def stop(*_):
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST * TIMES)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def documents(draw):
    """Texts of any characters."""
    letters = [*ODD, *string.ascii_letters]
    count = draw.randint(1, 6)
    return ["".join(draw.choices(letters, k=draw.randint(0, 30))) for _ in range(count)]


def mutated(data, draw):
    """Bytes with a few of them flipped, cut, doubled, replaced or put in."""
    for _ in range(draw.randint(1, 4)):
        start = draw.randint(0, len(data))
        end = min(len(data), start + draw.randint(0, 1 + len(data) // 4))
        piece = data[start:end]
        middle = draw.choice(
            [
                b"",  # cut out
                piece * 2,
                piece[:1] and bytes([piece[0] ^ 1 << draw.randrange(8)]) + piece[1:],
                draw.randbytes(draw.randint(1, 8)),
                draw.choice(ODD).encode(),
                piece[::-1],
            ]
        )
        data = data[:start] + middle + data[end:] if draw.random() < 0.9 else data[:start]
    return data


# --- Corpora ----------------------------------------------------------------------------------------


def as_txt(texts, draw):
    return "\n\n".join(texts).encode()


def as_jsonl(texts, draw):
    lines = []
    for text in texts:
        row = {"text": text, draw.choice("abc"): draw.choice([None, 1, [text], {"text": text}])}
        items = draw.sample(sorted(row.items()), len(row))
        lines.append(json.dumps(dict(items), ensure_ascii=draw.random() < 0.5, indent=None))
        lines += [""] * draw.randint(0, 1)
    return draw.choice(["\n", "\r\n", " \n"]).join(lines).encode()


def as_csv(texts, draw):
    file = io.StringIO(newline="")
    # A carriage return ends a row unless it is quoted, which the library does not always do.
    quoting = csv.QUOTE_ALL if "\r" in "".join(texts) else draw.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
    writer = csv.writer(file, quoting=quoting, lineterminator=draw.choice(["\n", "\r\n"]))
    writer.writerows([["id", "text"], *enumerate(texts)])
    return file.getvalue().encode()


def as_parquet(texts, draw):
    kind = draw.choice([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
    table = pa.table({"n": range(len(texts)), "text": pa.array(texts, pa.string()).cast(kind)})
    file = io.BytesIO()
    compression = draw.choice(["none", "snappy", "zstd"])
    pq.write_table(table, file, row_group_size=draw.randint(1, 5), compression=compression)
    return file.getvalue()


def jsonl_of_the_library(path):
    lines = path.read_bytes().decode("utf-8-sig").split("\n")
    return [json.loads(line)["text"] for line in lines if line.strip()]


def csv_of_the_library(path):
    with path.open(newline="", encoding="utf-8-sig") as file:
        return [row["text"] for row in csv.DictReader(file, strict=True)]


def parquet_of_the_library(path):
    return pq.read_table(path, columns=["text"]).column(0).to_pylist()


FORMATS = {
    "jsonl": (as_jsonl, jsonl_of_the_library),
    "csv": (as_csv, csv_of_the_library),
    "parquet": (as_parquet, parquet_of_the_library),
}


@pytest.fixture
def read(tmp_path):
    """Writes a corpus and reads it: its documents, or None where it is refused."""
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("a document that only validates")

    def do(data, ending, sample_by=None):
        path = tmp_path / f"fuzzed.{ending}"
        path.write_bytes(data)
        options = DataArguments(train_file=str(path), validation_file=str(held_out), sample_by=sample_by)
        try:
            found = list(open_corpora(options)[0].documents("train"))
        except UserError as error:
            assert str(error).startswith(f"train_file {path}") or "text_column_name" in str(error), error
            assert "\n" not in str(error)
            return None, path
        assert all(isinstance(text, str) and text.encode() is not None for text in found)
        return found, path

    return do


@pytest.mark.parametrize("ending", FORMATS)
def test_a_valid_corpus_comes_back_unchanged(read, ending):
    write, library = FORMATS[ending]
    for draw in cases(f"valid {ending}", 100):
        texts = documents(draw)
        found, path = read(write(texts, draw), ending)
        if "".join(texts).strip():
            assert found == texts == library(path)
        else:
            assert found is None


@pytest.mark.parametrize("ending", FORMATS)
def test_a_mutated_corpus_is_refused_or_read_as_the_library_reads_it(read, ending):
    write, library = FORMATS[ending]
    refused = 0
    for draw in cases(f"mutated {ending}", 300):
        found, path = read(mutated(write(documents(draw), draw), draw), ending)
        refused += found is None
        assert found is None or found == library(path)
    assert 0 < refused < 300 * TIMES


def test_text_is_refused_or_comes_back_whole(read):
    """Documents to the last character, lines but for the white space around them, paragraphs but for any."""
    for draw in cases("text", 300):
        data = as_txt(documents(draw), draw)
        data = mutated(data, draw) if draw.random() < 0.7 else data
        for sample_by in ("document", "line", "paragraph"):
            found, path = read(data, "txt", sample_by)
            if found is None:
                continue
            text = path.read_bytes().decode("utf-8-sig")
            if sample_by == "document":
                assert found == [text]
            if sample_by == "line":
                assert "\n".join(found).rstrip("\n") == "\n".join(map(str.strip, text.split("\n"))).rstrip(
                    "\n"
                )
            assert "".join("".join(found).split()) == "".join(text.split())


@pytest.mark.parametrize("ending", [*FORMATS, "txt", "json"])
def test_random_bytes_are_refused_or_text(read, ending):
    for draw in cases(f"bytes {ending}", 60):
        begin = draw.choice([b"", b"text\n", b'{"text": ', b"PAR1", b"\xef\xbb\xbf", b"\x1f\x8b"])
        read(begin + draw.randbytes(draw.randint(0, 200)), ending)


def test_random_json_is_refused_or_text(read):
    for draw in cases("json", 300):
        lines = [json.dumps(value(draw, plain=True)) for _ in range(draw.randint(1, 3))]
        if draw.random() < 0.5:
            lines.insert(0, '{"text": "a"}')
        found, path = read("\n".join(lines).encode(), "jsonl")
        assert found is None or found == jsonl_of_the_library(path)


# --- Options ----------------------------------------------------------------------------------------


def value(draw, plain=False, depth=0):
    """Anything that YAML, or with `plain` JSON, may hold."""
    kinds = [
        lambda: None,
        lambda: draw.random() < 0.5,
        lambda: draw.choice([0, 1, -1, 2, 3, 8, 64, 10**6, 2**31, 2**63, 10**30, -(10**30)]),
        lambda: draw.choice([0.0, 0.5, -0.5, 1e-300, 1e300, 1.0, 3.7]),
        lambda: draw.choice(
            ["", "none", "true", "1e-4", "12", "[1", "{a: b}", "text", "a\nb", "\0", "~x", "x" * 300]
        ),
        lambda: "".join(draw.choices([*ODD, *string.printable], k=draw.randint(0, 12))),
    ]
    if not plain:
        kinds += [
            lambda: draw.choice([math.nan, math.inf, -math.inf]),
            lambda: draw.choice([datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1), b"bytes", {1, 2}]),
            lambda: draw.choice(option_names()),
        ]
    if depth < 3:
        kinds += [
            lambda: [value(draw, plain, depth + 1) for _ in range(draw.randint(0, 3))],
            lambda: {key(draw, plain): value(draw, plain, depth + 1) for _ in range(draw.randint(0, 3))},
        ]
    return draw.choice(kinds)()


KEYS = [
    "text",
    "steps",
    "max_seq_length",
    "train_file",
    "dataset_name",
    "weight",
    "num_decay_steps",
    "streaming",
]


def key(draw, plain):
    return draw.choice(KEYS) if plain or draw.random() < 0.8 else draw.choice([1, None, 2.5, True, "a\nb"])


def table(draw):
    """Some options with values of any type, most of them of the right one."""
    default = vars(PretrainingArguments())
    names = draw.sample(option_names(), draw.randint(1, 3)) + draw.choices(
        ["learnin_rate", "x", ""], k=draw.random() < 0.1
    )
    return {name: default.get(name) if draw.random() < 0.3 else value(draw) for name in names}


def accepted(make, *arguments):
    """Options that can be written down and make a model's configuration; None where they are refused."""
    try:
        args = make(*arguments)
    except UserError as error:
        assert str(error)
        return None
    json.dumps(args.to_dict(), allow_nan=False)
    assert model_config(args, vocab_size=100, pad_token_id=0).vocab_size == 100
    return args


def test_options_of_any_type_are_taken_or_refused():
    base = read_yaml(DEFAULT_CONFIG)
    taken = sum(accepted(build_arguments, base | table(draw)) is not None for draw in cases("options", 1500))
    assert 100 * TIMES < taken < 1000 * TIMES


def test_words_of_any_kind_are_taken_or_refused():
    for draw in cases("words", 150):
        words = []
        for name, given in table(draw).items():
            words += [f"--{name}={given}"] if draw.random() < 0.5 else [f"--{name}", str(given)]
        words = [draw.choice([word, word, word[:-1]]) for word in words]
        accepted(parse_arguments, [word for word in words if not word.startswith(("-h", "--h"))])


def test_a_mutated_config_is_taken_or_refused(tmp_path):
    path, texts = tmp_path / "fuzzed.yaml", [DEFAULT_CONFIG.read_bytes()]
    texts.append(
        b"stages: [{steps: 3, max_seq_length: 32}, &a {steps: 4}]\ncorpora:\n- train_file: x\n  <<: *a\n"
    )
    texts.append(
        b"when: 2020-01-01\nbase: 0x1f\nminutes: 190:20:30\nlr_scheduler_kwargs: {min_lr_ratio: .inf}\n"
    )
    for draw in cases("yaml", 400):
        path.write_bytes(mutated(draw.choice(texts), draw))
        try:
            values = read_yaml(path)
        except UserError as error:
            assert str(error).startswith(f"config {path}: ") and "\n" not in str(error)
            continue
        assert values == (yaml.safe_load(path.read_bytes()) or {})
        accepted(build_arguments, values)


# --- Checkpoints ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with two checkpoints of a tiny model."""
    folder = tmp_path_factory.mktemp("run")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertLnForMaskedLM(BertLnConfig(vocab_size=20, max_position_embeddings=8, **sizes))
    optimizer = torch.optim.AdamW(model.parameters())
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmno"]
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(names)})
    for step in (1, 2):
        save_checkpoint(folder, TrainState(step=step), model, tokenizer, optimizer, {"options": {}})
    return folder


def mutate_file(file, draw):
    """Change, cut, remove or replace a file of a checkpoint."""
    kind = draw.random()
    if kind < 0.1:
        file.unlink()
    elif kind < 0.2:
        file.unlink()
        file.mkdir()
    elif kind < 0.3 and file.name == "complete.json":
        file.write_text(json.dumps(value(draw, plain=True)))
    elif kind < 0.5 and file.name == "complete.json":
        marker = json.loads(file.read_text())
        file.write_text(json.dumps(marker | {draw.choice(sorted(marker)): value(draw, plain=True)}))
    else:
        file.write_bytes(mutated(file.read_bytes(), draw))


def test_a_mutated_checkpoint_is_never_picked(run):
    good, last = run / "checkpoint-1", run / "checkpoint-2"
    aside = run / "good"
    shutil.copytree(last, aside)
    files = sorted(f.relative_to(last) for f in last.rglob("*") if f.is_file())
    assert damage_of(last) is None
    for draw in cases("checkpoint", 150):
        name = draw.choice([*files, Path("complete.json")])
        mutate_file(last / name, draw)
        is_same = (last / name).is_file() and means(last / name) == means(aside / name)
        assert find_checkpoint(run, None)[0] == (last if is_same else good), name
        if not is_same:
            with pytest.raises(UserError, match="checkpoint-2: "):
                find_checkpoint(run, str(last))
        shutil.rmtree(last)
        shutil.copytree(aside, last)


def means(file):
    """A marker says the same with other white space."""
    if file.name != "complete.json":
        return file.read_bytes()
    try:
        return json.loads(file.read_bytes())
    except ValueError:
        return None
