"""The files for the GLUE server: read by csv, broken one at a time."""

import csv
import os

import numpy as np
import pytest

from glue_eval.submission import check_submission, write_submission
from glue_eval.tasks import TASKS
from recipes.errors import UserError
from tests.conftest import ROOT

# Names, sizes and values as on gluebenchmark.com, written out here and not taken from the table.
NLI = {"entailment", "neutral", "contradiction"}
OFFICIAL = {
    "CoLA.tsv": ("cola", 1063, {"0", "1"}),
    "SST-2.tsv": ("sst2", 1821, {"0", "1"}),
    "MRPC.tsv": ("mrpc", 1725, {"0", "1"}),
    "STS-B.tsv": ("stsb", 1379, None),
    "QQP.tsv": ("qqp", 390965, {"0", "1"}),
    "MNLI-m.tsv": ("mnli", 9796, NLI),
    "MNLI-mm.tsv": ("mnli", 9847, NLI),
    "QNLI.tsv": ("qnli", 5463, {"entailment", "not_entailment"}),
    "RTE.tsv": ("rte", 3000, {"entailment", "not_entailment"}),
    "WNLI.tsv": ("wnli", 146, {"0", "1"}),
    "AX.tsv": ("ax", 1104, NLI),
}


def rows_of(file):
    with open(file, encoding="utf-8", newline="") as opened:
        return list(csv.reader(opened, delimiter="\t"))


def write(folder, name, sizes=None, seed=0):
    """Random predictions of a task in random order, of the official sizes or of others."""
    task = TASKS[name]
    draw = np.random.default_rng(seed)
    predictions, idx = {}, {}
    for split in task.files:
        n = sizes or task.rows[split]
        scores = draw.uniform(-1, 6, n) if task.is_regression else draw.integers(task.num_labels, size=n)
        predictions[split], idx[split] = scores, draw.permutation(n)
    return write_submission(folder, task, predictions, idx)


def test_all_files_as_the_server_wants_them(tmp_path):
    written = [file.name for name in TASKS for file in write(tmp_path, name)]
    assert sorted(written) == sorted(OFFICIAL)
    for name, (_, size, values) in OFFICIAL.items():
        header, *rows = rows_of(tmp_path / name)
        assert header == ["index", "prediction"]
        assert [row[0] for row in rows] == [str(i) for i in range(size)]
        if values:
            assert {row[1] for row in rows} == values
    assert check_submission(tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(OFFICIAL)


def test_rows_are_in_order_of_their_index_and_labels_keep_their_names(tmp_path):
    split = "test"
    write_submission(tmp_path, TASKS["rte"], {split: np.array([1, 0, 0])}, {split: np.array([2, 0, 1])})
    assert rows_of(tmp_path / "RTE.tsv")[1:] == [
        ["0", "entailment"],
        ["1", "entailment"],
        ["2", "not_entailment"],
    ]
    # The other way round than RTE, and the server takes numbers.
    write_submission(tmp_path, TASKS["wnli"], {split: np.array([1, 0, 0])}, {split: np.array([2, 0, 1])})
    assert [row[1] for row in rows_of(tmp_path / "WNLI.tsv")[1:]] == ["0", "0", "1"]
    write_submission(tmp_path, TASKS["ax"], {split: np.array([2, 1, 0])}, {split: np.arange(3)})
    assert [row[1] for row in rows_of(tmp_path / "AX.tsv")[1:]] == ["contradiction", "neutral", "entailment"]


def test_scores_have_three_decimals_within_the_scale(tmp_path):
    scores = np.array([-0.3, 5.2, 2.34567, 4.0], dtype=np.float32)
    write_submission(tmp_path, TASKS["stsb"], {"test": scores}, {"test": np.arange(4)})
    assert [row[1] for row in rows_of(tmp_path / "STS-B.tsv")[1:]] == ["0.000", "5.000", "2.346", "4.000"]


@pytest.mark.parametrize(
    ("name", "predictions", "idx", "message"),
    [
        ("mrpc", [0, 1, 1], [0, 1, 1], "indices are not 0 to 2"),
        ("mrpc", [0, 1, 1], [1, 2, 3], "indices are not 0 to 2"),
        ("mrpc", [0, 1], [0, 1, 2], "indices are not"),
        ("mrpc", [0, 2], [0, 1], "label 2 in row 1; allowed for mrpc: 0 to 1"),
        ("stsb", [1.0, np.nan], [0, 1], "label nan in row 1"),
    ],
)
def test_predictions_that_cannot_be_submitted(tmp_path, name, predictions, idx, message):
    with pytest.raises(UserError, match=message):
        write_submission(tmp_path, TASKS[name], {"test": np.array(predictions)}, {"test": np.array(idx)})
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ours_is_never_overwritten(tmp_path):
    notes = tmp_path / "MNLI-mm.tsv"
    notes.write_text("my notes on MNLI\n")
    (tmp_path / "other.txt").write_text("kept")
    with pytest.raises(UserError, match=r"MNLI-mm\.tsv.*not overwritten"):
        write(tmp_path, "mnli", sizes=5)
    assert notes.read_text() == "my notes on MNLI\n"
    assert not (tmp_path / "MNLI-m.tsv").exists()
    notes.unlink()
    first = [file.read_bytes() for file in write(tmp_path, "mnli", sizes=5)]
    second = [file.read_bytes() for file in write(tmp_path, "mnli", sizes=5, seed=1)]
    assert first != second
    assert (tmp_path / "other.txt").read_text() == "kept"


def test_an_interrupted_write_leaves_the_old_files(tmp_path, monkeypatch):
    old = {file: file.read_bytes() for file in write(tmp_path, "mnli", sizes=5)}
    calls = []

    def fail_second(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail_second)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path, "mnli", sizes=5, seed=1)
    assert {file: file.read_bytes() for file in old} == old


