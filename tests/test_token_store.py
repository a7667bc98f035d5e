"""The token store: what lies on disk, how blocks are read from it, and what may never look complete."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer

from recipes import token_store
from recipes.corpus import Corpus, Source, content_hash
from recipes.errors import UserError
from recipes.token_store import TokenStore, build_token_store, unigram_cross_entropy

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = "abcdefghij"  # ids 5 to 14
MORE = ["[", "]", "sep", "mask"]  # ids 15 to 18
FORK = multiprocessing.get_context("fork")  # spawned processes would import everything again
PAD, UNK, CLS, SEP, MASK = range(5)


def make_tokenizer(fillers=103):
    words = [*SPECIALS, *LETTERS, *MORE, *(f"w{i}" for i in range(fillers))]
    return BertTokenizer(vocab={word: i for i, word in enumerate(words)})


TOKENIZER = make_tokenizer()


def make_corpus(train, validation=("a b",), fingerprint="a", **options):
    def source(texts, key):
        return Source(key, lambda: iter(texts), key)

    return Corpus("test", 1.0, source(train, fingerprint), source(validation, "validation"), **options)


def build(tmp_path, train, validation=("j j",), **options):
    corpus = make_corpus(train, validation, fingerprint=repr((train, validation)))
    return build_token_store(corpus, TOKENIZER, str(tmp_path), **options)


def stream(documents):
    """Expected ids, by hand: letters one by one, [SEP] after each document."""
    return [i for text in documents for i in [*(5 + LETTERS.index(word) for word in text.split()), SEP]]


def read_all(store, split, length):
    return store.read_blocks(split, np.arange(store.blocks(split, length)), length)


# --- Content ----------------------------------------------------------------------------------------


def test_blocks_are_what_the_module_says(tmp_path):
    store = build(tmp_path, ["a b c", "d", "e f g h i"])
    assert store.tokens("train") == 12
    expected = [[CLS, 5, 6, 7, SEP, SEP], [CLS, 8, SEP, 9, 10, SEP], [CLS, 11, 12, 13, SEP, SEP]]
    assert read_all(store, "train", 6).tolist() == expected
    assert store.read_blocks("train", np.array([2, 0, 2]), 6).tolist() == [expected[i] for i in (2, 0, 2)]
    assert read_all(store, "train", 6).dtype == np.int64
    assert (store.blocks("train", 7), store.dropped("train", 7)) == (2, 2)
    with pytest.raises(AssertionError):
        store.read_blocks("train", np.array([3]), 6)


documents = st.lists(
    st.lists(st.sampled_from(LETTERS), min_size=1, max_size=30).map(" ".join), min_size=1, max_size=12
)


@settings(max_examples=15, deadline=None)
@given(documents, st.integers(3, 20), st.integers(4, 60), st.integers(1, 40))
def test_blocks_joined_are_the_stream(tmp_path_factory, train, length, shard, batch):
    """For any documents, block length, shard size and batch size."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_store, "SHARD_TOKENS", shard)
        patch.setattr(token_store, "BATCH_CHARACTERS", batch)
        patch.setattr(token_store, "PIECE_CHARACTERS", 5)
        patch.setattr(Corpus, "check_overlap", lambda *arguments: None)
        store = build(folder, train, ["[ ] " * 30])
    expected = stream(train)
    inner = [i for block in read_all(store, "train", length).tolist() for i in block[1:-1]]
    assert inner + expected[len(inner) :] == expected
    assert len(expected) - len(inner) == store.dropped("train", length) < length - 2
    shards = sorted(store.path.glob("train-*.bin"))
    assert [path.stat().st_size for path in shards[:-1]] == [2 * shard] * (len(shards) - 1)
    assert np.concatenate([np.fromfile(path, "<u2") for path in shards]).tolist() == expected
    shutil.rmtree(folder)


