"""From options to token stores: the main process of a machine prepares, the others wait for its word."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from recipes.arguments import PretrainingArguments, UserError
from recipes.corpus import open_corpora
from recipes.files import write_json
from recipes.stages import Stage, remaining_tokens
from recipes.token_store import TokenStore, build_token_store
from recipes.tokenization import prepare_tokenizer, tokenizer_fingerprint


@dataclass(frozen=True)
class PreparedData:
    """All that training needs of the corpus."""

    tokenizer: PreTrainedTokenizerBase
    stores: list[TokenStore]
    weights: list[float]

    def fingerprints(self) -> dict[str, object]:
        """What identifies the data of a run, for run.json."""
        return {
            "corpus_fingerprints": [store.fingerprint for store in self.stores],
            "tokenizer_fingerprint": tokenizer_fingerprint(self.tokenizer),
        }


def prepare_data(
    args: PretrainingArguments, stages: list[Stage], num_processes: int, prepares: bool
) -> PreparedData:
    """Tokenizer and token stores for the run, from the cache where they are there already.

    Args:
        args: The data options.
        stages: The longest block and, with `num_processes`, how far a stream is read.
        num_processes: Processes of the run.
        prepares: Whether this process does the work; the others poll a file, in no collective that could
            time out meanwhile.
    """
    if args.token_store:
        return _open_prepared({"stores": [args.token_store], "weights": [1.0]})
    word = _word_file(Path(args.cache_dir))
    if not prepares:
        return _open_prepared(_wait_for(word))
    prepared = _prepare(args, stages, remaining_tokens(stages, num_processes, 0))
    word.parent.mkdir(parents=True, exist_ok=True)
    write_json(word, prepared)
    return _open_prepared(prepared)


def _prepare(args: PretrainingArguments, stages: list[Stage], needed_tokens: int) -> dict[str, list]:
    corpora = open_corpora(args)
    lengths = [args.max_seq_length, *(stage.max_seq_length for stage in stages)]
    tokenizer = prepare_tokenizer(args, corpora, max(lengths))
    total = sum(corpus.weight for corpus in corpora)
    stores = []
    for corpus in corpora:
        share = int(needed_tokens * corpus.weight / total) + 1
        store = build_token_store(corpus, tokenizer, args.cache_dir, share, max_unk_rate=args.max_unk_rate)
        stores.append(str(store.path))
    return {"stores": stores, "weights": [corpus.weight for corpus in corpora]}


def _open_prepared(prepared: dict[str, list]) -> PreparedData:
    stores = [TokenStore.open(folder) for folder in prepared["stores"]]
    tokenizer = AutoTokenizer.from_pretrained(stores[0].path / "tokenizer")
    return PreparedData(tokenizer, stores, prepared["weights"])


def _word_file(cache_dir: Path) -> Path:
    """A name that only the processes of this launch know: they have one parent."""
    parent = psutil.Process(os.getppid())
    return cache_dir / f".prepared-{parent.pid}-{int(parent.create_time() * 100)}.json"


def _wait_for(word: Path) -> dict[str, list]:
    """Poll until the main process is done. Should it fail, the launcher ends this process too."""
    parent = os.getppid()
    while not word.exists():
        if os.getppid() != parent:
            raise UserError("the launcher is gone before the data was prepared")
        time.sleep(0.2)
    return json.loads(word.read_text())
