"""Masks: exact counts, 80/10/10, never a special token, a function of (seed, epoch, block) alone."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import BertTokenizer, PreTrainedTokenizerFast

from recipes.arguments import MaskingArguments
from recipes.errors import UserError
from recipes.masking import IGNORED, Masker, _spans

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
UNUSED = [f"[unused{i}]" for i in range(5)]
WORDS = [f"w{i}" for i in range(150)]
PIECES = [f"##p{i}" for i in range(40)]
VOCABULARY = {token: i for i, token in enumerate(SPECIAL + UNUSED + WORDS + PIECES)}
FIRST_ORDINARY = len(SPECIAL) + len(UNUSED)
PAD, UNK, CLS, SEP, MASK = range(5)


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer(vocab=VOCABULARY)


def make_blocks(n, length, seed=0):
    """Blocks of ordinary tokens with some [SEP], [UNK] and [unused] among them."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(FIRST_ORDINARY, len(VOCABULARY), (n, length))
    odd = rng.random((n, length))
    blocks[odd < 0.02] = SEP
    blocks[(odd > 0.02) & (odd < 0.03)] = UNK
    blocks[(odd > 0.03) & (odd < 0.04)] = len(SPECIAL)
    blocks[:, 0], blocks[:, -1] = CLS, SEP
    return blocks.astype(np.int64)


def original(blocks, masked):
    """Selected positions as a bool array, checking labels and order on the way."""
    selected = np.zeros(blocks.shape, bool)
    for row, (positions, labels) in enumerate(zip(masked.masked_positions, masked.labels)):
        used = labels != IGNORED
        assert not (~used)[: used.sum()].any(), "padding comes last"
        assert (np.diff(positions[used]) > 0).all()
        assert (blocks[row, positions[used]] == labels[used]).all()
        selected[row, positions[used]] = True
    return selected


@pytest.mark.parametrize("unit", ["token", "whole_word", "span"])
@pytest.mark.parametrize("probability", [0.15, 0.4])
def test_special_and_unused_tokens_are_left_alone(tokenizer, unit, probability):
    masker = Masker(tokenizer, MaskingArguments(masking_unit=unit, mlm_probability=probability))
    blocks = make_blocks(200, 64)
    masked = masker(blocks, 1, 0, np.arange(200))
    selected = original(blocks, masked)
    assert (blocks[selected] >= FIRST_ORDINARY).all()
    assert (masked.input_ids[~selected] == blocks[~selected]).all()
    drawn = masked.input_ids[selected & (masked.input_ids != blocks) & (masked.input_ids != MASK)]
    assert len(drawn) > 50
    assert (drawn >= FIRST_ORDINARY).all()


@pytest.mark.parametrize("probability", [0.15, 0.4, 0.999])
def test_token_masking_takes_exactly_the_rounded_share(tokenizer, probability):
    masker = Masker(tokenizer, MaskingArguments(mlm_probability=probability))
    blocks = make_blocks(300, 50)
    selected = original(blocks, masker(blocks, 1, np.arange(300)))
    maskable = (blocks >= FIRST_ORDINARY).sum(axis=1)
    assert selected.sum(axis=1).tolist() == [round(probability * int(m)) for m in maskable]


@pytest.mark.parametrize("unit", ["token", "whole_word", "span"])
def test_80_10_10(tokenizer, unit):
    masker = Masker(tokenizer, MaskingArguments(masking_unit=unit, mlm_probability=0.3))
    blocks = make_blocks(2000, 64)
    masked = masker(blocks, 4, np.arange(2000))
    selected = original(blocks, masked)
    before, after = blocks[selected], masked.input_ids[selected]
    # A random token is the original one once in as many draws as there are tokens.
    ordinary = len(VOCABULARY) - FIRST_ORDINARY
    expected = np.array([0.8, 0.1 * (1 - 1 / ordinary), 0.1 * (1 + 1 / ordinary)])
    observed = np.array(
        [(after == MASK).mean(), ((after != MASK) & (after != before)).mean(), (after == before).mean()]
    )
    # Tokens of a span share a decision: the effective number is smaller by the mean square of its length.
    spread = 4 * np.sqrt(expected * (1 - expected) / len(before)) * (4 if unit == "span" else 1)
    assert (np.abs(observed - expected) < spread).all(), observed


