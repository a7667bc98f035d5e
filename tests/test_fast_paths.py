"""What makes an update fast: each path against the plain one, and the operations against a counter."""

import subprocess
import sys

import pytest
import torch
from model_fixtures import SIZES, ours, randomise, stock
from torch.utils.flop_counter import FlopCounterMode

from bert_ln.norms import NORMS
from bert_ln.placements import PLACEMENTS
from recipes.budget import training_flops
from recipes.fast_paths import choose_attention, compile_regions

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROWS, LENGTH, CAPACITY = 3, 16, 4


def masked_batch(seed=0):
    """Ids, distinct positions in order, the labels there; the last position of the first row is unused."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, SIZES["vocab_size"], (ROWS, LENGTH), generator=draw)
    positions = torch.rand(ROWS, LENGTH - 1, generator=draw).argsort()[:, :CAPACITY].sort()[0] + 1
    labels = ids.gather(1, positions)
    positions[0, -1], labels[0, -1] = 0, -100
    return {"input_ids": ids, "masked_positions": positions, "labels": labels}


def loss_and_gradients(model, **arguments):
    loss = model(**arguments).loss
    model.zero_grad()
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def layer_outputs(model, **arguments):
    shapes = []
    handle = model.bert.encoder.layer[-1].output.register_forward_hook(
        lambda module, inputs, output: shapes.append(
            (output[0] if isinstance(output, tuple) else output).shape
        )
    )
    model(**arguments)
    handle.remove()
    return shapes[0]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_last_layer_works_where_it_is_needed_and_gives_the_same(placement):
    model = randomise(ours("ForMaskedLM", placement, sparse_prediction=True)).double()
    batch = masked_batch()
    assert layer_outputs(model, **batch)[1] == CAPACITY
    loss, gradients = loss_and_gradients(model, **batch)
    plain_loss, plain_gradients = loss_and_gradients(model, **batch, output_hidden_states=True)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(gradients, plain_gradients, rtol=1e-7, atol=1e-12)


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 11, [0] * 16, [0] * 2 + [1] * 8 + [2] * 6])


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({}, {"document_ids": DOCUMENTS}),
        ({"attention_window": 3}, {}),
        ({"attention_window": 3, "attention_window_global": "last_layer"}, {"document_ids": DOCUMENTS}),
        ({}, {"attention_mask": (DOCUMENTS < 2).long()}),
        ({}, {"output_attentions": True}),
    ],
)
def test_it_is_the_same_with_masks_of_all_kinds(settings, arguments):
    model = ours("ForMaskedLM", "pre", sparse_prediction=True, attn_implementation="eager", **settings)
    model, batch = randomise(model).double(), masked_batch()
    assert layer_outputs(model, **batch, **arguments)[1] == CAPACITY
    torch.testing.assert_close(
        loss_and_gradients(model, **batch, **arguments),
        loss_and_gradients(model, **batch, **arguments, output_hidden_states=True),
    )


def test_it_is_the_same_from_embeddings():
    model, batch = randomise(ours("ForMaskedLM", sparse_prediction=True)).double(), masked_batch()
    batch["inputs_embeds"] = model.bert.embeddings.word_embeddings(batch.pop("input_ids")).detach()
    assert layer_outputs(model, **batch)[1] == CAPACITY
    torch.testing.assert_close(
        loss_and_gradients(model, **batch), loss_and_gradients(model, **batch, output_hidden_states=True)
    )


@pytest.mark.parametrize(
    ("why", "settings", "arguments"),
    [
        ("the norm crosses tokens", {"norm_type": "frn"}, {}),
        ("hidden states are asked for", {}, {"output_hidden_states": True}),
        ("hidden states are always recorded", {"output_hidden_states": True}, {}),
        ("a decoder", {"is_decoder": True}, {}),
    ],
)
def test_the_last_layer_works_everywhere_where(why, settings, arguments):
    model = ours("ForMaskedLM", "pre", sparse_prediction=True, **settings)
    assert layer_outputs(model, **masked_batch(), **arguments)[1] == LENGTH


def test_a_model_without_layers_trains():
    model = ours("ForMaskedLM", "pre", sparse_prediction=True, num_hidden_layers=0)
    assert model(**masked_batch()).loss.isfinite()


def test_it_is_the_same_with_gradient_checkpointing():
    settings = {"sparse_prediction": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, other = (ours("ForMaskedLM", "pre", **settings).train() for _ in range(2))
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(
        loss_and_gradients(model, **masked_batch()),
        loss_and_gradients(other, **masked_batch(), output_hidden_states=True),
    )


def test_embeddings_that_are_the_same_in_each_row_are_those_of_the_stock_class():
    model, reference = ours("Model", "post"), stock("Model")
    reference.load_state_dict(randomise(model).state_dict())
    ids, weight = masked_batch()["input_ids"], torch.randn(ROWS, LENGTH, SIZES["hidden_size"])
    for one in (model, reference):
        (one.embeddings(ids) * weight).sum().backward()
    mine, theirs = (
        {name: p.grad for name, p in one.embeddings.named_parameters()} for one in (model, reference)
    )
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", sorted(set(NORMS) - {"none"}))
@pytest.mark.parametrize("layers", [1, 3])
def test_the_operations_that_are_counted_are_those_that_are_done(norm, layers):
    model = ours("ForMaskedLM", "pre", sparse_prediction=True, norm_type=norm, num_hidden_layers=layers)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(**masked_batch()).loss.backward()
    expected = training_flops(model.config, LENGTH, CAPACITY / LENGTH) * ROWS * LENGTH
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("asked", "device", "bf16", "length", "has_mask", "kernel"),
    [
        (None, CPU, True, 128, False, "eager"),
        (None, CPU, True, 256, False, "eager"),
        (None, CPU, True, 512, False, "sdpa"),
        (None, CPU, True, 128, True, "sdpa"),
        (None, CPU, False, 128, False, "sdpa"),
        (None, CUDA, True, 128, False, "sdpa"),
        ("sdpa", CPU, True, 128, False, "sdpa"),
        ("eager", CUDA, True, 128, True, "eager"),
    ],
)
def test_the_kernel_of_attention(asked, device, bf16, length, has_mask, kernel):
    assert choose_attention(asked, device, bf16, length, has_mask)[0] == kernel


FAULTS = """
import resource, sys, torch
from recipes.fast_paths import keep_memory
if sys.argv[1] == "keep":
    assert keep_memory() == "freed memory is kept for the next update"
for update in range(12):
    if update == 6:  # by then there is room for all
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(2**24) for _ in range(3)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told")
def test_memory_that_is_kept_is_not_asked_for_again():
    run = {
        how: int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("keep", "leave")
    }
    # 18 times 64 MiB, in pages of at most 2 MiB.
    assert run["leave"] >= 18 * 32
    assert run["keep"] < run["leave"] / 2


@pytest.mark.slow
def test_compiled_regions_give_the_same_and_are_compiled_once():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = {"sparse_prediction": True, "num_hidden_layers": 5}
    plain, compiled = (randomise(ours("ForMaskedLM", "pre", **settings)) for _ in range(2))
    compile_regions(compiled)
    for seed in range(3):
        batch = masked_batch(seed) | {"num_items_in_batch": torch.tensor(7.0)}
        torch.testing.assert_close(
            loss_and_gradients(compiled, **batch), loss_and_gradients(plain, **batch), rtol=1e-4, atol=1e-5
        )
    # A layer, the last layer, which is called otherwise, and the head.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert compiled.state_dict().keys() == plain.state_dict().keys()
