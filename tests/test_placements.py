"""Every placement against its formula, its limits, its first weights, and what is refused."""

import json
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from model_fixtures import SIZES, batch, head_inputs, ours, randomise
from torch import nn
from torch.nn import functional as F
from transformers import BertModel

from bert_ln import BertLnConfig, BertLnForMaskedLM, BertLnModel
from bert_ln.norms import NORM_CLASSES, NORMS
from bert_ln.placements import FEED_FORWARD, PLACEMENTS, build_branch
from recipes.optimization import split_parameters

LAYERS = 4  # so that Mix-LN has a layer of Post-LN
HIDDEN, WIDE, HEADS = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["num_attention_heads"]
HEAD = HIDDEN // HEADS


def build(placement, head="Model", **settings):
    return ours(head, placement, **{"num_hidden_layers": LAYERS, **settings})


def arbitrary(placement, head="Model", **settings):
    """A model in float64 in which no parameter, gains and factors included, has its first value."""
    return randomise(build(placement, head, **settings).double())


# --- the formulas -------------------------------------------------------------------------------------------


class Layer:
    """The parts of one layer, from nothing but its weights."""

    def __init__(self, state, index, is_real):
        prefix = f"encoder.layer.{index}."
        self.state = {name.removeprefix(prefix): v for name, v in state.items() if name.startswith(prefix)}
        self.index, self.is_real = index, is_real

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def norm(self, name, x):
        return normalise(self.state, name, x)

    def heads(self, x, qkv_norm=False):
        """All heads side by side, before the output projection."""

        def split(name):
            heads = self.linear(f"attention.self.{name}", x).unflatten(-1, (HEADS, HEAD))
            return (self.norm(f"attention.self.{name}.norm", heads) if qkv_norm else heads).transpose(1, 2)

        scores = split("query") @ split("key").mT / math.sqrt(HEAD)  # [batch, heads, length, length]
        scores = scores.masked_fill(~self.is_real[:, None, None, :], -math.inf)
        return (scores.softmax(-1) @ split("value")).transpose(1, 2).flatten(-2)

    def attention(self, x, **options):
        return self.linear("attention.output.dense", self.heads(x, **options))

    def activated(self, x):
        return F.gelu(self.linear("intermediate.dense", x))

    def ffn(self, x):
        return self.linear("output.dense", self.activated(x))


