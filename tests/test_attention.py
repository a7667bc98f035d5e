"""The window of attention against brute force; norms on queries and keys against their formulas."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from model_fixtures import SIZES, batch, head_inputs, ours, randomise
from torch.nn import functional as F

from bert_ln import BertLnConfig, BertLnModel

KERNELS = ("eager", "sdpa")
LENGTH, LAYERS = 10, SIZES["num_hidden_layers"]
# A letter is a document, a dot is padding. What the model is told of each: documents, padding, both.
BLOCKS = {
    "nothing": ("aaaaaaaaaa", "aaaaaaaaaa"),
    "padding": ("aaaaaaa...", "...aaaaaaa", "a.........", "aaaa..aaaa"),
    "documents": ("aaabbbbccc", "abbbbbbbbb", "aabbbaabbb"),
    "both": ("aaaabbb...", "..aaabbbbb", ".abbbbbc..", "aaaaaaaaaa"),
}
WINDOWS = {
    "band": {"attention_window_global": "none"},
    "causal": {"attention_window_global": "none", "attention_window_causal": True},
    "cls": {"attention_window_global": "cls"},
    "last_layer": {"attention_window_global": "last_layer"},
    "causal last_layer": {"attention_window_global": "last_layer", "attention_window_causal": True},
}


def windowed(window, head="Model", **settings):
    """Without the large weights, influence at the end of the reach would be lost in rounding."""
    settings = {"initializer_range": 0.3, **settings}
    return randomise(ours(head, attention_window=window, **settings))


def inputs_of(kind, seed=2):
    rows = BLOCKS[kind]
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(5, SIZES["vocab_size"], (len(rows), LENGTH), generator=generator)}
    if kind in ("padding", "both"):
        inputs["attention_mask"] = torch.tensor([[int(letter != ".") for letter in row] for row in rows])
    if kind in ("documents", "both"):
        # Padding has the number of a real document: only the mask tells it.
        inputs["document_ids"] = torch.tensor([[".abc".index(c) or 1 for c in row] for row in rows])
    return inputs


def allowed(row, layer, window, attention_window_global, attention_window_causal=False):
    """Which token of `row` sees which in a layer, `[length][length]`, as bool."""
    is_bound = attention_window_global != "last_layer" or layer < LAYERS - 1

    def sees(i, j):
        if row[i] != row[j]:
            return False
        first = row.index(row[i])
        distance = i - j if attention_window_causal else abs(i - j)
        has_global = attention_window_global == "cls" and first in (i, j)
        return has_global or not is_bound or 0 <= distance <= window

    return torch.tensor([[sees(i, j) for j in range(LENGTH)] for i in range(LENGTH)])


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("how", WINDOWS)
def test_weights_are_zero_exactly_where_brute_force_says(how, kind, window):
    model = windowed(window, attn_implementation="eager", **WINDOWS[how])
    attentions = model(**inputs_of(kind), output_attentions=True).attentions
    assert len(attentions) == LAYERS
    for layer, weights in enumerate(attentions):  # [batch, heads, length, length]
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
        for row, of_row in zip(BLOCKS[kind], weights, strict=True):
            real = torch.tensor([letter != "." for letter in row])
            expected = allowed(row, layer, window, **WINDOWS[how])[real]
            assert torch.equal(of_row[:, real] > 0, expected.expand(len(of_row), -1, -1))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("how", WINDOWS)
def test_what_a_token_reaches(how, kernel):
    """One more row for each token that is changed: the states that change with it are those in its reach."""
    row, window = "aaaaaabbbb", 1
    model = windowed(window, attn_implementation=kernel, **WINDOWS[how])
    ids = inputs_of("nothing")["input_ids"][:1].repeat(LENGTH + 1, 1)
    ids[1:] = torch.where(torch.eye(LENGTH, dtype=torch.bool), ids[1:] % 50 + 6, ids[1:])
    documents = torch.tensor([["ab".index(letter) for letter in row]]).expand_as(ids)
    states = model(ids, document_ids=documents).last_hidden_state
    changes = (states[1:] - states[0]).abs().amax(-1).T  # [of this token, with that one]
    reach = torch.eye(LENGTH)
    for layer in range(LAYERS):
        reach = allowed(row, layer, window, **WINDOWS[how]).float() @ reach
    assert (changes[reach > 0] > 1e-4).all()
    assert (changes[reach == 0] < 1e-6).all()


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("how", ["cls", "last_layer"])
def test_kernels_agree_on_a_window(how, kind):
    """And no state is NaN, that of padding included."""
    eager, sdpa = (windowed(2, attn_implementation=name, **WINDOWS[how]) for name in KERNELS)
    states = eager(**inputs_of(kind)).last_hidden_state
    assert states.isfinite().all()
    torch.testing.assert_close(sdpa(**inputs_of(kind)).last_hidden_state, states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("how", [how for how in WINDOWS if "causal" not in how])
def test_window_as_long_as_the_text_is_full_attention(how, kernel):
    for kind, rows in BLOCKS.items():
        inputs = inputs_of(kind)
        real = torch.tensor([[letter != "." for letter in row] for row in rows])
        full = windowed(None, attn_implementation=kernel)(**inputs).last_hidden_state
        for window, is_full in ((LENGTH - 1, True), (LENGTH + 90, True), (2, False)):
            model = windowed(window, attn_implementation=kernel, **WINDOWS[how])
            states = model(**inputs).last_hidden_state
            assert torch.allclose(states[real], full[real], rtol=1e-4, atol=1e-5) is is_full


@pytest.mark.slow
@torch.no_grad()  # flex attention has no backward on CPU
@pytest.mark.parametrize("how", WINDOWS)
def test_flex_attention_has_the_window_too(how):
    for kind in BLOCKS:
        inputs, states = inputs_of(kind), []
        for kernel in ("sdpa", "flex_attention"):
            model = windowed(2, attn_implementation=kernel, qk_norm="l2", **WINDOWS[how])
            states.append(model(**inputs).last_hidden_state)
        torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_window_and_query_norm_compile_as_one_graph():
    torch._dynamo.reset()
    model = windowed(2, qk_norm="l2")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for kind in BLOCKS:
        inputs = inputs_of(kind)
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)


def test_all_padding_is_finite():
    inputs = inputs_of("nothing")
    inputs["attention_mask"] = torch.zeros_like(inputs["input_ids"])
    inputs["attention_mask"][0, :4] = 1
    model = windowed(2).train()
    states = model(**inputs).last_hidden_state
    assert states.isfinite().all()
    states[0, :4].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("settings", "words"), [
    ({"attention_window": 3, "attention_window_global": "none", "is_decoder": True}, "is_decoder=False"),
    ({"attention_window": 0}, "attention_window=0 must be None or at least 1"),
    ({"attention_window": -2}, "attention_window=-2 must be None or at least 1"),
    ({"attention_window": 3, "attention_window_causal": True}, "take 'none' or 'last_layer'"),
    ({"attention_window_global": "none"}, "attention_window_global='none' has no effect"),
    ({"attention_window_causal": True}, "attention_window_causal=True has no effect"),
])  # fmt: skip
def test_window_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ours(**settings)


@pytest.mark.parametrize("settings", [{"attention_window_global": "first"}, {"attention_window": 2.5}])
def test_window_is_misspelt(settings):
    with pytest.raises(StrictDataclassError):
        BertLnConfig(**settings)


def test_window_is_refused_by_kernels_and_masks_that_have_none():
    model, inputs = windowed(3), inputs_of("padding")
    with pytest.raises(ValueError, match=r"attention_window need an attention_mask \[batch, length\]"):
        model(inputs["input_ids"], attention_mask=torch.ones(4, 1, LENGTH, LENGTH))
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attention_window need .* got 'flash_attention_2'"):
        model(**inputs)


def test_window_in_multiple_choice():
    inputs = head_inputs("ForMultipleChoice")
    inputs["document_ids"] = inputs["token_type_ids"]
    model = windowed(2, "ForMultipleChoice")
    logits = model(**inputs).logits
    assert logits.shape == (3, 2)
    for choice in range(2):
        flat = {name: value[:, choice] for name, value in inputs.items() if name != "labels"}
        score = model.classifier(model.bert(**flat).pooler_output)
        torch.testing.assert_close(logits[:, choice], score.squeeze(-1), rtol=1e-4, atol=1e-5)
    full = windowed(None, "ForMultipleChoice")
    assert not torch.allclose(full(**inputs).logits, logits, atol=1e-3)


def test_window_may_be_put_on_and_taken_off_at_loading(tmp_path):
    """It has no weights."""
    for saved, loaded in ((None, 2), (2, None), (2, 3)):
        windowed(saved).save_pretrained(tmp_path)
        model = BertLnModel.from_pretrained(tmp_path, attention_window=loaded)
        expected = windowed(loaded)(**inputs_of("both")).last_hidden_state
        torch.testing.assert_close(model(**inputs_of("both")).last_hidden_state, expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_window_under_gradient_checkpointing():
    gradients = []
    for checkpointed in (False, True):
        model = windowed(2, "ForMaskedLM", attention_window_global="last_layer", use_cache=False).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        model(**head_inputs("ForMaskedLM")).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


# --- norms on queries and keys ------------------------------------------------------------------------------

QK_NORMS = ("l2", "layer_norm", "rms_norm")
WIDTH = SIZES["hidden_size"] // SIZES["num_attention_heads"]


def scores_of(kind, queries, keys, query_norm, key_norm):
    """Written from the formula, heads last but one: `[batch, heads, length, length]`."""

    def centred(v):
        return v - v.mean(-1, keepdim=True)

    def scaled(v, p):
        return p["weight"] * v / (v**2).mean(-1, keepdim=True).sqrt()

    if kind == "l2":
        unit = [v / (v**2).sum(-1, keepdim=True).sqrt() for v in (queries, keys)]
        return query_norm["scale"] * torch.einsum("bihd,bjhd->bhij", *unit)
    if kind == "layer_norm":
        queries = scaled(centred(queries), query_norm) + query_norm["bias"]
        keys = scaled(centred(keys), key_norm) + key_norm["bias"]
    else:
        queries, keys = scaled(queries, query_norm), scaled(keys, key_norm)
    return torch.einsum("bihd,bjhd->bhij", queries, keys) / math.sqrt(WIDTH)


@pytest.mark.parametrize("kind", QK_NORMS)
def test_attention_is_the_formula(kind):
    attention = windowed(None, qk_norm=kind, attn_implementation="eager").double().encoder.layer[0].attention
    attention, x = attention.self, torch.randn(2, 7, SIZES["hidden_size"], dtype=torch.float64)
    queries, keys, values = (
        F.linear(x, m.weight, m.bias).view(2, 7, -1, WIDTH)
        for m in (attention.query, attention.key, attention.value)
    )
    norms = [dict(m.norm.named_parameters()) for m in (attention.query, attention.key)]
    expected = scores_of(kind, queries, keys, *norms).softmax(-1)
    output, weights = attention(x)
    torch.testing.assert_close(weights, expected)
    mixed = torch.einsum("bhij,bjhd->bihd", expected, values).flatten(-2)
    torch.testing.assert_close(output, mixed)


@pytest.mark.parametrize("placement", ["post", "pre"])
@pytest.mark.parametrize("kind", QK_NORMS)
def test_kernels_agree_on_query_norms(kind, placement):
    eager, sdpa = (
        randomise(ours("Model", placement, qk_norm=kind, attn_implementation=name)) for name in KERNELS
    )
    torch.testing.assert_close(eager(**batch())[0], sdpa(**batch())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", QK_NORMS)
def test_length_of_queries_and_keys_does_not_matter(kind):
    model = ours("Model", qk_norm=kind)
    states = model(**batch()).last_hidden_state
    for layer in model.encoder.layer:
        layer.attention.self.query.weight.data.mul_(7)
        layer.attention.self.key.weight.data.mul_(0.3)
    torch.testing.assert_close(model(**batch()).last_hidden_state, states, rtol=1e-3, atol=1e-4)
    plain = ours("Model")
    assert not torch.allclose(plain(**batch()).last_hidden_state, states, atol=1e-4)


@pytest.mark.parametrize(("settings", "length"), [
    ({}, SIZES["max_position_embeddings"]), ({"qk_norm_length": 100}, 100), ({"qk_norm_length": 2}, 2),
    ({"max_position_embeddings": 512}, 512),
])  # fmt: skip
def test_first_scale(settings, length):
    model = ours("Model", qk_norm="l2", **settings)
    scales = [value for name, value in model.named_parameters() if name.endswith("query.norm.scale")]
    assert len(scales) == LAYERS
    assert all(g.shape == (1,) and g.item() == pytest.approx(math.log2(length**2 - length)) for g in scales)


@pytest.mark.parametrize("kind", QK_NORMS)
def test_projections_keep_their_names_and_first_values(kind):
    plain, normed = (ours(qk_norm=qk_norm).state_dict() for qk_norm in (None, kind))
    added = {name.split("attention.self.")[1] for name in normed.keys() - plain.keys()}
    own = {"l2": ("query.norm.scale",), "rms_norm": ("query.norm.weight", "key.norm.weight")}
    layer_norm = tuple(f"{which}.norm.{name}" for which in ("query", "key") for name in ("weight", "bias"))
    assert added == set(own.get(kind, layer_norm))
    assert plain.keys() <= normed.keys()
    assert all(torch.equal(normed[name], value) for name, value in plain.items())


@pytest.mark.parametrize("kind", QK_NORMS)
def test_every_query_norm_learns(kind):
    model = ours(qk_norm=kind).train()
    model(**head_inputs("ForMaskedLM")).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if ".self." in name and ".norm." in name}
    assert found
    # A bias on all queries or keys need not matter: softmax does not see what it adds to a whole row.
    assert all(g.abs().max() > 0 for name, g in found.items() if not name.endswith("key.norm.bias"))


@pytest.mark.parametrize("kind", QK_NORMS)
def test_loaded_query_norms_are_kept(tmp_path, kind):
    # The length sets first values only: it must not come back.
    model = randomise(ours(qk_norm=kind, **({"qk_norm_length": 9} if kind == "l2" else {})))
    model.save_pretrained(tmp_path)
    again, info = BertLnModel.from_pretrained(tmp_path, output_loading_info=True)
    assert again.config.qk_norm == kind
    assert all("pooler" in name for name in info["missing_keys"])
    state = model.bert.state_dict()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in state.items())


@pytest.mark.parametrize("kind", [None, *QK_NORMS])
def test_weights_of_another_query_norm_are_refused(tmp_path, kind):
    ours("Model", qk_norm=kind).save_pretrained(tmp_path)
    other = "l2" if kind is None else None
    with pytest.raises(ValueError, match="holds the weights of another architecture"):
        BertLnModel.from_pretrained(tmp_path, qk_norm=other)


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("kind", QK_NORMS)
def test_decoder_with_a_cache_equals_all_at_once(kind, cross):
    model = windowed(None, qk_norm=kind, is_decoder=True, add_cross_attention=cross)
    ids = batch(padded=False)["input_ids"]
    memory = {"encoder_hidden_states": torch.randn(3, 5, SIZES["hidden_size"])} if cross else {}
    states = model(ids, **memory).last_hidden_state
    assert hasattr(model.encoder.layer[0].attention.self.key, "norm")
    cache, pieces = None, []
    for part in ids.split((5, 1, 6), dim=1):
        output = model(part, past_key_values=cache, use_cache=True, **memory)
        cache = output.past_key_values
        pieces.append(output.last_hidden_state)
    torch.testing.assert_close(torch.cat(pieces, dim=1), states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", QK_NORMS)
def test_query_norms_in_half_precision(kind, kernel):
    model, inputs = ours("Model", qk_norm=kind, attn_implementation=kernel), batch()
    expected = model(**inputs).last_hidden_state
    attention, dtypes = model.encoder.layer[0].attention.self, []
    for projection in (attention.query, attention.key, attention.value):
        projection.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model(**inputs).last_hidden_state
    assert dtypes == [torch.bfloat16] * 3  # not all kernels take a mixture
    torch.testing.assert_close(states.float(), expected, rtol=0.05, atol=0.05)
    half = model.to(torch.bfloat16)(**inputs).last_hidden_state
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("settings", "words"), [
    ({"qk_norm": "l2", "placement": "hybrid_norm"}, "qk_norm='l2' must be None"),
    ({"qk_norm_length": 9}, "qk_norm_length=9 has no effect"),
    ({"qk_norm": "rms_norm", "qk_norm_length": 9}, "qk_norm_length=9 has no effect without qk_norm='l2'"),
    ({"qk_norm": "l2", "qk_norm_length": 1}, "qk_norm_length=1 must be at least 2"),
])  # fmt: skip
def test_query_norm_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        ours(**settings)


def test_query_norm_is_misspelt():
    with pytest.raises(StrictDataclassError, match="did you mean 'rms_norm'"):
        BertLnConfig(qk_norm="rmsnorm")