def test_missing_files_and_other_sizes_are_told(tmp_path):
    write(tmp_path, "wnli")
    (note,) = check_submission(tmp_path)
    assert note.startswith("10 of 11 files are missing")
    assert all(name in note for name in OFFICIAL if name != "WNLI.tsv")
    write(tmp_path, "rte", sizes=7)
    with pytest.raises(UserError, match=r"RTE\.tsv: 7 rows; the server wants 3000"):
        check_submission(tmp_path)
    assert check_submission(tmp_path, allow_other_sizes=True)[0] == "RTE.tsv: 7 rows; the server wants 3000"


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("WNLI.tsv", "index\tprediction", "id\tlabel", "header"),
        ("WNLI.tsv", "\n3\t", "\n4\t", "line 5 has index '4'; allowed there: 3"),
        ("WNLI.tsv", "\n3\t", "\n3,", "line 5 has index"),
        ("WNLI.tsv", "\n3\t", "\n3\tentailment", "line 5 predicts"),
        ("STS-B.tsv", "\n3\t", "\n3\t9", "line 5 predicts .*a number from 0 to 5"),
        ("STS-B.tsv", "\n3\t", "\n3\tnan", "line 5 predicts"),
    ],
)
def test_a_file_that_the_server_would_refuse(tmp_path, name, old, new, message):
    for task in ("wnli", "stsb"):
        write(tmp_path, task)
    file = tmp_path / name
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        check_submission(tmp_path)


def test_names_that_the_server_does_not_know(tmp_path):
    with pytest.raises(UserError, match=r"no \.tsv file"):
        check_submission(tmp_path / "absent")
    write(tmp_path, "wnli")
    (tmp_path / "WNLI.tsv").rename(tmp_path / "wnl1.tsv")
    with pytest.raises(UserError, match=r"wnl1\.tsv: unknown name"):
        check_submission(tmp_path)
    (tmp_path / "wnl1.tsv").rename(tmp_path / "MNLI-mmm.TSV")
    with pytest.raises(UserError, match=r"did you mean MNLI-mm\.tsv"):
        check_submission(tmp_path)
    (tmp_path / "MNLI-mmm.TSV").rename(tmp_path / "MRPC.tsv")
    (tmp_path / "MRPC.tsv").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        check_submission(tmp_path)


def test_the_real_test_split_of_mrpc(tmp_path):
    file = ROOT.parent / "shared" / "data" / "glue" / "mrpc" / "test.parquet"
    if not file.exists():
        pytest.skip("needs ../shared/data/glue")
    pq = pytest.importorskip("pyarrow.parquet")
    idx = pq.read_table(file, columns=["idx"])["idx"].to_numpy()
    write_submission(tmp_path, TASKS["mrpc"], {"test": idx % 2}, {"test": idx})
    assert len(rows_of(tmp_path / "MRPC.tsv")) == 1726
    assert len(check_submission(tmp_path)) == 1
