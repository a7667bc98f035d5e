"""What holds for any input: blocks, masks, learning rates, the order of samples over sessions, metrics."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer, get_scheduler

from recipes import token_store
from recipes.arguments import MaskingArguments, OptimizationArguments, PretrainingArguments
from recipes.batches import BlockReader, TrainingBatches
from recipes.corpus import Corpus, Source
from recipes.masking import IGNORED, Masker
from recipes.optimization import SCHEDULES, learning_rate_at
from recipes.run_record import Metrics
from recipes.sampling import SampleOrder, Samples
from recipes.stages import build_stages
from recipes.token_store import TokenStore, build_token_store

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNK, CLS, SEP, MASK = range(5)
UNUSED = ["[unused0]", "[unused1]"]
PIECES = [*"abcdef", *(f"##{c}" for c in "abcdef"), "ab", "##cd", "bad", "##ef"]
FILLERS = [f"w{i}" for i in range(80)]  # a smaller vocabulary is refused
TOKENS = [*SPECIAL, *UNUSED, *PIECES, *FILLERS]
TOKENIZER = BertTokenizer(vocab={token: i for i, token in enumerate(TOKENS)})
FIRST_ORDINARY = len(SPECIAL) + len(UNUSED)


def holds(examples):
    """The same examples on every machine."""
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


# --- Packing ----------------------------------------------------------------------------------------

# Words with several pieces, unknown ones, and white space of all kinds; or nothing.
texts = st.text(alphabet="abcdefz .\n\t[]", max_size=60)
corpora = st.lists(texts, min_size=1, max_size=8).filter(lambda found: any(text.strip() for text in found))


def stream(documents):
    """The ids of all documents, [SEP] after each, document by document with the stock tokenizer."""
    kept = [text for text in documents if text.strip()]
    return [i for text in kept for i in [*TOKENIZER(text, add_special_tokens=False).input_ids, SEP]]


def block(ids, index, length):
    inner = length - 2
    return [CLS, *ids[index * inner : (index + 1) * inner], SEP]


def build(folder, train, validation, shard, characters):
    """A store in shards of so many ids, made from pieces of so many characters."""
    sources = [
        Source(json.dumps(texts), lambda texts=texts: iter(texts), "t") for texts in (train, validation)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_store, "SHARD_TOKENS", shard)
        patch.setattr(token_store, "BATCH_CHARACTERS", characters)
        patch.setattr(Corpus, "check_overlap", lambda *arguments: None)
        return build_token_store(Corpus("t", 1.0, *sources), TOKENIZER, str(folder), max_unk_rate=1.0)


@holds(40)
@given(corpora, corpora, st.integers(1, 50), st.integers(1, 100), st.data())
def test_any_block_of_any_length_is_that_part_of_the_stream(
    tmp_path_factory, train, validation, shard, characters, data
):
    store = build(tmp_path_factory.mktemp("store"), train, validation, shard, characters)
    for split, documents in (("train", train), ("validation", validation)):
        ids = stream(documents)
        assert store.tokens(split) == len(ids)
        assert store.unigram_counts(split).tolist() == np.bincount(ids, minlength=len(TOKENS)).tolist()
        for length in data.draw(st.lists(st.integers(3, 20), min_size=1, max_size=3)):
            count = len(ids) // (length - 2)
            assert store.blocks(split, length) == count
            indices = data.draw(st.lists(st.integers(0, count - 1), max_size=5) if count else st.just([]))
            found = TokenStore.open(store.path).read_blocks(split, np.array(indices, np.int64), length)
            assert found.tolist() == [block(ids, index, length) for index in indices]


@holds(25)
@given(corpora, corpora, st.integers(3, 12), st.data())
def test_a_batch_from_several_corpora_holds_the_blocks_that_were_asked_for(
    tmp_path_factory, one, two, length, data
):
    stores = [build(tmp_path_factory.mktemp("store"), texts, ["a b c"], 7, 100) for texts in (one, two)]
    streams = [stream(one), stream(two)]
    choices = [(c, b) for c, ids in enumerate(streams) for b in range(len(ids) // (length - 2))]
    assume(choices)
    chosen = data.draw(st.lists(st.sampled_from(choices), min_size=1, max_size=8))
    corpus, number = np.array(chosen, np.int64).T
    reader = BlockReader(
        stores, "train", Masker(TOKENIZER, MaskingArguments(mask_replace_prob=0, random_replace_prob=0))
    )
    batch = reader(Samples(corpus, number, np.zeros_like(number)), length, 0)
    assert batch["input_ids"].tolist() == [block(streams[c], b, length) for c, b in chosen]


# --- Masks ------------------------------------------------------------------------------------------

units = st.sampled_from(["token", "whole_word", "span"])
shares = st.floats(0, 1)
ids = st.one_of(
    st.integers(0, len(TOKENS) - 1), st.integers(FIRST_ORDINARY, FIRST_ORDINARY + len(PIECES) - 1)
)
blocks = (
    st.integers(4, 40)
    .flatmap(
        lambda length: st.lists(
            st.lists(ids, min_size=length - 2, max_size=length - 2), min_size=1, max_size=4
        )
    )
    .map(lambda rows: np.array([[CLS, *row, SEP] for row in rows], np.int64))
)


@st.composite
def maskers(draw):
    masked = draw(shares)
    return Masker(
        TOKENIZER,
        MaskingArguments(
            mlm_probability=draw(st.floats(0.01, 0.99)),
            masking_unit=draw(units),
            mask_replace_prob=masked,
            random_replace_prob=draw(shares) * (1 - masked),
        ),
    )


def selected(masked, shape):
    """Where labels stand, bool [n, L]."""
    found = np.zeros(shape, bool)
    for row, (positions, labels) in enumerate(zip(masked.masked_positions, masked.labels)):
        used = positions[labels != IGNORED]
        assert len(set(used)) == len(used)
        found[row, used] = True
    return found


@holds(300)
@given(maskers(), blocks, st.integers(0, 2**32 - 1))
def test_masks_keep_count_and_hide_nothing_else(masker, blocks, seed):
    masked = masker(blocks, seed, np.arange(len(blocks)))
    chosen, a = selected(masked, blocks.shape), masker.arguments
    ordinary = blocks >= FIRST_ORDINARY
    budget = [round(a.mlm_probability * int(n)) for n in ordinary.sum(axis=1)]
    if a.masking_unit == "token":
        assert chosen.sum(axis=1).tolist() == budget
    assert (chosen.sum(axis=1) <= budget).all() and not chosen[~ordinary].any()
    labels = masked.labels[masked.labels != IGNORED]
    assert labels.tolist() == blocks[chosen].tolist()  # in the order of positions
    assert (masked.input_ids[~chosen] == blocks[~chosen]).all()
    seen = masked.input_ids[chosen]
    assert ((seen == MASK) | (seen >= FIRST_ORDINARY)).all()
    if a.mask_replace_prob == 1:
        assert (seen == MASK).all()
    if a.mask_replace_prob == 0:
        assert (seen != MASK).all()
    if a.mask_replace_prob + a.random_replace_prob == 0:
        assert (seen == blocks[chosen]).all()


@holds(100)
@given(maskers(), blocks, st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_a_mask_does_not_depend_on_its_batch(masker, blocks, seed, random):
    key = np.arange(len(blocks))
    whole = masker(blocks, seed, key)
    order = random.sample(range(len(blocks)), random.randint(1, len(blocks)))
    part = masker(blocks[order], seed, key[order])
    for name in ("input_ids", "masked_positions", "labels"):
        assert (getattr(part, name) == getattr(whole, name)[order]).all()


@holds(100)
@given(maskers(), blocks, st.integers(0, 2**32 - 1))
def test_whole_words_are_taken_as_long_as_they_fit(masker, blocks, seed):
    """No word is cut, and no word that was left out would have fitted."""
    masker.arguments.masking_unit = "whole_word"
    chosen = selected(masker(blocks, seed, np.arange(len(blocks))), blocks.shape)
    for row, taken in zip(blocks, chosen):
        words, pieces = [], [TOKENS[i].startswith("##") for i in row]
        for at in np.flatnonzero(row >= FIRST_ORDINARY):
            if words and pieces[at] and words[-1][-1] == at - 1:
                words[-1].append(at)
            else:
                words.append([at])
        assert all(len(set(taken[word])) == 1 for word in words)
        left = round(masker.arguments.mlm_probability * sum(map(len, words))) - taken.sum()
        assert all(taken[word[0]] or len(word) > left for word in words)


# --- Learning rate ----------------------------------------------------------------------------------


@st.composite
def schedules(draw):
    max_steps = draw(st.integers(1, 3000))
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    warmup_steps = draw(st.integers(0, max_steps - 1))
    kwargs = {}
    if name == "warmup_stable_decay":
        decay = draw(st.integers(1, max_steps - warmup_steps))
        kwargs = {"num_decay_steps": decay, "min_lr_ratio": draw(shares)}
    args = OptimizationArguments(
        learning_rate=draw(st.floats(1e-6, 1.0)), max_steps=max_steps, warmup_steps=warmup_steps,
        lr_scheduler_type=name, lr_scheduler_kwargs=kwargs,
    )  # fmt: skip
    return args


def stock_factor(args, done):
    """What transformers multiplies the peak with after so many updates."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(
        args.lr_scheduler_type, optimizer, args.warmup_steps, args.max_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs or None,
    )  # fmt: skip
    return scheduler.lr_lambdas[0](done)