def normalise(state, name, x):
    """LayerNorm, or where there is no bias RMSNorm."""
    gain = state[f"{name}.weight"]
    if f"{name}.bias" not in state:
        return gain * x / (x.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    return F.layer_norm(x, gain.shape, gain, state[f"{name}.bias"], eps=1e-12)


def post(layer, x):
    h = layer.norm("attention.output.LayerNorm", x + layer.attention(x))
    return layer.norm("output.LayerNorm", h + layer.ffn(h))


def pre(layer, x, **options):
    h = x + layer.attention(layer.norm("attention.output.pre_norm", x), **options)
    return h + layer.ffn(layer.norm("output.pre_norm", h))


def sandwich(layer, x):
    h = x + layer.norm(
        "attention.output.post_norm", layer.attention(layer.norm("attention.output.pre_norm", x))
    )
    return h + layer.norm("output.post_norm", layer.ffn(layer.norm("output.pre_norm", h)))


def sub_ln(layer, x):
    heads = layer.heads(layer.norm("attention.output.pre_norm", x))
    h = x + layer.linear("attention.output.dense", layer.norm("attention.output.inner_norm", heads))
    wide = layer.activated(layer.norm("output.pre_norm", h))
    return h + layer.linear("output.dense", layer.norm("output.inner_norm", wide))


def normformer(layer, x, residual_scale=False):
    heads = layer.heads(layer.norm("attention.output.pre_norm", x))
    scales = layer.state["attention.output.head_scale"].flatten().repeat_interleave(HEAD)
    attended = layer.linear("attention.output.dense", scales * heads)
    h = x + layer.norm("attention.output.post_norm", attended)
    wide = layer.norm("output.inner_norm", layer.activated(layer.norm("output.pre_norm", h)))
    skip = layer.state["output.residual_scale"] * h if residual_scale else h
    return skip + layer.linear("output.dense", wide)


def deep_norm(layer, x, alpha=(2 * LAYERS) ** 0.25):
    h = layer.norm("attention.output.post_norm", alpha * x + layer.attention(x))
    return layer.norm("output.post_norm", alpha * h + layer.ffn(h))


def b2t(layer, x):
    h = layer.norm("attention.output.post_norm", x + layer.attention(x))
    return layer.norm("output.post_norm", x + h + layer.ffn(h))


def admin(layer, x):
    attention_omega, ffn_omega = layer.state["attention.output.omega"], layer.state["output.omega"]
    h = layer.norm("attention.output.post_norm", attention_omega * x + layer.attention(x))
    return layer.norm("output.post_norm", ffn_omega * h + layer.ffn(h))


def recursive_skip(layer, x, order=2, shared=False):
    def recurse(branch, x, y):
        for step in range(order):
            y = layer.norm(f"{branch}.post_norms.{0 if shared else step}", x + y)
        return y

    h = recurse("attention.output", x, layer.attention(x))
    return recurse("output", h, layer.ffn(h))


def mix_ln(layer, x, post_layers=1):
    return post(layer, x) if layer.index < post_layers else pre(layer, x)


def hybrid_norm(layer, x, star=False):
    if star and layer.index == 0:
        return pre(layer, x, qkv_norm=True)
    n = layer.norm("output.stream_norm", x + layer.attention(x, qkv_norm=True))
    return n + layer.ffn(n)


def re_zero(layer, x):
    a = layer.state["attention.output.residual_weight"]
    h = x + a * layer.attention(x)
    return h + a * layer.ffn(h)


def t_fixup(layer, x):
    h = x + layer.attention(x)
    return h + layer.ffn(h)


def residual_dual(layer, streams):
    x, s = streams
    f = layer.attention(x)
    x, s = layer.norm("attention.output.post_norm", x + f), s + f
    f = layer.ffn(x)
    return layer.norm("output.post_norm", x + f), s + f


def final(state, x):
    return normalise(state, "encoder.final_norm", x)


def same(state, x):
    return x


def sum_of_streams(state, streams):
    x, s = streams
    return x + final(state, s)


def first_stream(streams):
    return streams[0] if isinstance(streams, tuple) else streams


# A layer, what the encoder does after the last one, and arguments of the formula that follow from settings.
CASES = [
    ("post", {}, post, same, {}),
    ("post", {"embedding_norm": False}, post, same, {}),
    ("pre", {}, pre, final, {}),
    ("pre", {"embedding_norm": False}, pre, final, {}),
    ("sandwich", {}, sandwich, final, {}),
    ("sub_ln", {}, sub_ln, final, {}),
    ("normformer", {}, normformer, final, {}),
    ("normformer", {"normformer_residual_scale": True}, normformer, final, {"residual_scale": True}),
    ("deep_norm", {}, deep_norm, same, {}),
    ("deep_norm", {"deep_norm_alpha": 0.7}, deep_norm, same, {"alpha": 0.7}),
    ("b2t", {}, b2t, same, {}),
    ("residual_dual", {}, residual_dual, sum_of_streams, {}),
    ("residual_dual", {"residual_dual_scale": 0.05}, residual_dual, sum_of_streams, {}),
    ("admin", {}, admin, same, {}),
    ("recursive_skip", {}, recursive_skip, same, {}),
    ("recursive_skip", {"recursive_skip_order": 3}, recursive_skip, same, {"order": 3}),
    ("recursive_skip", {"recursive_skip_shared_norm": True}, recursive_skip, same, {"shared": True}),
    ("mix_ln", {}, mix_ln, final, {}),
    ("mix_ln", {"mix_ln_alpha": 0.5}, mix_ln, final, {"post_layers": 2}),
    ("hybrid_norm", {}, hybrid_norm, final, {}),
    ("hybrid_norm", {"hybrid_norm_star": True}, hybrid_norm, final, {"star": True}),
    ("hybrid_norm", {"norm_type": "rms_norm"}, hybrid_norm, final, {}),
    ("re_zero", {}, re_zero, same, {}),
    ("re_zero", {"embedding_norm": True}, re_zero, same, {}),
    ("t_fixup", {}, t_fixup, same, {}),
]


def expected_states(model, inputs, formula, finish, arguments):
    """The embeddings, the stream after each layer but the last, and the encoder's output."""
    state = model.state_dict()
    positions = state["embeddings.position_embeddings.weight"][: inputs["input_ids"].shape[1]]
    x = state["embeddings.word_embeddings.weight"][inputs["input_ids"]] + positions
    x = x + state["embeddings.token_type_embeddings.weight"][inputs["token_type_ids"]]
    if "embeddings.LayerNorm.weight" in state:
        x = normalise(state, "embeddings.LayerNorm", x)
    stream = (x, x) if formula is residual_dual else x
    states = []
    for index in range(LAYERS):
        states.append(first_stream(stream))
        layer = Layer(state, index, inputs["attention_mask"].bool())
        stream = formula(layer, stream, **arguments)
    return [*states, finish(state, stream)]


def name_of(value):
    return value if isinstance(value, str) else ",".join(value) if isinstance(value, dict) else value.__name__


@pytest.mark.parametrize(("placement", "settings", "formula", "finish", "arguments"), CASES, ids=name_of)
def test_encoder_is_the_formula(placement, settings, formula, finish, arguments):
    model, inputs = arbitrary(placement, **settings), batch()
    assert model.config.embedding_norm is ("embeddings.LayerNorm.weight" in model.state_dict())
    outputs = model(**inputs, output_hidden_states=True)
    expected = expected_states(model, inputs, formula, finish, arguments)
    assert len(outputs.hidden_states) == LAYERS + 1
    for mine, theirs in zip(outputs.hidden_states, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(outputs.last_hidden_state, expected[-1], rtol=1e-8, atol=1e-9)
    pooled = F.linear(expected[-1][:, 0], *model.pooler.dense.parameters()).tanh()
    torch.testing.assert_close(outputs.pooler_output, pooled, rtol=1e-8, atol=1e-9)


def test_every_placement_has_a_formula():
    assert {placement for placement, *_ in CASES} == set(PLACEMENTS)


def test_formulas_differ():
    """With the same weights, no two placements compute the same: the comparison above can fail."""
    inputs, seen = batch(), {}
    for placement in PLACEMENTS:
        seen[placement] = arbitrary(placement)(**inputs).last_hidden_state
    names = list(seen)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            assert (seen[one] - seen[other]).abs().max() > 1e-2, (one, other)


# --- where norms sit ----------------------------------------------------------------------------------------

# The widths of the norms in a layer.
WIDTHS = {
    "post": [HIDDEN] * 2,
    "pre": [HIDDEN] * 2,
    "sandwich": [HIDDEN] * 4,
    "sub_ln": [HIDDEN] * 3 + [WIDE],
    "normformer": [HIDDEN] * 3 + [WIDE],
    "deep_norm": [HIDDEN] * 2,
    "b2t": [HIDDEN] * 2,
    "residual_dual": [HIDDEN] * 2,
    "admin": [HIDDEN] * 2,
    "recursive_skip": [HIDDEN] * 4,
    "mix_ln": [HIDDEN] * 2,
    "hybrid_norm": [HEAD] * 3 + [HIDDEN],
    "re_zero": [],
    "t_fixup": [],
}
# Post-LN and its kin end with a norm already; the last two have none at all.
NO_FINAL_NORM = {"post", "deep_norm", "b2t", "admin", "recursive_skip", "re_zero", "t_fixup"}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_number_and_width_of_norms(placement):
    model = build(placement)
    for layer in model.encoder.layer:
        norms = [module for module in layer.modules() if isinstance(module, NORM_CLASSES)]
        assert sorted(norm.normalized_shape[0] for norm in norms) == sorted(WIDTHS[placement])
    outside = [
        name for name, module in model.named_modules()
        if isinstance(module, NORM_CLASSES) and ".layer." not in name
    ]  # fmt: skip
    embedding = [] if placement in ("re_zero", "t_fixup") else ["embeddings.LayerNorm"]
    assert outside == embedding + ([] if placement in NO_FINAL_NORM else ["encoder.final_norm"])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_pooler_and_head_read_after_the_end(placement):
    model, seen = randomise(build(placement, "ForPreTraining")), []
    for reader in (model.bert.pooler, model.cls.predictions):
        reader.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**batch())
    end = model.bert(**batch()).last_hidden_state
    assert len(seen) == 3 and all(torch.equal(states, end) for states in seen)


# With a norm on the stream itself, a branch of 0 leaves x normalised; in the others it leaves x.
ON_THE_STREAM = NO_FINAL_NORM - {"re_zero", "t_fixup"} | {"residual_dual", "hybrid_norm"}


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_dropout_is_inside_the_branch(placement):
    model = build(placement, hidden_dropout_prob=1.0)
    layer = model.encoder.layer[-1].train()
    nn.init.ones_(layer.output.dense.bias)  # dropout comes after the bias
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = F.layer_norm(x, (HIDDEN,), eps=1e-12) if placement in ON_THE_STREAM else x
    torch.testing.assert_close(first_stream(layer(x)), expected, rtol=1e-5, atol=1e-5)


# --- limits -------------------------------------------------------------------------------------------------


def renamed(model, names):
    """The weights of a Post-LN `model` under the names of another placement."""
    state = model.state_dict()
    return {
        name.replace("output.LayerNorm", f"output.{names}") if ".layer." in name else name: value
        for name, value in state.items()
    }


@pytest.mark.parametrize(("placement", "settings", "norm"), [
    ("recursive_skip", {"recursive_skip_order": 1}, "post_norms.0"),
    ("recursive_skip", {"recursive_skip_order": 1, "recursive_skip_shared_norm": True}, "post_norms.0"),
    ("deep_norm", {"deep_norm_alpha": 1.0, "deep_norm_beta": 1.0}, "post_norm"),
    ("admin", {"admin_omega": 1.0}, "post_norm"),
])  # fmt: skip
def test_limit_is_post_ln(placement, settings, norm):
    reference = randomise(build("post"))
    model = build(placement, **settings)
    missing, unexpected = model.load_state_dict(renamed(reference, norm), strict=False)
    # omega is not a weight of Post-LN: it keeps its first value, 1.
    assert not unexpected and {name.rpartition(".")[2] for name in missing} <= {"omega"}
    outputs, expected = model(**batch()), reference(**batch())
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, rtol=0, atol=0)