def test_text_that_looks_like_special_tokens_is_text(tmp_path):
    store = build(tmp_path, ["a [SEP] b [MASK]"])
    ids = [5, 15, 17, 16, 6, 15, 18, 16, SEP]  # a [ sep ] b [ mask ]
    assert read_all(store, "train", 11)[0, 1:-1].tolist() == ids


def test_truncation_of_the_tokenizer_does_not_cut_documents(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer(["a b c", "a"], truncation=True, max_length=4, padding="max_length")
    store = build_token_store(make_corpus(["a " * 50]), tokenizer, str(tmp_path))
    assert store.tokens("train") == 51


def test_pieces_of_a_long_document_are_tokenised_as_the_whole():
    text = "\n".join(f"w{i} w{i + 1}  w{i + 2}" for i in range(90)) + " " + "x" * 50
    for size in (7, 20, 64, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_store, "PIECE_CHARACTERS", size)
            pieces = list(token_store._split_long(text))
        assert "".join(piece for piece, _ in pieces) == text
        assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
        assert max(len(piece) for piece, _ in pieces) <= size
        if size > 50:
            ids = token_store._encode(TOKENIZER.backend_tokenizer, pieces, SEP)
            assert ids.tolist() == [*TOKENIZER(text, add_special_tokens=False).input_ids, SEP]


@pytest.mark.parametrize("vocabulary, bytes_each", [(2**16, 2), (2**16 + 1, 4)])
def test_ids_take_two_bytes_up_to_65536_entries(tmp_path, vocabulary, bytes_each):
    tokenizer = make_tokenizer(vocabulary - len(TOKENIZER) + 103)
    assert len(tokenizer) == vocabulary
    last = tokenizer.convert_ids_to_tokens(vocabulary - 1)
    store = build_token_store(make_corpus([f"a {last}"]), tokenizer, str(tmp_path))
    assert store.read_blocks("train", np.array([0]), 5).tolist() == [[CLS, 5, vocabulary - 1, SEP, SEP]]
    assert sum(path.stat().st_size for path in store.path.glob("train-*.bin")) == 3 * bytes_each


def test_positions_beyond_32_bits(tmp_path, monkeypatch):
    """A sparse store of 2**32 + 2**20 tokens: only its last ids take space."""
    store = build(tmp_path, ["a b"])
    tokens, shard = 2**32 + 2**20, 2**28
    about = json.loads((store.path / "store.json").read_text())
    names = [f"train-{i:05d}.bin" for i in range(-(-tokens // shard))]
    about["shard_tokens"] = shard
    about["splits"]["train"].update(tokens=tokens, shards=names)
    about["splits"]["validation"]["shards"] = ["validation-00000.bin"]
    for i, name in enumerate(names):
        with (store.path / name).open("wb") as file:
            file.truncate(2 * min(shard, tokens - i * shard))
    mark = np.arange(1000, 1000 + 126, dtype="<u2")
    with (store.path / names[-1]).open("r+b") as file:
        block = tokens // 126 - 1
        file.seek(2 * (block * 126 - (len(names) - 1) * shard))
        file.write(mark.tobytes())
    (store.path / "store.json").write_text(json.dumps(about))
    read = TokenStore.open(store.path).read_blocks("train", np.array([0, block]), 128)
    assert read[1, 1:-1].tolist() == mark.tolist() and not read[0, 1:-1].any()


# --- Counts and reports -----------------------------------------------------------------------------


def test_counts_hashes_and_report(tmp_path):
    train = ["a b a", " ", "c zzz", "a b a\n", ""]
    store = build(tmp_path, train, max_unk_rate=0.5)
    about = store.about["splits"]["train"]
    keys = ("documents_in", "documents_kept", "documents_empty", "duplicates", "tokens", "unk")
    assert [about[key] for key in keys] == [5, 3, 2, 1, 11, 1]
    expected = np.zeros(len(TOKENIZER), np.int64)
    expected[[UNK, SEP, 5, 6, 7]] = [1, 3, 4, 2, 1]
    assert store.unigram_counts("train").tolist() == expected.tolist()
    kept = [content_hash(text) for text in train if text.strip()]
    assert store.content_hashes("train").tolist() == kept
    line = store.report(7).splitlines()[0]
    for part in ("5 in, 3 kept (1 duplicates), 2 empty", "11 in, 10 kept in 2 blocks of 7, 1 dropped"):
        assert part in line
    assert "[UNK] 9.09" in line and "22 bytes, 2.00 a token" in line


def test_unigram_cross_entropy_is_that_of_a_loop(tmp_path):
    one = build(tmp_path, ["a b a c", "d d a"], ["a a b", "e d"])
    two = build(tmp_path, ["e e e", "f"], ["f f j"])
    special, weights = [PAD, UNK, CLS, SEP, MASK], [1.0, 2.5]
    train = dict.fromkeys(range(5, len(TOKENIZER)), 1.0)  # add-one smoothing
    for text, weight in (("a b a c d d a", 1.0), ("e e e f", 2.5)):
        for word in text.split():
            train[5 + LETTERS.index(word)] += weight
    total = sum(train.values())
    validation = ["a", "a", "b", "e", "d", "f", "f", "j"]
    expected = -sum(np.log(train[5 + LETTERS.index(word)] / total) for word in validation) / len(validation)
    assert unigram_cross_entropy([one, two], special, weights) == pytest.approx(expected, rel=1e-12)
    assert unigram_cross_entropy([one], special) != pytest.approx(expected)


# --- Refusals ---------------------------------------------------------------------------------------


def test_text_the_vocabulary_does_not_cover_is_refused(tmp_path):
    texts = ["a b c d"] * 20 + ["zzz"]  # 1 of 102 tokens
    with pytest.raises(UserError, match=r"max_unk_rate 0.005: 0.98% .* \[UNK\]"):
        build(tmp_path, texts, max_unk_rate=0.005)
    assert list(tmp_path.iterdir()) == []
    assert build(tmp_path, texts, max_unk_rate=0.01).about["splits"]["train"]["unk"] == 1
    with pytest.raises(UserError, match="max_unk_rate"):  # the limit holds for a store from the cache too
        build(tmp_path, texts, max_unk_rate=0.005)


def test_unknown_text_is_refused_early(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "UNK_CHECK_TOKENS", 100)
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 200)
    read = itertools.count()
    texts = ["zzz zzz", *(f"a {i}" for i in range(99_000))]

    def documents():
        for text in texts:
            next(read)
            yield text

    corpus = dataclasses.replace(make_corpus([]), train_source=Source("a", documents, "a"))
    object.__setattr__(corpus, "threshold", 0)  # no survey: count only what tokenising reads
    object.__setattr__(corpus, "characters", 0)
    with pytest.raises(UserError, match="max_unk_rate"):
        build_token_store(corpus, TOKENIZER, str(tmp_path))
    assert next(read) < 1000


def test_shared_documents_are_refused_before_completion(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="1 validation documents"):
        build(tmp_path, ["a b", "c"], ["c \n"])
    # A stream is surveyed only at its beginning: the rest shows when it is stored.
    monkeypatch.setattr("recipes.corpus.STREAM_SURVEY_DOCUMENTS", 1)
    corpus = make_corpus(["a b", "c"], ["c \n"], streaming=True)
    with pytest.raises(UserError, match="1 validation documents"):
        build_token_store(corpus, TOKENIZER, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_foreseen(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(token_store.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"cache_dir .*needed and 0 MB are free"):
        build(tmp_path, ["a b c d " * 1000])


def test_length_beyond_the_text_is_refused(tmp_path):
    store = build(tmp_path, ["a b c d e f"], ["a b"])
    store.check(5)
    with pytest.raises(UserError, match=r"max_seq_length 6: the validation text .* 3 tokens"):
        store.check(6)


def test_damaged_store_is_refused(tmp_path):
    store = build(tmp_path, ["a b c d e f"])
    [shard] = store.path.glob("train-*.bin")
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"damaged .* 6 tokens instead of 7"):
        build(tmp_path, ["a b c d e f"])
    shard.unlink()
    with pytest.raises(UserError, match="damaged"):
        TokenStore.open(store.path)


# --- Cache, streams, processes ----------------------------------------------------------------------


def test_second_start_tokenises_nothing(tmp_path, monkeypatch):
    first = build(tmp_path, ["a b", "c"])

    def refuse(*arguments):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(token_store, "_encode", refuse)
    monkeypatch.setattr("recipes.corpus.Survey.of", refuse)
    second = build(tmp_path, ["a b", "c"], needed_tokens=7)
    assert (second.path, second.fingerprint) == (first.path, first.fingerprint)
    for corpus, tokenizer in (
        (make_corpus(["a b"], fingerprint="b"), TOKENIZER),
        (make_corpus(["a b"]), make_tokenizer(200)),
    ):
        with pytest.raises(AssertionError, match="tokenised again"):
            build_token_store(corpus, tokenizer, str(tmp_path))


def test_store_brings_its_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(build(tmp_path, ["a b"]).path / "tokenizer")
    assert loaded("a j").input_ids == [CLS, 5, 14, SEP]


def test_stream_is_read_as_far_as_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(token_store, "BATCH_CHARACTERS", 10)
    corpus = make_corpus((f"a b {'c' * (i > 0)}" for i in itertools.count()), streaming=True)
    corpus = dataclasses.replace(
        corpus, train_source=Source("a", lambda: (f"a w{i % 50}" for i in itertools.count()), "a")
    )
    store = build_token_store(corpus, TOKENIZER, str(tmp_path), needed_tokens=100)
    assert 100 <= store.tokens("train") < 120
    more = build_token_store(corpus, TOKENIZER, str(tmp_path), needed_tokens=200)
    assert more.fingerprint != store.fingerprint and more.tokens("train") >= 200


def test_pickled_store_maps_the_same_files(tmp_path):
    store = build(tmp_path, ["a b c " * 1000])
    data = pickle.dumps(store)
    assert len(data) < 1000
    assert np.array_equal(read_all(pickle.loads(data), "train", 9), read_all(store, "train", 9))


def build_slowly(cache_dir, pause, report):
    """Build a store of 40 documents; each reading of one is reported."""

    def documents():
        for _ in range(40):
            report.put("read")
            time.sleep(pause)
            yield "a b c"

    token_store.BATCH_CHARACTERS = 10
    corpus = dataclasses.replace(make_corpus([]), train_source=Source("a", documents, "a"))
    report.put(build_token_store(corpus, TOKENIZER, str(cache_dir)).tokens("train"))


def start_build(cache_dir, pause):
    report = FORK.Queue()
    process = FORK.Process(target=build_slowly, args=(cache_dir, pause, report))
    process.start()
    return process, report


def result(process, report):
    """What the build reported last: the tokens."""
    said = next(said for said in iter(lambda: report.get(timeout=30), None) if said != "read")
    process.join()
    return said


def test_killed_build_leaves_nothing_that_looks_complete(tmp_path):
    process, report = start_build(tmp_path, pause=0.01)
    for _ in range(60):  # 40 documents of the survey, then amid the build
        assert report.get(timeout=30) == "read"
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    [left] = tmp_path.iterdir()
    assert ".tmp-" in left.name and not (left / "store.json").exists()
    assert result(*start_build(tmp_path, pause=0)) == 160
    [folder] = tmp_path.iterdir()
    assert TokenStore.open(folder).tokens("train") == 160


def test_processes_that_build_at_once_end_with_one_good_store(tmp_path):
    builds = [start_build(tmp_path, pause=0.005) for _ in "ab"]
    assert [result(*build) for build in builds] == [160, 160]
    [folder] = tmp_path.iterdir()
    assert TokenStore.open(folder).tokens("train") == 160