@holds(300)
@given(schedules(), st.data())
def test_learning_rates_are_those_of_transformers(args, data):
    step = data.draw(st.integers(1, args.max_steps))
    if step <= args.warmup_steps and args.lr_scheduler_type != "constant":
        factor = step / args.warmup_steps  # one update ahead of transformers: none has rate 0
    else:
        factor = stock_factor(args, step - 1)
    rate = learning_rate_at(step, args, args.max_steps)
    assert rate == pytest.approx(args.learning_rate * factor, rel=1e-9, abs=1e-15)


@holds(60)
@given(schedules())
def test_the_learning_rate_rises_to_its_peak_and_never_again(args):
    rates = [learning_rate_at(step, args, args.max_steps) for step in range(1, args.max_steps + 1)]
    warmup = 0 if args.lr_scheduler_type == "constant" else args.warmup_steps
    slack = 1e-12 * args.learning_rate  # of the last digit
    assert all(0 < rate <= args.learning_rate + slack for rate in rates)
    assert rates[:warmup] == sorted(set(rates[:warmup]))
    assert max(rates) == pytest.approx(args.learning_rate, rel=1e-12)
    assert all(b <= a + slack for a, b in zip(rates[warmup:], rates[warmup + 1 :]))


# --- The order of samples ---------------------------------------------------------------------------


