"""The table of lengths and batches."""

import pytest

from recipes.errors import UserError
from recipes.stages import build_stages, stage_at


def test_without_a_table_there_is_one_stage(tiny):
    (stage,) = build_stages(tiny(gradient_accumulation_steps=3))
    assert (stage.first_step, stage.steps, stage.max_seq_length) == (0, 12, 32)
    assert stage.global_batch_size(num_processes=2) == 8 * 3 * 2
    assert stage.tokens_per_update(num_processes=2) == 8 * 3 * 2 * 32


def test_as_bert_did(tiny):
    table = [{"steps": 9, "per_device_train_batch_size": 16}, {"steps": 3, "max_seq_length": 64}]
    stages = build_stages(tiny(stages=table))
    assert [stage_at(stages, step).number for step in (0, 8, 9, 11)] == [0, 0, 1, 1]
    assert [stage.max_seq_length for stage in stages] == [32, 64]
    assert [stage.per_device_train_batch_size for stage in stages] == [16, 8]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ([{"step": 12}], r"stages\[0\].step: unknown; did you mean steps"),
        ([{"max_seq_length": 16}], r"stages\[0\]: steps is missing"),
        ([{"steps": 6}, {"steps": 5}], "add up to 11, but max_steps is 12"),
        ([{"steps": 12, "max_seq_length": 0}], r"stages\[0\].max_seq_length 0"),
        ([{"steps": 12.0}], r"stages\[0\].steps 12.0"),
        ([5], r"stages\[0\] 5: must be a table"),
        ([{"steps": 12, "max_seq_length": "32"}], r"stages\[0\].max_seq_length '32'"),
        ([{"steps": 12, "max_seq_length": 2}], "max_seq_length 2: must be at least 8"),
        (
            [{"steps": 12, "max_seq_length": 65}],
            "max_seq_length 65: the model has max_position_embeddings 64",
        ),
        ([{"steps": 12, "max_seq_length": 8}], "mlm_probability 0.05: selects no token of a block of 8"),
    ],
)
def test_mistakes(tiny, table, message):
    with pytest.raises(UserError, match=message):
        tiny(stages=table, mlm_probability=0.05)
