"""Which samples an update, a micro-batch and a process get."""

from itertools import product

import pytest
from accelerate import Accelerator

from recipes.batches import TrainingBatches
from recipes.masking import Masker
from recipes.preparation import prepare_data
from recipes.stages import build_stages


class Spy:
    """An order that notes which positions it is asked for."""

    def __init__(self, order, positions):
        self.order, self.positions = order, positions

    def __call__(self, positions):
        self.positions.extend(positions)
        return self.order(positions)


@pytest.mark.parametrize(
    ("num_processes", "accumulation", "size"), [(1, 1, 8), (2, 2, 2), (1, 4, 2), (2, 1, 4)]
)
def test_every_sample_goes_to_one_place(tiny, num_processes, accumulation, size):
    """However a global batch of 8 is shared out, update k gets samples 8 k to 8 k + 7 of its stage."""
    shape = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    args = tiny(stages=[{"steps": 3, **shape}, {"steps": 2, "max_seq_length": 16, **shape}], max_steps=5)
    stages = build_stages(args)
    data = prepare_data(args, stages, Accelerator(cpu=True))
    for step, first in zip(range(5), (0, 8, 16, 0, 8)):
        positions = []
        for process, micro in product(range(num_processes), range(accumulation)):
            masker = Masker(data.tokenizer, args)
            batches = TrainingBatches(data.stores, [1.0], masker, args, stages, process, num_processes)
            batches.orders = [Spy(order, positions) for order in batches.orders]
            assert batches[step, micro]["input_ids"].shape == (size, 32 if step < 3 else 16)
        assert sorted(positions) == list(range(first, first + 8))