class Tokens:
    """A store of which only the size is asked."""

    def __init__(self, tokens):
        self.tokens = tokens

    def blocks(self, split, max_seq_length):
        return self.tokens // (max_seq_length - 2)


def samples_of_updates(stores, weights, stages, first, last, num_processes):
    """(corpus, epoch, block) of each sample, update by update, as the loop of each process would get them."""
    args = PretrainingArguments(max_steps=sum(row["steps"] for row in stages), stages=stages)
    parts = []
    for process in range(num_processes):
        batches = TrainingBatches(
            stores, weights, SimpleNamespace(arguments=args), args, build_stages(args), process, num_processes
        )
        batches.reader = lambda samples, length, *key: (length, key, samples)
        parts.append(list(batches.updates(first, last, 0)))
    updates = []
    for micro_batches in zip(*parts):
        # Micro-batch by micro-batch, and in each process by process.
        lying = [micro for at_once in zip(*micro_batches) for micro in at_once]
        ((length, key),) = {(length, tuple(key)) for length, key, _ in lying}
        rows = [zip(s.corpus.tolist(), s.epoch.tolist(), s.block.tolist()) for *_, s in lying]
        updates.append((length, key, [row for part in rows for row in part]))
    return updates


@st.composite
def runs(draw):
    """Stages (steps, length, global batch), corpora, weights, and the updates at which sessions end."""
    rows = st.tuples(st.integers(1, 6), st.integers(8, 40), st.integers(1, 24))
    stages = draw(st.lists(rows, min_size=1, max_size=3))
    stores = [Tokens(n) for n in draw(st.lists(st.integers(50, 1500), min_size=1, max_size=3))]
    weights = draw(st.lists(st.floats(0.1, 4), min_size=len(stores), max_size=len(stores)))
    steps = sum(row[0] for row in stages)
    ends = sorted({*draw(st.lists(st.integers(1, steps), max_size=4)), steps})
    return stages, stores, weights, ends


