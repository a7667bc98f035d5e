"""Examples of GLUE tasks: every layout gives the same rows, and every flaw one clear line."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glue_eval.data import fingerprint, load_task
from glue_eval.tasks import TASKS
from recipes.errors import UserError
from tests.glue_hub import GlueHub, hub_environment

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data" / "glue"
# What GLUE's site and the dataset's card give.
OFFICIAL = {
    "cola": (8551, 1043), "sst2": (67349, 872), "mrpc": (3668, 408),
    "stsb": (5749, 1500), "rte": (2490, 277), "wnli": (635, 71),
}  # fmt: skip
SPLITS = {"train": 7, "validation": 4, "test": 3}


def made_up(task, split):
    """Columns of a small split; `idx` does not start at 0 and has gaps."""
    n = SPLITS[split]
    columns = {name: [f"{split} {name} {row} é" for row in range(n)] for name in TASKS[task].columns}
    labels = [1.25 * (row % 5) + 0.1 * (row == 0) for row in range(n)] if task == "stsb" else [0, 1] * n
    return columns | {"label": labels[:n], "idx": [10 + 3 * row for row in range(n)]}


def write(path, columns):
    """A file in the format of its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = pa.table(columns)
        types = [pa.float32() if pa.types.is_floating(kind) else kind for kind in table.schema.types]
        pq.write_table(table.cast(pa.schema(list(zip(columns, types)))), path)  # scores as on the Hub
    else:
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_task(folder, task, layout="{}.parquet"):
    """All splits of a task; a layout with {shard} puts a row or more in each of three files."""
    for split in SPLITS:
        columns = made_up(task, split)
        cuts = [0, 1, 2, SPLITS[split]] if "{shard}" in layout else [0, SPLITS[split]]
        for shard, (first, last) in enumerate(pairwise(cuts)):
            part = {name: values[first:last] for name, values in columns.items()}
            write(folder / task / layout.format(split, shard=f"{shard:05d}"), part)
    return folder


def load(folder, task="mrpc", splits=tuple(SPLITS)):
    return load_task(TASKS[task], folder and str(folder), splits, allow_other_sizes=True)


def assert_made_up(examples, task):
    for split, rows in examples.items():
        columns = made_up(task, split)
        texts = [columns[name] for name in TASKS[task].columns]
        assert [rows.first, rows.second] == [*texts, None][:2]
        assert rows.idx.tolist() == columns["idx"]
        expected = [-1] * len(rows) if split == "test" else columns["label"]
        assert rows.labels.tolist() == pytest.approx(expected, rel=1e-6)
        assert rows.labels.dtype == (np.float64 if task == "stsb" else np.int64)
        assert rows.idx.dtype == np.int64


# --- Layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["mrpc", "cola", "stsb"])
def test_every_layout_gives_the_same_examples(tmp_path, task):
    seen = set()
    endings = ("parquet", "jsonl")
    for i, layout in enumerate(["{}.", "{}-00000-of-00001.", "{}-{shard}-of-00003."]):
        for ending in endings:
            examples = load(write_task(tmp_path / f"{i}{ending}", task, layout + ending), task)
            assert_made_up(examples, task)
            seen.add(fingerprint(examples))
    assert len(seen) == 1


def test_files_are_read_without_a_network_and_leave_nothing(tmp_path, monkeypatch):
    write_task(tmp_path, "mrpc")
    before = sorted(tmp_path.rglob("*"))
    # Importing it fails, and so does opening a connection.
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr(socket, "socket", None)
    assert_made_up(load(tmp_path), "mrpc")
    assert sorted(tmp_path.rglob("*")) == before


def test_only_the_wanted_splits_are_needed(tmp_path):
    write(tmp_path / "mrpc" / "validation.parquet", made_up("mrpc", "validation"))
    assert list(load(tmp_path, splits=["validation"])) == ["validation"]


@pytest.mark.parametrize("labels", [None, [-1, -1, -1], [1, 0, 1]])
def test_labels_of_a_test_split_are_not_read(tmp_path, labels):
    columns = made_up("mrpc", "test")
    del columns["label"]
    write(tmp_path / "mrpc" / "test.parquet", columns | ({"label": labels} if labels else {}))
    assert load(tmp_path, splits=["test"])["test"].labels.tolist() == [-1, -1, -1]


def test_rows_are_numbered_where_the_data_does_not(tmp_path):
    columns = made_up("mrpc", "train")
    del columns["idx"]
    write(tmp_path / "mrpc" / "train.jsonl", columns)
    assert load(tmp_path, splits=["train"])["train"].idx.tolist() == list(range(7))


def test_the_fingerprint_tells_every_change(tmp_path):
    examples = load(write_task(tmp_path, "mrpc"))
    rows = examples["train"]
    labels = rows.labels.copy()
    labels[3] = 1 - labels[3]
    changed = [
        {"first": [*rows.first[:-1], rows.first[-1] + "."]},
        {"second": [*rows.second[1:], rows.second[0]]},
        {"first": [rows.first[0] + rows.first[1][:1], rows.first[1][1:], *rows.first[2:]]},
        {"labels": labels},
    ]
    seen = {fingerprint(examples | {"train": replace(rows, **change)}) for change in changed}
    seen |= {fingerprint(examples), fingerprint({"train": rows})}
    assert len(seen) == len(changed) + 2
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in seen)
    assert fingerprint(dict(reversed(examples.items()))) == fingerprint(examples)


