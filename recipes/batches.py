"""Masked batches: micro-batch m of update k on process r, by arithmetic from the token stores."""

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from recipes.arguments import PretrainingArguments
from recipes.masking import IGNORED, Masker
from recipes.sampling import SampleOrder, Samples
from recipes.stages import Stage, stage_at
from recipes.stopping import SIGNALS
from recipes.token_store import TokenStore

Batch = dict[str, torch.Tensor]


class BlockReader:
    """Reads blocks of one split and one length from several stores, and masks them into tensors."""

    def __init__(self, stores: list[TokenStore], split: str, masker: Masker) -> None:
        self.stores, self.split, self.masker = stores, split, masker

    def __call__(self, samples: Samples, max_seq_length: int, *key: int) -> Batch:
        """Tensors of n samples, L = `max_seq_length`.

        Returns:
            input_ids [n, L], masked_positions and labels [n, capacity], all int64, and document_ids [n, L]
            where documents are isolated.
        """
        blocks = np.empty((len(samples.block), max_seq_length), np.int64)
        for number, store in enumerate(self.stores):
            here = samples.corpus == number
            if here.any():
                blocks[here] = store.read_blocks(self.split, samples.block[here], max_seq_length)
        masked = self.masker(blocks, *key, samples.corpus, samples.epoch, samples.block)
        batch = {
            "input_ids": torch.from_numpy(masked.input_ids),
            "masked_positions": torch.from_numpy(masked.masked_positions),
            "labels": torch.from_numpy(masked.labels),
        }
        if self.masker.arguments.isolate_documents:
            batch["document_ids"] = torch.from_numpy(self.masker.document_ids(blocks))
        return batch


class TrainingBatches(Dataset):
    """Micro-batches by (step, micro-batch), for one process of `num_processes`."""

    def __init__(
        self,
        stores: list[TokenStore],
        weights: list[float],
        masker: Masker,
        args: PretrainingArguments,
        stages: list[Stage],
        process_index: int,
        num_processes: int,
    ) -> None:
        self.reader = BlockReader(stores, "train", masker)
        self.stages, self.seed = stages, args.seed
        self.process_index, self.num_processes = process_index, num_processes
        self.data_offset = 0
        self.orders = [self._order(stores, weights, stage) for stage in stages]

    def _order(self, stores: list[TokenStore], weights: list[float], stage: Stage) -> SampleOrder:
        blocks = [store.blocks("train", stage.max_seq_length) for store in stores]
        return SampleOrder(blocks, weights, self.seed, stage.number)

    def __getitem__(self, index: tuple[int, int]) -> Batch:
        """Micro-batch `index[1]` of update `index[0]`."""
        step, micro = index
        stage = stage_at(self.stages, step)
        size = stage.per_device_train_batch_size
        first = (micro * self.num_processes + self.process_index) * size
        samples = self.samples(step, first, size)
        return self.reader(samples, stage.max_seq_length, self.seed, stage.number)

    def samples(self, step: int, first: int = 0, size: int | None = None) -> Samples:
        """Samples of update `step` (from 0): `size` of them from `first` on; None: those of all processes.

        The updates, micro-batches and processes lie one after the other.
        """
        stage = stage_at(self.stages, step)
        batch = stage.global_batch_size(self.num_processes)
        first += (step - stage.first_step + self.data_offset) * batch
        size = batch if size is None else size
        return self.orders[stage.number](np.arange(first, first + size, dtype=np.int64))

    def updates(
        self, first_step: int, last_step: int, num_workers: int, data_offset: int = 0
    ) -> Iterator[list[Batch]]:
        """The micro-batches of each update from `first_step` up to, not including, `last_step`.

        They are those of the update `data_offset` further on.

        Raises:
            RuntimeError: A worker died ("DataLoader worker ...").
        """
        self.data_offset = data_offset
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=_schedule(self.stages, first_step, last_step),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            # The loader draws a base seed; from a generator of its own it leaves dropout's alone.
            generator=torch.Generator(),
            worker_init_fn=_ignore_signals,
        )
        batches = iter(loader)
        for step in range(first_step, last_step):
            number = stage_at(self.stages, step).gradient_accumulation_steps
            yield [_next(batches) if num_workers else next(batches) for _ in range(number)]


def _schedule(stages: list[Stage], first_step: int, last_step: int) -> Iterator[tuple[int, int]]:
    """The (step, micro-batch) pairs in order, without listing them."""
    for step in range(first_step, last_step):
        for micro in range(stage_at(stages, step).gradient_accumulation_steps):
            yield step, micro


def _next(batches: Iterator[Batch]) -> Batch:
    try:
        return next(batches)
    except (ConnectionError, EOFError, FileNotFoundError) as error:  # it died while it handed over a tensor
        raise RuntimeError(f"DataLoader worker gone: {type(error).__name__}") from error


def _ignore_signals(worker: int) -> None:
    """Some schedulers signal every process: a worker serves until the training process lets it go."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def with_all_positions(batch: Batch) -> Batch:
    """The same batch with a label for every token, `[n, L]`, -100 where nothing is predicted."""
    if "masked_positions" not in batch:
        return batch
    rest = {name: value for name, value in batch.items() if name != "masked_positions"}
    nothing = torch.full_like(batch["input_ids"], IGNORED)
    # What pads the positions points at [CLS], which is never masked.
    return rest | {"labels": nothing.scatter(1, batch["masked_positions"], batch["labels"])}


def masked_tokens(batches: list[Batch]) -> int:
    """Tokens to be predicted in the micro-batches of one update on this process."""
    return sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
