"""The model against the stock classes and closed formulas."""

import math

import pytest
import torch
from model_fixtures import HEADS, PLACEMENTS, SIZES, batch, head_inputs, mlm_labels, ours, randomise, stock
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import bert_ln
from bert_ln import BertLnForMaskedLM, BertLnModel
from bert_ln.norms import NORM_CLASSES

ATTENTION = ("eager", "sdpa")


def parallel(head="ForMaskedLM", **settings):
    """Our Post-LN model and the stock one, with the same arbitrary weights."""
    model, reference = ours(head, "post", **settings), stock(head, **settings)
    reference.load_state_dict(randomise(model).state_dict())
    return model, reference


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- equality with stock BERT -------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("head", HEADS)
def test_post_ln_equals_stock(head, attention):
    model, reference = parallel(head, attn_implementation=attention)
    inputs = head_inputs(head)
    outputs, expected = model(**inputs), reference(**inputs)
    assert type(outputs) is type(expected)
    assert list(outputs) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(outputs[name], value, rtol=0, atol=1e-6)
    if head == "Model":
        outputs, expected = ({"loss": o.pooler_output.square().sum()} for o in (outputs, expected))
    outputs["loss"].backward()
    expected["loss"].backward()
    mine, theirs = gradients(model), gradients(reference)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ATTENTION)