@pytest.mark.skipif(not REAL.is_dir(), reason="the tables of ../shared/data/glue are not there")
@pytest.mark.parametrize("task", OFFICIAL)
def test_real_splits_have_the_official_sizes(task):
    examples = load_task(TASKS[task], str(REAL), ("train", "validation"))
    assert tuple(map(len, examples.values())) == OFFICIAL[task]
    for rows in examples.values():
        allowed = (0, 5) if task == "stsb" else (0, 1)
        assert (rows.labels.min(), rows.labels.max()) == allowed


# --- Flaws ------------------------------------------------------------------------------------------


def refusal(folder, task="mrpc", splits=("train",), **options):
    with pytest.raises(UserError) as raised:
        load_task(TASKS[task], str(folder), splits, **{"allow_other_sizes": True} | options)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("data_dir")
    return message


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    "task, column, row, value, parts",
    [
        ("mrpc", "sentence2", 2, None, ["sentence2 in row 2 is None"]),
        ("mrpc", "label", 4, 2, ["label 2", "row 4", "0 to 1"]),
        ("mrpc", "label", 4, -1, ["label -1", "row 4", "0 to 1"]),
        ("mrpc", "label", 1, None, ["label None in row 1"]),
        ("mrpc", "label", None, 0.5, ["label 0.5 in row 0"]),
        ("mrpc", "label", None, "equivalent", ["label 'equivalent' in row 0", "number"]),
        ("mrpc", "label", None, True, ["label True in row 0", "number"]),
        ("mrpc", "sentence1", None, 7, ["sentence1 in row 0 is 7", "string"]),
        ("mrpc", "idx", 6, 10, ["idx 10", "more than once"]),
        ("mrpc", "idx", None, 0.5, ["idx 0.5 in row 0"]),
        ("stsb", "label", 5, 5.5, ["label 5.5", "row 5", "0 to 5"]),
        ("stsb", "label", 5, float("nan"), ["label nan", "row 5"]),
    ],
)
def test_a_wrong_value_is_named(tmp_path, ending, task, column, row, value, parts):
    columns = made_up(task, "train")
    for wrong in [row] if row is not None else range(7):
        columns[column][wrong] = value
    write(tmp_path / task / f"train.{ending}", columns)
    message = refusal(tmp_path, task)
    for part in [*parts, task, f"train.{ending}"]:
        assert part in message


def test_half_a_character_is_named(tmp_path):
    columns = made_up("mrpc", "train")
    columns["sentence1"][3] = "\ud800"
    write(tmp_path / "mrpc" / "train.jsonl", columns)
    assert "sentence1 in row 3" in refusal(tmp_path)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize("column", ["sentence2", "label"])
def test_a_missing_column_is_named_beside_those_there(tmp_path, ending, column):
    columns = made_up("mrpc", "train")
    columns["other"] = columns.pop(column)
    write(tmp_path / "mrpc" / f"train.{ending}", columns)
    message = refusal(tmp_path)
    assert f"no column {column}" in message
    assert "wanted: sentence1, sentence2, label" in message
    assert "other" in message.partition("there are")[2]