@st.composite
def shape(draw, stages):
    """A number of processes that divides all global batches, and a micro-batch for each stage."""
    common = np.gcd.reduce([batch for *_, batch in stages])
    processes = draw(st.sampled_from([n for n in range(1, 5) if common % n == 0]))
    rows = []
    for steps, length, batch in stages:
        share = batch // processes
        size = draw(st.sampled_from([n for n in range(1, share + 1) if share % n == 0]))
        accumulation = {"per_device_train_batch_size": size, "gradient_accumulation_steps": share // size}
        rows.append({"steps": steps, "max_seq_length": length, **accumulation})
    return rows, processes


@holds(120)
@given(runs(), st.data())
def test_sessions_of_any_shape_train_on_what_one_would(run, data):
    """However the updates are split into sessions, processes, micro-batches and accumulations."""
    stages, stores, weights, ends = run
    whole = [
        {"steps": steps, "max_seq_length": length, "per_device_train_batch_size": batch,
         "gradient_accumulation_steps": 1}
        for steps, length, batch in stages
    ]  # fmt: skip
    expected = samples_of_updates(stores, weights, whole, 0, ends[-1], 1)
    assert [length for length, *_ in expected] == [length for n, length, _ in stages for _ in range(n)]
    found = []
    for first, last in zip([0, *ends], ends):
        rows, processes = data.draw(shape(stages))
        found += samples_of_updates(stores, weights, rows, first, last, processes)
    assert found == expected


@holds(60)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 4)), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1), st.integers(1, 6),
)  # fmt: skip
def test_every_block_has_its_turn_as_often_as_its_weight_says(corpora, seed, epochs):
    order = SampleOrder(*map(list, zip(*corpora)), seed, 0)
    samples = order(np.arange(epochs * order.samples_per_epoch))
    seen = Counter(zip(samples.corpus.tolist(), samples.epoch.tolist(), samples.block.tolist()))
    assert max(seen.values()) == 1  # what is seen again is another epoch, and masked anew
    for number, (blocks, weight) in enumerate(corpora):
        draws = max(1, round(weight * blocks)) * epochs
        passes, rest = divmod(draws, blocks)
        expected = [blocks] * passes + [rest] * (rest > 0)
        by_epoch = Counter(epoch for corpus, epoch, _ in seen if corpus == number)
        assert [by_epoch[epoch] for epoch in sorted(by_epoch)] == expected


# --- Metrics ----------------------------------------------------------------------------------------


def lines_of(first, last, logging, validating):
    """The lines that training writes in updates `first` + 1 to `last`."""
    for step in range(first + 1, last + 1):
        if step % logging == 0:
            yield {"step": step, "train_loss": 1 / step}
        if step % validating == 0:
            yield {"step": step, "validation_loss": 2 / step}


@holds(40)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), max_size=5),
    st.integers(1, 4), st.integers(1, 4), st.integers(0, 20), st.booleans(),
)  # fmt: skip
def test_metrics_of_sessions_that_were_killed_are_those_of_one(tmp_path_factory, sessions, a, b, torn, moves):
    """Each session trains on from a checkpoint and dies later, perhaps in the middle of a line."""
    folder = tmp_path_factory.mktemp("metrics")
    metrics, step = Metrics(folder / "metrics.jsonl"), 0
    for number, (back, forward) in enumerate(sessions):
        step = max(0, step - back)
        if moves:  # to the other of two folders, from a checkpoint of the first
            before, metrics = metrics, Metrics(folder / f"metrics-{number % 2}.jsonl")
            metrics.continue_from(before.file, step)
        metrics.cut_back(step)
        for line in lines_of(step, step + forward, a, b):
            metrics.append(line)
        step += forward
        with metrics.file.open("a") as file:
            file.write('{"step": 99999, "train_loss": 1}'[:torn])
    metrics.cut_back(step)
    assert metrics.lines() == list(lines_of(0, step, a, b))