def test_recorded_states_equal_stock(attention):
    model, reference = parallel("Model", attn_implementation=attention)
    wanted = {"output_hidden_states": True, "output_attentions": True}
    outputs, expected = model(**batch(), **wanted), reference(**batch(), **wanted)
    layers = SIZES["num_hidden_layers"]
    # SDPA does not return weights, in the stock class either.
    lengths = {"hidden_states": layers + 1, "attentions": layers if attention == "eager" else 0}
    for name, length in lengths.items():
        assert len(outputs[name]) == len(expected[name]) == length
        for mine, theirs in zip(outputs[name], expected[name], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_recorded_states_of_pre_ln():
    model = randomise(ours("Model", "pre", attn_implementation="eager"))
    outputs = model(**batch(), output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == SIZES["num_hidden_layers"] + 1
    assert [tuple(a.shape) for a in outputs.attentions] == [(3, 4, 12, 12)] * SIZES["num_hidden_layers"]
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    assert outputs.attentions[0].sum(-1).allclose(torch.ones(()))


def test_tuple_output_equals_stock():
    model, reference = parallel()
    for mine, theirs in zip(
        model(**batch(), return_dict=False), reference(**batch(), return_dict=False), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [0, 3])
def test_chunked_feed_forward_changes_nothing(chunk):
    model = randomise(ours("Model", "pre", chunk_size_feed_forward=chunk))
    plain = randomise(ours("Model", "pre"))
    torch.testing.assert_close(model(**batch())[0], plain(**batch())[0])


# --- initial weights ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_same_seed_same_weights_as_stock(head):
    mine, theirs = ours(head, "post", seed=5).state_dict(), stock(head, seed=5).state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("embedding_norm", [True, False])
def test_same_seed_same_weights_in_all_placements(embedding_norm):
    post = ours("ForPreTraining", "post", seed=5).state_dict()
    pre = ours("ForPreTraining", "pre", seed=5, embedding_norm=embedding_norm).state_dict()
    shared = [name for name in post if name in pre]
    assert len([name for name in shared if "norm" not in name.lower()]) == len(
        [name for name in post if "norm" not in name.lower()]
    )
    assert all(torch.equal(pre[name], post[name]) for name in shared)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_initial_statistics(placement):
    model = ours("ForPreTraining", placement, hidden_size=64, intermediate_size=256)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.cls.seq_relationship:
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert module.bias.abs().max() == 0
        if isinstance(module, NORM_CLASSES):
            assert module.weight.eq(1).all() and module.bias.eq(0).all()
    assert model.bert.embeddings.word_embeddings.weight[0].eq(0).all()


@pytest.mark.parametrize(("placement", "embedding_norm", "extra"), [
    ("post", True, 1), ("post", False, 0), ("pre", True, 2), ("pre", False, 1),
])  # fmt: skip
def test_number_of_norms(placement, embedding_norm, extra):
    model = ours("Model", placement, embedding_norm=embedding_norm)
    norms = [module for module in model.modules() if isinstance(module, NORM_CLASSES)]
    assert len(norms) == 2 * SIZES["num_hidden_layers"] + extra
    assert {norm.eps for norm in norms} == {1e-12}
    assert {norm.normalized_shape for norm in norms} == {(SIZES["hidden_size"],)}


@pytest.mark.parametrize(("placement", "low", "high"), [("post", 0.9, 2), ("pre", 0, 0.6)])
def test_last_gradient_at_the_start(placement, low, high):
    """Xiong et al. 2020, Theorem 1: with depth, the last feed-forward gradient shrinks in Pre-LN only."""

    def mean_norm(layers):
        norms = []
        for seed in range(3):
            # Weights of about Xavier's size, as in the theorem.
            model = ours(placement=placement, seed=seed, num_hidden_layers=layers, initializer_range=0.25)
            loss = model(**batch(), labels=batch()["input_ids"]).loss
            weight = model.bert.encoder.layer[-1].output.dense.weight
            norms.append(torch.autograd.grad(loss, weight)[0].norm().item())
        return sum(norms) / len(norms)

    assert low <= mean_norm(16) / mean_norm(2) <= high


# --- the formulas of Xiong et al. 2020, Table 1 -------------------------------------------------------------


def layer_parts(layer):
    """Attention and feed-forward of a layer in evaluation mode, each with its output projection."""

    def attend(x):
        return F.linear(layer.attention.self(x)[0], *layer.attention.output.dense.parameters())

    def feed_forward(x):
        return F.linear(layer.intermediate(x), *layer.output.dense.parameters())

    return attend, feed_forward


def test_post_ln_layer_is_the_formula():
    layer = randomise(ours("Model", "post")).encoder.layer[0]
    attend, feed_forward = layer_parts(layer)
    x = torch.randn(2, 5, SIZES["hidden_size"])
    middle = layer.attention.output.LayerNorm(x + attend(x))
    torch.testing.assert_close(layer(x), layer.output.LayerNorm(middle + feed_forward(middle)))


def test_pre_ln_layer_is_the_formula():
    layer = randomise(ours("Model", "pre")).encoder.layer[0]
    attend, feed_forward = layer_parts(layer)
    x = torch.randn(2, 5, SIZES["hidden_size"])
    middle = x + attend(layer.attention.output.pre_norm(x))
    torch.testing.assert_close(layer(x), middle + feed_forward(layer.output.pre_norm(middle)))


def test_pre_ln_ends_with_one_norm_before_pooler_and_heads():
    model = randomise(ours("ForPreTraining", "pre"))
    stream, seen = [], []
    model.bert.encoder.layer[-1].register_forward_hook(lambda _, __, output: stream.append(output))
    for reader in (model.bert.pooler, model.cls.predictions):
        reader.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch())
    expected = model.bert.encoder.final_norm(stream[0])
    assert len(seen) == 2
    assert all(torch.equal(states, expected) for states in seen)


def test_embedding_norm_is_a_switch():
    with_norm, without = ours("Model", "pre"), ours("Model", "pre", embedding_norm=False)
    ids = batch()["input_ids"]
    assert with_norm.embeddings(ids).std(-1, correction=0).allclose(torch.ones(()), atol=1e-4)
    parts = without.embeddings
    positions = torch.arange(ids.shape[1])
    expected = (
        parts.word_embeddings(ids)
        + parts.position_embeddings(positions)
        + parts.token_type_embeddings.weight[0]
    )
    torch.testing.assert_close(without.embeddings(ids), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_dropout_is_inside_the_branch(placement):
    """With everything dropped, Pre-LN is the identity on the stream and Post-LN only normalises it."""
    layer = ours("Model", placement, hidden_dropout_prob=1.0).encoder.layer[0].train()
    nn.init.ones_(layer.output.dense.bias)  # dropout comes after the bias
    x = torch.randn(2, 5, SIZES["hidden_size"])
    expected = F.layer_norm(x, (SIZES["hidden_size"],), eps=1e-12) if placement == "post" else x
    torch.testing.assert_close(layer(x), expected)


# --- sparse prediction and the loss -------------------------------------------------------------------------


def capacity_batch(labels, capacity):
    """Positions and labels of the masks, `[batch, capacity]`, padded with any position and -100."""
    positions = torch.full((len(labels), capacity), 7)
    targets = torch.full((len(labels), capacity), -100)
    for row, row_labels in enumerate(labels):
        where = (row_labels != -100).nonzero().flatten()
        positions[row, : len(where)] = where
        targets[row, : len(where)] = row_labels[where]
    return positions, targets


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
@pytest.mark.parametrize("static", [False, True])
def test_sparse_equals_dense(head, static):
    inputs = head_inputs(head)
    dense = randomise(ours(head, "pre"))
    sparse = randomise(ours(head, "pre", sparse_prediction=True))
    scored = []
    sparse.cls.predictions.decoder.register_forward_pre_hook(
        lambda _, args: scored.append(tuple(args[0].shape))
    )
    labels = inputs["labels"]
    masked = int((labels != -100).sum())
    expected = dense(**inputs)
    if static:
        inputs["masked_positions"], inputs["labels"] = capacity_batch(labels, capacity=10)
    outputs = sparse(**inputs)
    rows = 3 * 10 if static else masked
    assert scored == [(rows, SIZES["hidden_size"])]
    name = "logits" if head == "ForMaskedLM" else "prediction_logits"
    assert outputs[name].shape == (rows, SIZES["vocab_size"])
    kept = outputs[name][inputs["labels"].flatten() != -100] if static else outputs[name]
    torch.testing.assert_close(kept, expected[name][labels != -100])
    torch.testing.assert_close(outputs.loss, expected.loss)
    outputs.loss.backward()
    expected.loss.backward()
    for key, value in gradients(dense).items():
        torch.testing.assert_close(gradients(sparse)[key], value, rtol=1e-4, atol=1e-6)


def test_sparse_without_labels_is_dense():
    model = randomise(ours(sparse_prediction=True))
    torch.testing.assert_close(model(**batch()).logits, randomise(ours())(**batch()).logits)


def test_masked_positions_are_checked():
    positions = torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="sparse_prediction=True"):
        ours()(**batch(), masked_positions=positions)
    with pytest.raises(ValueError, match="must be aligned"):
        ours(sparse_prediction=True)(**batch(), masked_positions=positions, labels=torch.zeros(3, 3).long())
    with pytest.raises(ValueError, match="masked_positions have 2 rows, the batch has 3"):
        ours(sparse_prediction=True)(**batch(), masked_positions=positions[:2], labels=positions[:2])


@pytest.mark.parametrize("sparse", [False, True])
def test_loss_is_a_sum_divided_by_the_global_count(sparse):
    model = randomise(ours(sparse_prediction=sparse))
    inputs, labels = batch(padded=False), mlm_labels(batch()["input_ids"])
    whole = model(**inputs, labels=labels)
    scores = randomise(ours())(**inputs).logits
    expected = F.cross_entropy(scores[labels != -100], labels[labels != -100])
    torch.testing.assert_close(whole.loss, expected)
    count = (labels != -100).sum()
    for number in (count, int(count)):
        rows = [{name: value[i : i + 1] for name, value in inputs.items()} for i in range(3)]
        pieces = [
            model(**row, labels=labels[i : i + 1], num_items_in_batch=number) for i, row in enumerate(rows)
        ]
        torch.testing.assert_close(sum(piece.loss for piece in pieces), whole.loss)


@pytest.mark.parametrize("sparse", [False, True])
def test_batch_without_masks_has_no_loss_and_no_gradient(sparse):
    model = ours(sparse_prediction=sparse)
    inputs = batch()
    loss = model(**inputs, labels=torch.full_like(inputs["input_ids"], -100)).loss
    assert loss.item() == 0
    loss.backward()
    assert gradients(model)
    assert all(gradient.eq(0).all() for gradient in gradients(model).values())


def test_loss_is_computed_in_float32():
    model = randomise(ours()).to(torch.bfloat16)
    inputs, labels = batch(), mlm_labels(batch()["input_ids"])
    outputs = model(**inputs, labels=labels)
    assert outputs.logits.dtype == torch.bfloat16
    expected = F.cross_entropy(outputs.logits.float()[labels != -100], labels[labels != -100])
    torch.testing.assert_close(outputs.loss, expected)


def test_initial_loss_is_that_of_a_uniform_guess():
    inputs = batch()
    loss = ours()(**inputs, labels=inputs["input_ids"]).loss
    assert loss.item() == pytest.approx(math.log(SIZES["vocab_size"]), abs=0.1)


@pytest.mark.parametrize("head", HEADS)
def test_who_divides_by_the_global_count(head):
    assert getattr(bert_ln, f"BertLn{head}").accepts_loss_kwargs is (head == "ForMaskedLM")


def trainer_log(head, sparse, steps, folder):
    """Loss and gradient norm of one update on 8 rows with 0 to 7 masks, accumulated over `steps`."""
    model = randomise(
        ours(head, sparse_prediction=sparse, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    inputs = batch(rows=8, padded=False)
    masks = torch.where(torch.arange(12) < torch.arange(8)[:, None], inputs["input_ids"], -100)
    labels = masks if head == "ForMaskedLM" else torch.arange(8) % 2
    rows = [{name: value[i] for name, value in inputs.items()} | {"labels": labels[i]} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8 // steps, gradient_accumulation_steps=steps,
        max_steps=1, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    log = trainer.state.log_history[0]
    return log["loss"], float(log["grad_norm"])


@pytest.mark.parametrize(("head", "sparse"), [("ForMaskedLM", True), ("ForSequenceClassification", False)])
def test_accumulation_under_trainer_changes_nothing(tmp_path, head, sparse):
    whole, accumulated = (trainer_log(head, sparse, steps, tmp_path) for steps in (1, 4))
    assert accumulated == pytest.approx(whole, rel=1e-4)


# --- several documents in one block -------------------------------------------------------------------------


def documents(attention, placement="pre"):
    """A model, a block of two documents and padding, the document ids, positions and padding mask."""
    model = randomise(ours("Model", placement, attn_implementation=attention))
    ids = batch(rows=2, padded=False)["input_ids"]
    which = torch.tensor([[0] * 5 + [1] * 7, [3] * 4 + [2] * 5 + [0] * 3])
    positions = torch.tensor([[*range(5), *range(7)], [*range(4), *range(5), *range(3)]])
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return model, {"input_ids": ids, "document_ids": which, "position_ids": positions, "attention_mask": mask}


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_documents_of_a_block_are_isolated(attention, placement):
    model, block = documents(attention, placement)
    states = model(**block).last_hidden_state
    assert states.isfinite().all()
    for row, spans in enumerate([[(0, 5), (5, 12)], [(0, 4), (4, 9)]]):
        for start, end in spans:
            alone = model(block["input_ids"][row : row + 1, start:end]).last_hidden_state[0]
            torch.testing.assert_close(states[row, start:end], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTION)
def test_another_document_changes_nothing(attention):
    model, block = documents(attention)
    states = model(**block).last_hidden_state
    changed = block["input_ids"].clone()
    changed[0, 5:] = (changed[0, 5:] + 9) % SIZES["vocab_size"]
    other = model(**{**block, "input_ids": changed}).last_hidden_state
    assert torch.equal(other[0, :5], states[0, :5])
    assert (other[0, 5:] - states[0, 5:]).abs().max() > 1e-2
    together = {**block, "document_ids": torch.zeros_like(changed)}
    leaked = (
        model(**{**together, "input_ids": changed}).last_hidden_state - model(**together).last_hidden_state
    )
    assert leaked[0, :5].abs().max() > 1e-3  # the check above can fail


@pytest.mark.parametrize("head", HEADS[1:])
def test_document_ids_pass_through_the_heads(head):
    model, inputs, seen = randomise(ours(head)), head_inputs(head), []
    model.bert.encoder.register_forward_hook(lambda _, __, output: seen.append(output.last_hidden_state))
    model(**inputs, document_ids=inputs["token_type_ids"])
    flat = {name: inputs[name].flatten(0, -2) for name in batch()}
    model.bert(**flat, document_ids=flat["token_type_ids"])
    model.bert(**flat)
    assert torch.equal(seen[0], seen[1])
    assert not torch.allclose(seen[0], seen[2], atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_document_ids_of_any_integer_type(dtype):
    model, block = documents("sdpa")
    expected = model(**block).last_hidden_state
    block["document_ids"] = (block["document_ids"] + torch.iinfo(dtype).max - 3).to(dtype)
    torch.testing.assert_close(model(**block).last_hidden_state, expected, rtol=0, atol=0)


def test_one_document_equals_no_ids():
    model, block = documents("sdpa")
    mask, ids = block["attention_mask"], block["input_ids"]
    plain = model(ids, attention_mask=mask).last_hidden_state
    same = model(ids, attention_mask=mask, document_ids=torch.zeros_like(ids)).last_hidden_state
    torch.testing.assert_close(same[mask.bool()], plain[mask.bool()])


@pytest.mark.slow
@torch.no_grad()  # flex attention has no backward on CPU
def test_flex_attention_isolates_too():
    model, block = documents("sdpa")
    model.set_attn_implementation("flex_attention")
    assert model.config._attn_implementation == "flex_attention"
    expected = documents("sdpa")[0](**block).last_hidden_state
    torch.testing.assert_close(model(**block).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_isolation_is_refused_where_it_would_be_wrong():
    model, block = documents("sdpa")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"document_ids need .* got 'flash_attention_2'"):
        model(**block)
    with pytest.raises(ValueError, match="is_decoder=True"):
        ours("Model", is_decoder=True)(**block)
    first = {"input_ids": block["input_ids"][:1], "document_ids": block["document_ids"][:1]}
    with pytest.raises(ValueError, match=r"attention_mask \[batch, length\], got shape \(1, 1, 12, 12\)"):
        ours("Model")(**first, attention_mask=torch.ones(1, 1, 12, 12))


# --- decoding and cross-attention ---------------------------------------------------------------------------


def decoder_inputs():
    states = torch.randn(3, 7, SIZES["hidden_size"], generator=torch.Generator().manual_seed(4))
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 5:] = 0
    return {**batch(padded=False), "encoder_hidden_states": states, "encoder_attention_mask": mask}


def test_post_ln_decoder_equals_stock():
    model, reference = parallel(
        "Model", is_decoder=True, add_cross_attention=True, attn_implementation="eager"
    )
    wanted = {"output_attentions": True, "output_hidden_states": True}
    outputs, expected = model(**decoder_inputs(), **wanted), reference(**decoder_inputs(), **wanted)
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-6)
    for mine, theirs in zip(outputs.cross_attentions, expected.cross_attentions, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_positional_arguments_are_those_of_stock():
    model, reference = parallel("Model", is_decoder=True, add_cross_attention=True)
    inputs = decoder_inputs()
    first = [inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")]
    cross = [inputs[name] for name in ("encoder_hidden_states", "encoder_attention_mask")]
    outputs, expected = (m(*first, None, None, *cross, None) for m in (model, reference))
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-6)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_decoder_is_causal_and_caches(placement):
    model = randomise(ours("Model", placement, is_decoder=True, add_cross_attention=True))
    inputs = decoder_inputs()
    states = model(**inputs).last_hidden_state
    changed = {**inputs, "input_ids": inputs["input_ids"].clone()}
    changed["input_ids"][:, 8:] = 5
    torch.testing.assert_close(model(**changed).last_hidden_state[:, :8], states[:, :8])
    cross = {name: value for name, value in inputs.items() if name.startswith("encoder")}
    first = model(inputs["input_ids"][:, :8], token_type_ids=inputs["token_type_ids"][:, :8], **cross)
    rest = model(
        inputs["input_ids"][:, 8:],
        token_type_ids=inputs["token_type_ids"][:, 8:],
        past_key_values=first.past_key_values,
        **cross,
    )
    torch.testing.assert_close(rest.last_hidden_state, states[:, 8:], rtol=1e-4, atol=1e-5)


def test_pre_ln_cross_attention_is_a_branch():
    model = randomise(ours("Model", "pre", is_decoder=True, add_cross_attention=True))
    layer, inputs = model.encoder.layer[0], decoder_inputs()
    memory, x = inputs["encoder_hidden_states"], torch.randn(3, 6, SIZES["hidden_size"])
    cross = layer.crossattention
    middle = layer.attention(x)[0]
    attended = cross.self(cross.output.pre_norm(middle), encoder_hidden_states=memory)[0]
    after_cross = middle + cross.output.dense(attended)
    expected = layer.feed_forward_chunk(after_cross)
    torch.testing.assert_close(layer(x, None, memory), expected)


# --- what the library offers --------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS[1:])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_head_trains(head, placement):
    model = ours(head, placement).train()
    loss = model(**head_inputs(head)).loss
    assert loss.isfinite()
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize(("placement", "isolated", "reentrant"), [
    ("post", True, False), ("post", False, True), ("pre", True, True), ("pre", False, False),
])  # fmt: skip
def test_gradient_checkpointing_changes_nothing(placement, isolated, reentrant):
    inputs = head_inputs("ForMaskedLM")
    if isolated:
        inputs["document_ids"] = inputs["token_type_ids"]
    plain, checkpointed = (ours("ForMaskedLM", placement).train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()  # the reentrant kind needs it
    runs = []
    checkpointed.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_: runs.append(1))
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        model(**inputs).loss.backward()
    assert len(runs) == 2  # once forward, once again for the gradients
    for name, value in gradients(plain).items():
        torch.testing.assert_close(gradients(checkpointed)[name], value)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_attention_kernels_agree(placement):
    eager, sdpa = (randomise(ours("Model", placement, attn_implementation=name)) for name in ATTENTION)
    assert eager.config._attn_implementation == "eager" and sdpa.config._attn_implementation == "sdpa"
    torch.testing.assert_close(eager(**batch())[0], sdpa(**batch())[0], rtol=1e-4, atol=1e-5)


def test_padding_does_not_matter():
    model = randomise(ours("Model"))
    inputs = batch()
    states = model(**inputs).last_hidden_state[-1, :-4]
    alone = model(**{name: value[-1:, :-4] for name, value in inputs.items()}).last_hidden_state[0]
    torch.testing.assert_close(states, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_compiles_as_one_graph(placement):
    torch._dynamo.reset()
    model = randomise(ours("Model", placement))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = batch()
    torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)
    document_ids = inputs["token_type_ids"]
    torch.testing.assert_close(
        compiled(**inputs, document_ids=document_ids)[0],
        model(**inputs, document_ids=document_ids)[0],
        rtol=1e-4,
        atol=1e-5,
    )


def test_static_sparse_prediction_compiles_as_one_graph():
    torch._dynamo.reset()
    model = randomise(ours(sparse_prediction=True))
    inputs = batch()
    positions, targets = capacity_batch(mlm_labels(inputs["input_ids"]), capacity=10)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    arguments = {
        **inputs,
        "masked_positions": positions,
        "labels": targets,
        "num_items_in_batch": torch.tensor(11),
    }
    loss = compiled(**arguments).loss
    loss.backward()
    torch.testing.assert_close(loss, model(**arguments).loss)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(placement, dtype):
    model = ours("ForMaskedLM", placement).to(dtype)
    reference = ours("ForMaskedLM", placement)
    inputs = head_inputs("ForMaskedLM")
    outputs = model(**inputs, document_ids=inputs["token_type_ids"])
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    expected = reference(**inputs, document_ids=inputs["token_type_ids"])
    torch.testing.assert_close(outputs.logits.float(), expected.logits, rtol=0.05, atol=0.02)
    outputs.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.slow
def test_default_compiler():
    """The static sparse path with isolated documents, as it trains, against the uncompiled model."""
    torch._dynamo.reset()
    model = randomise(ours(sparse_prediction=True))
    inputs = batch()
    positions, targets = capacity_batch(mlm_labels(inputs["input_ids"]), capacity=10)
    arguments = {
        **inputs,
        "masked_positions": positions,
        "labels": targets,
        "document_ids": inputs["token_type_ids"],
    }
    losses = []
    for run in (torch.compile(model, fullgraph=True), model):
        losses.append(run(**arguments).loss)
        losses[-1].backward()
        losses.append({name: gradient.clone() for name, gradient in gradients(model).items()})
        model.zero_grad()
    torch.testing.assert_close(losses[:2], losses[2:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice"])
def test_dropout_of_the_classifier(head):
    assert ours(head, classifier_dropout=0.7).dropout.p == 0.7
    assert ours(head, hidden_dropout_prob=0.3).dropout.p == 0.3


def test_autocast():
    model, inputs = ours(), head_inputs("ForMaskedLM")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs, document_ids=inputs["token_type_ids"]).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, model(**inputs, document_ids=inputs["token_type_ids"]).loss, rtol=0.01, atol=0.01
    )


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
def test_decoder_is_tied_to_the_embeddings(head):
    model = ours(head)
    predictions = model.cls.predictions
    assert predictions.decoder.weight is model.get_input_embeddings().weight
    assert predictions.decoder.bias is predictions.bias
    untied = ours(head, tie_word_embeddings=False)
    assert untied.cls.predictions.decoder.weight is not untied.get_input_embeddings().weight


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
@pytest.mark.parametrize("more", [3, -11])
def test_resized_vocabulary(tmp_path, placement, head, more):
    model, inputs = randomise(ours(head, placement)), batch()
    inputs["input_ids"] %= SIZES["vocab_size"] - 11
    before = model(**inputs)[0]
    model.resize_token_embeddings(SIZES["vocab_size"] + more)
    after = model(**inputs)[0]
    assert after.shape[-1] == SIZES["vocab_size"] + more == model.config.vocab_size
    shared = SIZES["vocab_size"] + min(more, 0)
    torch.testing.assert_close(after[..., :shared], before[..., :shared])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(**inputs)[0], after)
    for resized in (model, again):
        predictions = resized.cls.predictions
        assert predictions.decoder.weight is resized.get_input_embeddings().weight
        assert len(predictions.bias) == len(predictions.decoder.bias) == SIZES["vocab_size"] + more


def test_embeddings_instead_of_ids():
    model, inputs = randomise(ours("Model")), batch()
    ids = inputs.pop("input_ids")
    by_ids = model(ids, **inputs, document_ids=inputs["token_type_ids"])[0]
    vectors = model.get_input_embeddings()(ids)
    by_vectors = model(inputs_embeds=vectors, **inputs, document_ids=inputs["token_type_ids"])[0]
    torch.testing.assert_close(by_vectors, by_ids, rtol=0, atol=0)


def test_loaded_values_are_kept(tmp_path):
    randomise(ours("Model")).save_pretrained(tmp_path)
    model = BertLnModel.from_pretrained(tmp_path)
    assert not model.encoder.final_norm.weight.eq(1).all()
    assert not model.encoder.layer[0].output.pre_norm.bias.eq(0).all()
    half = BertLnForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.bert.encoder.final_norm.weight.dtype == torch.bfloat16