def test_deep_norm_with_beta_1_starts_as_post_ln():
    model = build("deep_norm", deep_norm_alpha=1.0, deep_norm_beta=1.0)
    reference = build("post", initializer="xavier_normal")
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in renamed(reference, "post_norm").items())


def test_b2t_is_post_ln_plus_the_input_of_the_layer():
    reference, model = randomise(build("post")), build("b2t")
    model.load_state_dict(renamed(reference, "post_norm"))
    sums = []
    for norm in (model.encoder.layer[0].output.post_norm, reference.encoder.layer[0].output.LayerNorm):
        norm.register_forward_pre_hook(lambda _, args: sums.append(args[0]))
    x = torch.randn(2, 5, HIDDEN, generator=torch.Generator().manual_seed(0))
    model.encoder.layer[0](x)
    reference.encoder.layer[0](x)
    torch.testing.assert_close(sums[0] - sums[1], x, rtol=1e-5, atol=1e-5)


def test_mix_ln_without_post_layers_is_pre_ln():
    reference, model = randomise(build("pre")), build("mix_ln", mix_ln_alpha=0.0)
    model.load_state_dict(reference.state_dict())
    assert torch.equal(model(**batch())[0], reference(**batch())[0])


def test_mix_ln_with_post_layers_only_is_post_ln_and_a_final_norm():
    model, reference = randomise(build("mix_ln", mix_ln_alpha=1.0)), build("post")
    left_over = reference.load_state_dict(model.state_dict(), strict=False)
    assert left_over.unexpected_keys == ["encoder.final_norm.weight", "encoder.final_norm.bias"]
    gain, bias = model.encoder.final_norm.parameters()
    expected = F.layer_norm(reference(**batch())[0], (HIDDEN,), gain, bias, eps=1e-12)
    torch.testing.assert_close(model(**batch())[0], expected)