@pytest.mark.parametrize(
    "name, content",
    [
        ("train.parquet", b""),
        ("train.parquet", b"version https://git-lfs.github.com/spec/v1\n"),
        ("train.jsonl", b""),
        ("train.jsonl", b'{"sentence1": "a", "sente'),
        ("train.jsonl", b"[1]\n"),
        ("train.jsonl", b'{"sentence1": "\xff"}\n'),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content):
    (tmp_path / "mrpc").mkdir()
    (tmp_path / "mrpc" / name).write_bytes(content)
    message = refusal(tmp_path)
    assert f"mrpc train ({name})" in message
    assert "truncated?" in message


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_a_file_that_was_cut_is_refused(tmp_path, ending):
    path = write(tmp_path / "mrpc" / f"train.{ending}", made_up("mrpc", "train"))
    path.write_bytes(path.read_bytes()[:-10])
    assert "truncated?" in refusal(tmp_path)


def test_another_number_of_rows_is_refused_unless_allowed(tmp_path, monkeypatch):
    write_task(tmp_path, "mrpc")
    message = refusal(tmp_path, allow_other_sizes=False)
    for part in ("mrpc train", "7 rows", "3668", "truncated?", "allow_other_sizes"):
        assert part in message
    monkeypatch.setitem(TASKS["mrpc"].rows, "train", 6)
    message = refusal(tmp_path, allow_other_sizes=False)
    assert "7 rows, 6 are official" in message
    assert "truncated" not in message
    monkeypatch.setitem(TASKS["mrpc"].rows, "train", 7)
    load_task(TASKS["mrpc"], str(tmp_path), ["train"])


def test_a_split_without_rows_is_refused(tmp_path):
    write(tmp_path / "mrpc" / "train.parquet", {name: [] for name in made_up("mrpc", "train")})
    write(tmp_path / "rte" / "train.jsonl", {"sentence1": []})
    assert "has no rows" in refusal(tmp_path)
    assert "is empty" in refusal(tmp_path, "rte")


def test_missing_folders_and_files_are_named(tmp_path):
    write(tmp_path / "mrpc" / "validation.parquet", made_up("mrpc", "validation"))
    (tmp_path / "SST-2").mkdir()
    assert "no such folder" in refusal(tmp_path / "nothing")
    message = refusal(tmp_path, "rte")
    assert "no folder rte" in message
    assert "SST-2, mrpc" in message
    assert "rename SST-2 to sst2" in refusal(tmp_path, "sst2")
    assert "give the one above" in refusal(tmp_path / "mrpc")
    message = refusal(tmp_path, splits=["validation", "train"])
    for part in ("mrpc has no train split", "mrpc/train.parquet", "mrpc/train-00000-of-00001.jsonl"):
        assert part in message
    assert "validation.parquet" in message.partition("there are")[2]


def test_shards_must_be_complete_and_alone(tmp_path):
    write_task(tmp_path, "mrpc", "{}-{shard}-of-00003.parquet")
    (tmp_path / "mrpc" / "train-00001-of-00003.parquet").unlink()
    assert "mrpc train lacks shard 00001 of 3" in refusal(tmp_path)
    write(tmp_path / "mrpc" / "test.jsonl", made_up("mrpc", "test"))
    message = refusal(tmp_path, splits=["test"])
    assert "more than once" in message
    assert "test.jsonl" in message


def test_a_column_of_one_shard_alone_is_no_numbering(tmp_path):
    """Where one shard has `idx` and another has not, all rows are numbered."""
    write_task(tmp_path, "mrpc", "{}-{shard}-of-00003.parquet")
    path = tmp_path / "mrpc" / "train-00001-of-00003.parquet"
    pq.write_table(pq.read_table(path).drop_columns("idx"), path)
    assert load(tmp_path, splits=["train"])["train"].idx.tolist() == list(range(7))


# --- Hub --------------------------------------------------------------------------------------------

ASK = """
import json, sys, time
from glue_eval.data import load_task
from glue_eval.tasks import TASKS
from recipes.errors import UserError
import datasets  # seconds that are not the Hub's
started = time.perf_counter()
try:
    rows = load_task(TASKS["mrpc"], None, sys.argv[1:], allow_other_sizes=True)
    reply = {k: [v.first, v.second, v.labels.tolist(), v.idx.tolist()] for k, v in rows.items()}
except UserError as error:
    reply = {"error": str(error)}
print(json.dumps(reply | {"seconds": time.perf_counter() - started}))
"""


def ask(environment, *splits):
    """What `load_task` gives a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *splits],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_hub_then_its_cache_then_the_command_that_mends_it(tmp_path):
    served = write_task(tmp_path / "served", "mrpc", "{}-00000-of-00001.parquet")
    write_task(served, "cola", "{}-00000-of-00001.parquet")
    expected = {
        split: [rows["first"], rows["second"], rows["labels"].tolist(), rows["idx"].tolist()]
        for split, rows in ((split, asdict(rows)) for split, rows in load(served).items())
    }

    def rows_of(reply):
        return {name: value for name, value in reply.items() if name != "seconds"}

    home = tmp_path / "home"
    with GlueHub(served) as hub:
        assert rows_of(ask(hub.environment(home), *SPLITS)) == expected
        paths = [path for _, path in hub.requests]
        assert any(path.endswith("mrpc/train-00000-of-00001.parquet") for path in paths)
        assert not any(path.endswith("cola/train-00000-of-00001.parquet") for path in paths)
    dead = hub.url

    asked = [
        (hub_environment(dead, home) | {"HF_HUB_OFFLINE": "1"}, *SPLITS),
        (hub_environment(dead, home), *SPLITS),
        (hub_environment(dead, tmp_path / "fresh"), "train"),
    ]
    with ThreadPoolExecutor() as pool:
        offline, cached, refused = pool.map(lambda words: ask(*words), asked)
    assert rows_of(offline) == rows_of(cached) == expected
    # The stock retries alone sleep for 23 seconds.
    # Minutes, where the libraries retry by themselves.
    assert max(cached["seconds"], refused["seconds"]) < 100
    for part in ("data_dir: not given", "mrpc", "refused", "--data_dir DIR", "DIR/mrpc/SPLIT.parquet"):
        assert part in refused["error"]

    command = shlex.split(re.search(r"hf download .* --local-dir DIR", refused["error"])[0])
    command = [str(Path(sys.executable).with_name("hf")), *command[1:-1], str(tmp_path / "copy")]
    with GlueHub(served) as hub:
        environment = os.environ | hub.environment(tmp_path / "other")
        subprocess.run(command, env=environment, check=True, capture_output=True)
    assert_made_up(load(tmp_path / "copy"), "mrpc")
    assert not (tmp_path / "copy" / "cola").exists()
