"""Streams beyond 2^31 tokens, text beyond memory, ten thousand checkpoints, hundreds of updates."""

import hashlib
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import BertTokenizer

from recipes import token_store, tokenization
from recipes.checkpointing import FORMAT, MARKER, NEEDED, damage_of, find_checkpoint, is_complete, prune
from recipes.corpus import Corpus, Source
from recipes.randomness import permute
from recipes.sampling import SampleOrder
from recipes.token_store import SHARD_TOKENS, TokenStore, build_token_store
from tests.fault_layer import forked
from tests.memory_growth import measure, slope
from tests.test_storage_faults import save

# --- More tokens than 32 bits count -----------------------------------------------------------------

TOKENS = 2**31 + 2**27 + 12_345
VOCABULARY = 50_000


def id_at(position):
    """An id other than 0, which a sparse file has wherever nothing was written."""
    return position * 7919 % (VOCABULARY - 1) + 1


@pytest.fixture(scope="module")
def written():
    """Positions that hold something: around 2^31, at the ends of shards and of the stream, anywhere."""
    borders = [0, TOKENS, 2**31, 2**31 - 2**15, 2**31 + 2**15, *range(0, TOKENS, SHARD_TOKENS)]
    near = [border + i for border in borders for i in range(-70, 70)]
    anywhere = np.random.default_rng(1).integers(0, TOKENS, 500).tolist()
    return sorted({position for position in near + anywhere if 0 <= position < TOKENS})