@pytest.mark.parametrize(("layers", "alpha", "count"), [
    (12, 0.25, 3), (24, 0.25, 6), (6, 0.25, 1), (3, 0.25, 0), (100, 0.29, 29), (10, 0.7, 7), (12, 1.0, 12),
])  # fmt: skip
def test_number_of_post_ln_layers_in_mix_ln(layers, alpha, count):
    names = ours("Model", "mix_ln", num_hidden_layers=layers, mix_ln_alpha=alpha).state_dict()
    found = [i for i in range(layers) if f"encoder.layer.{i}.output.LayerNorm.weight" in names]
    assert found == list(range(count))


@pytest.mark.parametrize("embedding_norm", [True, False])
def test_re_zero_starts_as_the_identity_and_learns(embedding_norm):
    model = build("re_zero", "ForMaskedLM", embedding_norm=embedding_norm)
    embedded = model.bert.embeddings(batch()["input_ids"], token_type_ids=batch()["token_type_ids"])
    assert torch.equal(model.bert(**batch()).last_hidden_state, embedded)
    model(**head_inputs("ForMaskedLM")).loss.backward()
    for name, parameter in model.bert.encoder.named_parameters():
        # Only the factors get a gradient at first: it is they that let the branches in.
        assert bool(parameter.grad.any()) is name.endswith("residual_weight"), name
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.bert(**batch()).last_hidden_state, embedded)