def test_configured_shares(tokenizer):
    masker = Masker(tokenizer, MaskingArguments(mask_replace_prob=1.0, random_replace_prob=0.0))
    blocks = make_blocks(50, 64)
    masked = masker(blocks, 4, np.arange(50))
    assert (masked.input_ids[original(blocks, masked)] == MASK).all()


@pytest.mark.parametrize("unit", ["whole_word", "span"])
def test_whole_units_up_to_the_budget(tokenizer, unit):
    masker = Masker(tokenizer, MaskingArguments(masking_unit=unit, mlm_probability=0.2))
    blocks = make_blocks(300, 64)
    selected = original(blocks, masker(blocks, 2, np.arange(300)))
    first_piece = VOCABULARY["##p0"]
    for block, chosen in zip(blocks, selected):
        budget = round(0.2 * int((block >= FIRST_ORDINARY).sum()))
        assert chosen.sum() <= budget
        for i in range(1, 64):
            # A piece that continues an ordinary token shares its fate.
            if block[i] >= first_piece and block[i - 1] >= FIRST_ORDINARY:
                assert chosen[i] == chosen[i - 1]
    assert selected.sum() / (blocks >= FIRST_ORDINARY).sum() > 0.17


def test_spans_are_longer_than_words(tokenizer):
    def mean_run(unit):
        masker = Masker(tokenizer, MaskingArguments(masking_unit=unit, mlm_probability=0.15))
        blocks = np.random.default_rng(1).integers(FIRST_ORDINARY, FIRST_ORDINARY + 150, (200, 128))
        selected = original(blocks, masker(blocks, 2, np.arange(200)))
        return selected.sum() / (np.diff(selected.astype(int), axis=1) == 1).sum()

    assert mean_run("span") > 2 * mean_run("whole_word")


def test_span_lengths_are_those_of_spanbert():
    """Geometric with p = 0.2, renormalised to at most 10 words: 3.8 on average (SpanBERT, section 3.1)."""
    words = np.broadcast_to(np.arange(500), (200, 500))
    everything = np.ones(words.shape, bool)
    spans = _spans(words, everything, (np.zeros((200, 1), np.int64), np.arange(200)[:, None]))
    lengths = np.concatenate([np.unique(row, return_counts=True)[1][:-1] for row in spans])
    weights = 0.2 * 0.8 ** np.arange(10)
    assert lengths.max() == 10
    assert lengths.mean() == pytest.approx((weights * np.arange(1, 11)).sum() / weights.sum(), rel=0.02)


def test_words_need_a_word_piece_tokenizer(tokenizer):
    backend = Tokenizer(models.WordLevel(vocab=VOCABULARY, unk_token="[UNK]"))
    names = {"unk_token": "[UNK]", "mask_token": "[MASK]", "sep_token": "[SEP]", "cls_token": "[CLS]"}
    other = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", **names)
    Masker(other, MaskingArguments())
    with pytest.raises(UserError, match="masking_unit whole_word: needs a WordPiece tokenizer"):
        Masker(other, MaskingArguments(masking_unit="whole_word"))


@pytest.mark.parametrize("unit", ["token", "whole_word", "span"])
def test_a_mask_depends_on_seed_epoch_and_block_only(tokenizer, unit):
    masker = Masker(tokenizer, MaskingArguments(masking_unit=unit))
    blocks = make_blocks(30, 64)
    together = masker(blocks, 1, 0, np.arange(30))
    for i in (0, 7, 29):
        alone = masker(blocks[i : i + 1], 1, 0, np.array([i]))
        assert (alone.input_ids[0] == together.input_ids[i]).all()
        assert (alone.labels[0] == together.labels[i]).all()
    for other in ((2, 0, np.arange(30)), (1, 1, np.arange(30)), (1, 0, np.arange(30) + 1)):
        different = masker(blocks, *other).masked_positions != together.masked_positions
        assert different.any(axis=1).all()


def test_shapes_are_static(tokenizer):
    masker = Masker(tokenizer, MaskingArguments())
    empty = np.full((2, 64), UNK)
    masked = masker(empty, 1, np.arange(2))
    assert masked.labels.shape == (2, masker.capacity(64)) == (2, round(0.15 * 62))
    assert masked.masked_tokens == 0


def test_document_ids_change_after_a_separator(tokenizer):
    masker = Masker(tokenizer, MaskingArguments())
    block = np.array([[CLS, 20, 21, SEP, 30, SEP, 40, SEP]])
    assert masker.document_ids(block).tolist() == [[0, 0, 0, 0, 1, 1, 2, 2]]
