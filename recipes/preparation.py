"""From options to token stores: the main process of a machine prepares, the others wait for its word."""

import json
import os
import secrets
import socket
import time
from dataclasses import dataclass

import psutil
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedTokenizerBase

from recipes.arguments import PretrainingArguments
from recipes.corpus import open_corpora
from recipes.errors import Failure, UserError
from recipes.files import make_cache_dir, write_json
from recipes.launch import is_gone
from recipes.stages import Stage, block_lengths, remaining_tokens
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


def prepare_data(args: PretrainingArguments, stages: list[Stage], accelerator: Accelerator) -> PreparedData:
    """Tokenizer and token stores for the run, from the cache where they are there already.

    Raises:
        UserError: Anything that is wrong with corpus or tokenizer; on every process.
    """
    tokens = remaining_tokens(stages, accelerator.num_processes, 0)
    if args.token_store:
        prepared = {"stores": [args.token_store], "weights": [1.0]}
    elif accelerator.num_processes == 1:
        prepared = prepare_stores(args, tokens)
    else:
        prepared = _prepare_once(args, tokens, accelerator)
    stores = [TokenStore.open(folder) for folder in prepared["stores"]]
    tokenizer = stores[0].tokenizer()
    # Not a property of the store, which serves every length.
    tokenizer.model_max_length = max(block_lengths(args, stages))
    return PreparedData(tokenizer, stores, prepared["weights"])


def prepare_stores(args: PretrainingArguments, needed_tokens: int) -> dict[str, list]:
    """Folders of the finished stores, and the weights of their corpora.

    A stream is read until the run has enough: with weights w, each needs an equal share, since a corpus is
    passed over w times.
    """
    corpora = open_corpora(args)
    tokenizer = prepare_tokenizer(args, corpora)
    share = int(needed_tokens / sum(corpus.weight for corpus in corpora)) + 1
    stores = [
        build_token_store(corpus, tokenizer, args.cache_dir, share, args.max_unk_rate) for corpus in corpora
    ]
    return {"stores": [str(store.path) for store in stores], "weights": [c.weight for c in corpora]}


def _prepare_once(
    args: PretrainingArguments, needed_tokens: int, accelerator: Accelerator
) -> dict[str, list]:
    """The main process of each machine prepares; the others poll a file, in no collective that times out."""
    # Agreed on now, while nobody has to wait for long: a file of an earlier start has another name.
    (nonce,) = broadcast_object_list([secrets.token_hex(8)])
    preparer = _preparer(accelerator)
    word = make_cache_dir(args.cache_dir) / f".prepared-{nonce}.json"
    if accelerator.is_local_main_process:
        try:
            write_json(word, prepare_stores(args, needed_tokens))
        except UserError as error:
            write_json(word, {"error": str(error)})
    while not word.exists():
        if is_gone(preparer):
            raise Failure("the process that prepared the data is gone; the same command starts again")
        time.sleep(0.2)
    prepared = json.loads(word.read_text())
    accelerator.wait_for_everyone()
    if accelerator.is_local_main_process:
        word.unlink(missing_ok=True)
    if "error" in prepared:
        raise UserError(prepared["error"])
    return prepared


def _preparer(accelerator: Accelerator) -> psutil.Process:
    """The process of this machine that prepares."""
    mine = [socket.gethostname(), accelerator.is_local_main_process, os.getpid()]
    for host, prepares, pid in gather_object([mine]):
        if prepares and host == mine[0]:
            return psutil.Process(pid)
    raise Failure(f"{mine[0]}: no process with LOCAL_RANK 0, which would prepare the data")