def test_scale_of_the_dual_stream_does_not_matter():
    states = [arbitrary("residual_dual", residual_dual_scale=c)(**batch())[0] for c in (1.0, 0.05, 7.0)]
    torch.testing.assert_close(states[1], states[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(states[2], states[0], rtol=1e-6, atol=1e-8)


def test_first_layer_of_hybrid_norm_star():
    names = build("hybrid_norm", hybrid_norm_star=True).state_dict()
    norms = [
        {name.split(".", 3)[3].removesuffix(".weight") for name in names
         if name.startswith(f"encoder.layer.{i}.") and name.endswith("norm.weight")}
        for i in range(2)
    ]  # fmt: skip
    qkv = {f"attention.self.{name}.norm" for name in ("query", "key", "value")}
    assert norms == [qkv | {"attention.output.pre_norm", "output.pre_norm"}, qkv | {"output.stream_norm"}]


# --- closed forms at the start ------------------------------------------------------------------------------


def branch(placement, width=64, **settings):
    """A feed-forward branch whose projection is the identity."""
    sizes = {**SIZES, "hidden_size": width, "intermediate_size": width}
    module = build_branch(BertLnConfig(**sizes, norm_placement=placement, **settings), 0, FEED_FORWARD)
    nn.init.eye_(module.dense.weight)
    nn.init.zeros_(module.dense.bias)
    return module.double().eval()


@pytest.mark.parametrize(("square", "ratios"), [(0.5, (1, 2.22, 4.56, 9.17)), (1.0, (1, 2.41, 5.03, 10.15))])
def test_weight_of_the_skip_in_recursive_skip(square, ratios):
    """The ratio of x to F in y_lambda, for |x|^2 = d and an F orthogonal to it with |F|^2 = d or d / 2."""
    width = 64
    signs = torch.arange(width)
    x = (1.0 - 2 * (signs % 2)).double().view(1, 1, -1)  # both have mean 0
    f = (1.0 - 2 * (signs // 2 % 2)).double().view(1, 1, -1) * math.sqrt(square)
    for order, ratio in enumerate(ratios, start=1):
        with torch.no_grad():
            y = branch("recursive_skip", width, recursive_skip_order=order)(x, lambda _: f)
        of_x, of_f = (y * x).sum() / x.square().sum(), (y * f).sum() / f.square().sum()
        assert (of_x / of_f).item() == pytest.approx(ratio, abs=0.006)


def test_a_sandwich_adds_vectors_of_one_length():
    """Whatever the sub-layer returns, its second norm gives it |v|^2 = d."""
    x, f = torch.randn(2, 3, 5, 64, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    added = branch("sandwich")(x, lambda _: 37 * f) - x
    torch.testing.assert_close(added.square().sum(-1), torch.full((3, 5), 64.0, dtype=torch.double))


@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_sub_layers_behind_an_inner_norm_have_no_scale(scale):
    x, f = torch.randn(2, 3, 5, 64, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    for placement in ("sub_ln", "normformer"):
        module = branch(placement)
        torch.testing.assert_close(module(x, lambda _: scale * f), module(x, lambda _: f))


# --- the first weights --------------------------------------------------------------------------------------

# Table of the papers' constants: N, alpha and beta of DeepNorm, gamma of Sub-LN, T-Fixup's factors for
# matrices and for embeddings, omega of admin-torch, B2T's factor.
CONSTANTS = [
    (6, 1.8612, 0.3799, 1.5764, 0.4281, 0.3689, 2.0170, 0.4082),
    (12, 2.2134, 0.3195, 1.7827, 0.3600, 0.3102, 2.6013, 0.2887),
    (24, 2.6321, 0.2686, 1.9675, 0.3027, 0.2608, 3.4045, 0.2041),
]
FACTORS = {
    "deep_norm_alpha": "deep_norm",
    "deep_norm_beta": "deep_norm",
    "sub_ln_gain": "sub_ln",
    "t_fixup_gain": "t_fixup",
    "t_fixup_embedding_gain": "t_fixup",
    "admin_omega": "admin",
    "b2t_gain": "b2t",
}


@pytest.mark.parametrize(("layers", "values"), [(row[0], row[1:]) for row in CONSTANTS])
def test_table_of_constants(layers, values):
    for (factor, placement), value in zip(FACTORS.items(), values, strict=True):
        config = BertLnConfig(norm_placement=placement, num_hidden_layers=layers)
        assert getattr(config, factor) == pytest.approx(value, abs=5e-5), factor
        assert getattr(BertLnConfig(norm_placement="pre", num_hidden_layers=layers), factor) is None


N = 6
GAINS = {
    "sub_ln": math.sqrt(math.log(2 * N)),
    "deep_norm": (8 * N) ** -0.25,
    "t_fixup": 0.67 * N**-0.25,
    "b2t": N**-0.5,
}
XAVIER = {"sub_ln", "deep_norm", "t_fixup"}
LARGE = {"num_hidden_layers": N, "hidden_size": 128, "intermediate_size": 512, "vocab_size": 500}


def gain_of(placement, name):
    """By what a placement multiplies the first values of a matrix."""
    if ".layer." not in name:
        return 1.0
    is_query_or_key = ".query" in name or ".key" in name
    return 1.0 if is_query_or_key and placement != "b2t" else GAINS.get(placement, 1.0)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_deviation_of_the_first_weights(placement):
    model = ours("ForPreTraining", placement, **LARGE)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module is model.cls.predictions.decoder:
            continue
        assert module.bias.eq(0).all()
        if min(module.weight.shape) > 2:
            base = math.sqrt(2 / sum(module.weight.shape)) if placement in XAVIER else 0.02
            deviation = module.weight.std().item()
            assert deviation == pytest.approx(gain_of(placement, name) * base, rel=0.03), name
            assert abs(module.weight.mean().item()) < 0.05 * deviation, name


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_deviation_of_the_first_embeddings(placement):
    embeddings = ours("Model", placement, **LARGE).embeddings
    expected = 128**-0.5 * (9 * N) ** -0.25 if placement == "t_fixup" else 0.02
    words = embeddings.word_embeddings.weight
    assert words[0].eq(0).all()  # padding
    assert words[1:].std().item() == pytest.approx(expected, rel=0.03)
    assert embeddings.position_embeddings.weight.std().item() == pytest.approx(expected, rel=0.06)
    assert embeddings.token_type_embeddings.weight.std().item() == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_same_seed_draws_the_same_numbers(placement):
    """A gain multiplies what all other placements start from; nothing else differs."""
    state = build(placement, "ForPreTraining", initializer="normal", num_hidden_layers=N).state_dict()
    reference = build("pre", "ForPreTraining", num_hidden_layers=N).state_dict()
    shared = [name for name in reference if "norm" not in name.lower()]
    for name in shared:
        gain = gain_of(placement, name)
        if placement == "t_fixup" and "_embeddings" in name:
            gain = HIDDEN**-0.5 * (9 * N) ** -0.25 / 0.02
        if placement == "t_fixup" and name.endswith("predictions.decoder.weight"):  # tied
            gain = HIDDEN**-0.5 * (9 * N) ** -0.25 / 0.02
        torch.testing.assert_close(state[name], gain * reference[name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("initializer", ["normal", "xavier_normal"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_first_values_of_norms_and_factors(placement, initializer):
    settings = {"normformer_residual_scale": True} if placement == "normformer" else {}
    model = build(placement, initializer=initializer, **settings)
    firsts = {"omega": math.sqrt(9 / math.log(9) - 1), "residual_weight": 0.0}
    for name, parameter in model.named_parameters():
        *_, module, last = name.split(".")
        is_factor = last not in ("weight", "bias")
        if is_factor or "norm" in module.lower() or "norm" in name.lower():
            first = firsts.get(last, 0.0 if last == "bias" else 1.0)
            torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, first), msg=name)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_defaults_of_the_paper(placement):
    config = BertLnConfig(norm_placement=placement)
    assert config.embedding_norm is (placement not in ("re_zero", "t_fixup"))
    assert config.initializer == ("xavier_normal" if placement in XAVIER else "normal")


# --- configs ------------------------------------------------------------------------------------------------

OTHER_VALUES = {
    "sub_ln": {"sub_ln_gain": 1.5},
    "normformer": {"normformer_residual_scale": True},
    "deep_norm": {"deep_norm_alpha": 3.0, "deep_norm_beta": 0.25},
    "b2t": {"b2t_gain": 0.5},
    "residual_dual": {"residual_dual_scale": 0.05},
    "admin": {"admin_omega": 4.0},
    "recursive_skip": {"recursive_skip_order": 3, "recursive_skip_shared_norm": True},
    "mix_ln": {"mix_ln_alpha": 0.5},
    "hybrid_norm": {"hybrid_norm_star": True},
    "t_fixup": {"t_fixup_gain": 0.5, "t_fixup_embedding_gain": 0.25},
}
FACTOR_NAMES = [(placement, name) for placement, values in OTHER_VALUES.items() for name in values]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_config_round_trip_keeps_every_factor(tmp_path, placement, own):
    values = {"initializer": "xavier_normal", **OTHER_VALUES.get(placement, {})} if own else {}
    config = BertLnConfig(**SIZES, norm_placement=placement, **values)
    config.save_pretrained(tmp_path)
    again = BertLnConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert {name: getattr(again, name) for name in values} == values
    written = json.loads((tmp_path / "config.json").read_text())
    for factor, owner in FACTORS.items():
        assert (written[factor] is not None) is (owner == placement)


@pytest.mark.parametrize(("placement", "value"), [("re_zero", True), ("post", False), ("deep_norm", False)])
def test_config_round_trip_keeps_a_chosen_embedding_norm(tmp_path, placement, value):
    BertLnConfig(norm_placement=placement, embedding_norm=value).save_pretrained(tmp_path)
    assert BertLnConfig.from_pretrained(tmp_path).embedding_norm is value


@pytest.mark.parametrize("placement", sorted(XAVIER))
def test_config_round_trip_keeps_a_chosen_initializer(tmp_path, placement):
    BertLnConfig(norm_placement=placement, initializer="normal").save_pretrained(tmp_path)
    assert BertLnConfig.from_pretrained(tmp_path).initializer == "normal"


def test_fewer_layers_keep_alpha(tmp_path):
    """The weights of a model of 12 layers were trained with its alpha, however many of them are used."""
    ours("Model", "deep_norm", num_hidden_layers=12).save_pretrained(tmp_path)
    model = BertLnModel.from_pretrained(tmp_path, num_hidden_layers=3)
    rebuilt = BertLnModel(BertLnConfig.from_pretrained(tmp_path))
    for layer in (*model.encoder.layer, *rebuilt.encoder.layer):
        assert layer.attention.output.alpha == layer.output.alpha == pytest.approx(24**0.25)


# --- what is refused ----------------------------------------------------------------------------------------

SCALE_FREE = {"sub_ln", "deep_norm", "residual_dual", "admin", "recursive_skip"}
NORM_FREE = {"re_zero", "t_fixup"}


def is_sensible(placement, norm):
    """Factors derived for norms that take the scale away need such a norm; no norms mean no kind of norm."""
    if placement in NORM_FREE:
        return norm in ("layer_norm", "none")
    if norm == "none":
        return placement == "pre"
    return norm not in ("frn", "dyt") or placement not in SCALE_FREE


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_pair_trains_or_is_refused(placement, norm):
    if not is_sensible(placement, norm):
        with pytest.raises(ValueError, match=f"norm_type='{norm}'.*norm_placement='{placement}': .{{10}}"):
            build(placement, "ForPreTraining", norm_type=norm)
        return
    model = build(placement, "ForPreTraining", norm_type=norm).train()
    inputs = head_inputs("ForPreTraining")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert loss.isfinite()
        assert not [name for name, g in gradients.items() if g is None or not g.isfinite().all()]
        optimizer.step()
    # A bias of the keys moves all scores of a row alike; after one step ReZero's branches have gradients too.
    assert not [name for name, g in gradients.items() if not g.any() and not name.endswith("key.bias")]


@pytest.mark.parametrize(("placement", "factor"), FACTOR_NAMES)
def test_factor_of_another_method_is_refused(placement, factor):
    other = "pre" if placement != "pre" else "post"
    settings = {factor: OTHER_VALUES[placement][factor]}
    build(placement, num_hidden_layers=1, **settings)
    with pytest.raises(ValueError, match=f"{factor}=.* has no effect with norm_placement='{other}'"):
        build(other, num_hidden_layers=1, **settings)


@pytest.mark.parametrize(("norm", "settings"), [
    ("ada_norm", {"ada_norm_scale": 2.0}), ("ada_norm", {"ada_norm_k": 0.2}),
    ("frn", {"frn_tlu": True}), ("dyt", {"dyt_alpha": 1.0}),
])  # fmt: skip
def test_factor_of_another_norm_is_refused(norm, settings):
    build("pre", norm_type=norm, **settings)
    with pytest.raises(
        ValueError, match=f"{next(iter(settings))}=.* has no effect with norm_type='layer_norm'"
    ):
        build("pre", **settings)


@pytest.mark.parametrize(("placement", "factor"), FACTOR_NAMES)
def test_misspelt_factor_is_refused(placement, factor):
    with pytest.raises(TypeError, match=f"did you mean '{factor}'"):
        BertLnConfig(norm_placement=placement, **{factor[:-2] + factor[-1]: 1.0})


@pytest.mark.parametrize(("name", "meant"), [
    ("deepnorm", "deep_norm"), ("rezero", "re_zero"), ("norm_former", "normformer"), ("tfixup", "t_fixup"),
])  # fmt: skip
def test_misspelt_placement_is_refused(name, meant):
    with pytest.raises(StrictDataclassError, match=f"did you mean '{meant}'"):
        BertLnConfig(norm_placement=name)


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
@pytest.mark.parametrize(
    ("placement", "factor"),
    [*((owner, factor) for factor, owner in FACTORS.items()), ("residual_dual", "residual_dual_scale")],
)
def test_factor_that_is_not_positive_is_refused(placement, factor, value):
    with pytest.raises(ValueError, match=f"{factor}={value} must be a number above 0"):
        build(placement, **{factor: value})


@pytest.mark.parametrize(("placement", "settings", "words"), [
    ("recursive_skip", {"recursive_skip_order": 0}, "recursive_skip_order=0 must be at least 1"),
    ("mix_ln", {"mix_ln_alpha": 1.1}, "mix_ln_alpha=1.1 must be between 0 and 1"),
    ("mix_ln", {"mix_ln_alpha": -0.1}, "mix_ln_alpha=-0.1 must be between 0 and 1"),
    ("t_fixup", {"embedding_norm": True}, "embedding_norm=True must be false with norm_placement='t_fixup'"),
    ("hybrid_norm", {"qk_norm": "l2"}, "qk_norm='l2' must be None with norm_placement='hybrid_norm'"),
])  # fmt: skip
def test_impossible_value_is_refused(placement, settings, words):
    with pytest.raises(ValueError, match=words):
        build(placement, **settings)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_chunked_feed_forward_changes_nothing_or_is_refused(placement):
    if placement in ("b2t", "residual_dual", "re_zero"):  # two things go through the feed-forward branch
        with pytest.raises(ValueError, match=f"chunk_size_feed_forward=3 .*norm_placement='{placement}'"):
            build(placement, chunk_size_feed_forward=3)
        return
    chunked, plain = (arbitrary(placement, chunk_size_feed_forward=size) for size in (3, 0))
    torch.testing.assert_close(chunked(**batch())[0], plain(**batch())[0])


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("placement", "settings"), [
    *((placement, {}) for placement in PLACEMENTS),
    ("normformer", {"normformer_residual_scale": True}),
    ("post", {"norm_type": "dyt", "qk_norm": "l2"}),
    ("pre", {"norm_type": "frn", "frn_tlu": True}),
])  # fmt: skip
def test_only_matrices_decay(placement, settings):
    """Head scales, residual scales, omega, ReZero's a, gains and biases stay out."""
    model = build(placement, "ForPreTraining", **settings)
    matrices = {
        id(module.weight): name for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }  # fmt: skip
    decayed, rest = split_parameters(model)
    assert {id(p) for p in decayed} == set(matrices)
    assert len(decayed) + len(rest) == len(list(model.parameters()))


def gradients_of(model, inputs):
    torch.manual_seed(0)
    model(**inputs).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True, None])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_gradient_checkpointing_changes_nothing_or_is_refused(placement, reentrant):
    plain, checkpointed = (randomise(build(placement, "ForMaskedLM")).train() for _ in range(2))
    options = None if reentrant is None else {"use_reentrant": reentrant}
    if reentrant and placement == "residual_dual":
        with pytest.raises(ValueError, match=r"use_reentrant=True is not possible .*'residual_dual'"):
            checkpointed.gradient_checkpointing_enable(options)
        return
    checkpointed.gradient_checkpointing_enable(options)
    checkpointed.enable_input_require_grads()  # the re-entrant kind needs it
    runs = []
    checkpointed.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_: runs.append(1))
    inputs = head_inputs("ForMaskedLM")
    inputs["document_ids"] = inputs["token_type_ids"]
    expected = gradients_of(plain, inputs)
    for name, gradient in gradients_of(checkpointed, inputs).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert len(runs) == 2  # once forward, once again for the gradients


# --- weights of another placement ---------------------------------------------------------------------------

# The names of these tell nothing: only config.json does.
ALIKE = {"deep_norm", "b2t"}


def shrunk(placement, **settings):
    return BertLnConfig(**{**SIZES, "num_hidden_layers": LAYERS}, norm_placement=placement, **settings)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_weights_of_another_placement_are_refused(tmp_path, placement):
    build(placement).save_pretrained(tmp_path)
    for other in PLACEMENTS.keys() - {placement}:
        with pytest.raises(ValueError, match=r"another architecture|has no effect|must be false"):
            BertLnModel.from_pretrained(tmp_path, norm_placement=other)


@pytest.mark.parametrize("how", ["missing", "edited"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_names_tell_another_placement_without_its_config(tmp_path, placement, how):
    build(placement).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    for other in PLACEMENTS.keys() - {placement}:
        config = shrunk(other)
        if how == "edited":
            config.to_json_file(tmp_path / "config.json")
        settings = {"config": config} if how == "missing" else {}
        if {placement, other} == ALIKE:
            BertLnModel.from_pretrained(tmp_path, **settings)
            continue
        with pytest.raises(ValueError, match=f"than norm_placement='{other}'.* norm parameters are missing"):
            BertLnModel.from_pretrained(tmp_path, **settings)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_weights_without_a_config_load_with_the_right_one(tmp_path, placement):
    model = randomise(build(placement))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    again = BertLnModel.from_pretrained(tmp_path, config=shrunk(placement))
    assert torch.equal(again(**batch())[0], model(**batch())[0])


@pytest.mark.parametrize(("placement", "other", "found"), [
    ("admin", "deep_norm", "8 are left over .*omega"),
    ("deep_norm", "admin", "8 norm parameters are missing .*omega"),
    ("t_fixup", "re_zero", "4 norm parameters are missing .*residual_weight"),
    ("re_zero", "t_fixup", "4 are left over .*residual_weight"),
])  # fmt: skip
def test_a_factor_alone_tells(tmp_path, placement, other, found):
    build(placement).save_pretrained(tmp_path)
    shrunk(other).to_json_file(tmp_path / "config.json")
    with pytest.raises(ValueError, match=found):
        BertLnModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(("placement", "factor"), [
    (placement, factor) for placement, factor in FACTOR_NAMES
    if factor.rpartition("_")[2] not in ("gain", "beta", "omega")  # those only say how weights start
    and factor != "residual_dual_scale"  # the last norm takes it away
])  # fmt: skip
def test_another_factor_is_refused(tmp_path, placement, factor):
    build(placement).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"another architecture than .*{factor}="):
        BertLnModel.from_pretrained(tmp_path, **{factor: OTHER_VALUES[placement][factor]})


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_folder_keeps_every_value(tmp_path, placement):
    model = randomise(build(placement, "ForMaskedLM", **OTHER_VALUES.get(placement, {})))
    model.save_pretrained(tmp_path)
    again, info = BertLnForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)


@pytest.mark.parametrize("placement", sorted(PLACEMENTS.keys() - {"post"}))
def test_stock_class_refuses_the_folder(tmp_path, placement):
    build(placement).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=f"not stock BERT: norm_placement={placement}"):
        BertModel.from_pretrained(tmp_path)