@pytest.fixture(scope="module")
def huge(written, tmp_path_factory):
    """A store of 2^31 tokens and more that takes next to no room."""
    folder = tmp_path_factory.mktemp("huge")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(VOCABULARY - 5))]
    BertTokenizer(vocab={name: i for i, name in enumerate(names)}).save_pretrained(folder / "tokenizer")
    splits = {}
    for split, tokens in (("train", TOKENS), ("validation", 5000)):
        sizes = [min(SHARD_TOKENS, tokens - start) for start in range(0, tokens, SHARD_TOKENS)]
        shards = [f"{split}-{number:05d}.bin" for number in range(len(sizes))]
        for shard, size in zip(shards, sizes):
            with (folder / shard).open("wb") as file:
                file.truncate(2 * size)
        counts = dict.fromkeys(("documents_in", "documents_kept", "documents_empty", "duplicates", "unk"), 0)
        splits[split] = counts | {"tokens": tokens, "shards": shards, "seconds": 0.0}
        np.save(folder / f"counts-{split}.npy", np.full(VOCABULARY, tokens // VOCABULARY))
        np.save(folder / f"hashes-{split}.npy", np.zeros(1, np.uint64))
    for number, positions in itertools.groupby(written, key=lambda position: position // SHARD_TOKENS):
        with (folder / f"train-{number:05d}.bin").open("r+b") as file:
            for position in positions:
                file.seek(2 * (position % SHARD_TOKENS))
                file.write(id_at(position).to_bytes(2, "little"))
    about = {"format": token_store.FORMAT, "dtype": "<u2", "vocab_size": VOCABULARY, "cls_id": 2, "sep_id": 3}
    about |= {"unk_id": 1, "pad_id": 0, "mask_id": 4, "shard_tokens": SHARD_TOKENS, "splits": splits}
    about |= {"corpus": "made up", "fingerprint": "0" * 64, "tokenizer_fingerprint": "0" * 64}
    about |= {"corpus_fingerprint": "0" * 64, "needed_tokens": None}
    (folder / "store.json").write_text(json.dumps(about))
    assert sum(file.stat().st_blocks * 512 for file in folder.iterdir()) < 2**26, "no sparse files here"
    return TokenStore.open(folder)


@pytest.mark.parametrize("length", [16, 128, 512, 8192])
def test_blocks_beyond_32_bits_are_those_that_were_written(huge, written, length):
    inner, blocks = length - 2, huge.blocks("train", length)
    assert blocks == TOKENS // inner and huge.dropped("train", length) == TOKENS - blocks * inner
    expected = {blocks - 1: np.zeros(inner, int)}
    for position in written:
        index, place = divmod(position, inner)
        expected.setdefault(index, np.zeros(inner, int))[place] = id_at(position)
    expected.pop(blocks, None)  # the tail
    indices = random.Random(2).sample(sorted(expected), len(expected))
    assert max(indices) == blocks - 1 and sum(index * inner > 2**31 for index in indices) > 20
    read = huge.read_blocks("train", np.array(indices), length)
    assert (read[:, 0] == 2).all() and (read[:, -1] == 3).all()
    assert np.array_equal(read[:, 1:-1], [expected[index] for index in indices])


@pytest.mark.parametrize("size", [TOKENS // 14, 2**31 - 1, 2**31 + 11, 2**32 + 5, 2**40 + 1])
def test_no_sample_is_drawn_twice_and_none_lies_outside(size):
    """Of half a million draws from 2^31, some sixty would meet if they were not a permutation's."""
    random_places = np.random.default_rng(3).integers(0, size, 2**18)
    indices = np.unique(np.concatenate([random_places, np.arange(2**17), size - 1 - np.arange(2**17)]))
    drawn = permute(indices, size, 1, 42, 0)
    assert drawn.min() >= 0 and drawn.max() < size
    assert len(np.unique(drawn)) == len(indices)
    assert 0.49 < (drawn / size).mean() < 0.51 and drawn.max() > 0.999 * size


def test_an_order_counts_on_beyond_32_bits(huge):
    """Two corpora, positions in the fifth epoch: each block once in an epoch, and the epochs differ."""
    blocks = [huge.blocks("train", 16), 1000]
    order = SampleOrder(blocks, [1.0, 2.0], 42, 0)
    assert order.samples_per_epoch == blocks[0] + 2000
    assert 20 * order.samples_per_epoch > 2**31
    drawn = []
    for epoch in (0, 20):
        start = epoch * order.samples_per_epoch
        positions = np.random.default_rng(4).choice(order.samples_per_epoch, 2**18, replace=False) + start
        samples = order(positions)
        large = samples.corpus == 0
        assert (samples.epoch[large] == epoch).all()
        assert len(np.unique(samples.block[large])) == large.sum()
        assert samples.block[large].max() < blocks[0] and samples.block[large].max() > 0.999 * blocks[0]
        drawn.append(samples.block)
    assert (drawn[0] == drawn[1]).mean() < 0.01


# --- More text than memory holds --------------------------------------------------------------------

WORDS = ["".join(letters) for letters in itertools.product("bdfgklmnprst", "aeiou", "bdfgklmnprst", "aeiou")]
DOCUMENT = 20_000  # characters, about
STATUS = Path("/proc/self/status")


def documents(characters):
    """Text that is made while it is read."""
    chance = random.Random(5)
    for number in range(characters // DOCUMENT):
        yield f"{number} " + " ".join(chance.choices(WORDS, k=DOCUMENT // 5))


def prepare(characters, folder, streaming, result):
    """In a process of its own: tokenizer and store of so much text, and by how much memory grew meanwhile."""
    token_store.BATCH_CHARACTERS = 2**17  # else one batch is more than the text
    source = Source(str(characters), lambda: documents(characters), "made up")
    corpus = Corpus("made up", 1.0, source, percentage=5, streaming=streaming)
    before = psutil.Process().memory_info().rss
    tokenizer = tokenization.train_tokenizer([corpus], 2000, True)
    store = build_token_store(corpus, tokenizer, str(folder), needed_tokens=10**8)
    peak = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1]
    size = sum(file.stat().st_size for file in store.path.glob("*.bin"))
    result.write_text(json.dumps({"grown": 1024 * int(peak) - before, "size": size}))


@pytest.mark.skipif(not STATUS.exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_text(tmp_path, streaming):
    small, large = 8_000_000, 20_000_000
    measured = []
    for characters in (small, large):
        result = tmp_path / f"{characters}.json"
        preload = ["recipes.token_store", "recipes.tokenization", "pytest"]
        assert forked(preload, prepare, characters, tmp_path / str(characters), streaming, result) == 0
        measured.append(json.loads(result.read_text()))
    print(measured)
    assert measured[1]["size"] > 2.4 * measured[0]["size"]
    assert measured[1]["grown"] - measured[0]["grown"] < (large - small) / 3


# --- Very many checkpoints --------------------------------------------------------------------------

MANY = 10_000


@pytest.fixture
def checked(monkeypatch):
    """The files whose checksums are taken."""
    files, digest = [], hashlib.file_digest

    def noting(stream, algorithm):
        files.append(stream.name)
        return digest(stream, algorithm)

    monkeypatch.setattr(hashlib, "file_digest", noting)
    return files


def fake(folder, step, complete=True):
    """As small as a whole checkpoint can be."""
    checkpoint = folder / f"checkpoint-{step}"
    (checkpoint / "trainer").mkdir(parents=True)
    contents = dict.fromkeys(NEEDED, b"") | {"trainer/state.json": json.dumps({"step": step}).encode()}
    for name, content in contents.items():
        (checkpoint / name).write_bytes(content)
    if complete:
        files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        (checkpoint / MARKER).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}))


def test_of_ten_thousand_checkpoints_the_right_ones_are_kept(tmp_path, checked):
    """Every hundredth is not whole; three are of a future that the run went back from."""
    steps = list(range(5, 5 * MANY + 1, 5))
    newest = steps[-4]
    for number, step in enumerate(steps):
        fake(tmp_path, step, complete=number % 100 != 99)
    prune(tmp_path, None, newest=newest)
    assert len(list(tmp_path.iterdir())) == MANY
    prune(tmp_path, 3, newest=newest)
    assert checked == [], "deleting needs no checksums"
    found = {int(f.name.split("-")[1]) for f in tmp_path.iterdir() if is_complete(f)}
    expected = [step for number, step in enumerate(steps) if step <= newest and number % 100 != 99][-3:]
    assert found == {*expected, *(step for step in steps[-3:] if (step // 5 - 1) % 100 != 99)}
    assert expected[-1] == newest and find_checkpoint(tmp_path, None)[0].name == f"checkpoint-{steps[-2]}"


def test_among_a_thousand_checkpoints_a_save_looks_at_its_own(tmp_path, checked):
    many = 1000
    for step in range(1, many + 1):
        fake(tmp_path, step)
    list(save(tmp_path, many + 1, limit=many))
    new = tmp_path / f"checkpoint-{many + 1}"
    assert checked and all(str(new.name) in name for name in checked)
    assert len(checked) == len([f for f in new.rglob("*") if f.is_file()]) - 1
    assert (
        sum(is_complete(f) for f in tmp_path.iterdir()) == many and not (tmp_path / "checkpoint-1").exists()
    )
    checked.clear()
    assert find_checkpoint(tmp_path, None) == (new, []) and all(str(new) in name for name in checked)
    assert damage_of(tmp_path / "checkpoint-2") is None


# --- Very many updates ------------------------------------------------------------------------------


def measure_and_tell(updates, folder, result):
    result.write_text(json.dumps(measure(updates, folder, every=5)))


def test_memory_does_not_grow_with_the_updates(tmp_path):
    """Of six hundred; `python -m tests.memory_growth` makes ten thousand."""
    result = tmp_path / "sizes.json"
    assert forked(["recipes.pretraining", "pytest"], measure_and_tell, 600, tmp_path, result) == 0
    sizes = json.loads(result.read_text())
    print(f"{slope(sizes):+.0f} bytes an update, {sizes[0][1]:,} to {sizes[-1][1]:,}")
    assert slope(sizes) < 20_000
