"""Every kind of norm against its formula, in the module and in the model."""

import pytest
import torch
from model_fixtures import SIZES, batch, head_inputs, ours, randomise
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.modernbert.modeling_modernbert import ModernBertConfig, ModernBertEncoderLayer

from bert_ln import BertLnConfig, BertLnForMaskedLM, BertLnForSequenceClassification, BertLnModel
from bert_ln.norms import NORMS
from recipes.arguments import OptimizationArguments
from recipes.optimization import build_optimizer, split_parameters

# Without the factors of its own, a norm might pass by its defaults alone.
FACTORS = {"ada_norm": {"ada_norm_scale": 1.7, "ada_norm_k": 0.3}, "dyt": {"dyt_alpha": 0.8}}
WITHOUT_PARAMETERS = ("layer_norm_simple", "detach_norm", "ada_norm", "none")
KINDS = [*((kind, FACTORS.get(kind, {})) for kind in NORMS), ("frn", {"frn_tlu": True})]
WIDTH = 6


def norm_of(kind, width=WIDTH, dtype=torch.float64, eps=1e-12, **settings):
    """A norm by itself, in which no parameter has its first value."""
    config = BertLnConfig(norm_type=kind, layer_norm_eps=eps, **settings)
    return randomise(NORMS[kind](config, width).to(dtype))


def numbers(*shape, seed=4, dtype=torch.float64):
    """Features of unequal scale and of a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    return (0.3 + 2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def output_and_gradient(function, x, cotangent):
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, cotangent)[0]


# --- the formulas -------------------------------------------------------------------------------------------


def statistics(v, eps):
    """Mean and deviation of each token, eps inside the root."""
    mean = v.sum(-1, keepdim=True) / v.shape[-1]
    return mean, (((v - mean) ** 2).sum(-1, keepdim=True) / v.shape[-1] + eps) ** 0.5


def layer_norm_simple(v, p, eps):
    mean, deviation = statistics(v, eps)
    return (v - mean) / deviation


def detach_norm(v, p, eps):
    mean, deviation = statistics(v, eps)
    return (v - mean.detach()) / deviation.detach()


def ada_norm(v, p, eps):
    y = layer_norm_simple(v, p, eps)
    return (1.7 * (1 - 0.3 * y)).detach() * y


def rms_norm(v, p, eps):
    return p["weight"] * v / ((v**2).sum(-1, keepdim=True) / v.shape[-1] + eps) ** 0.5


def frn(v, p, eps, segments=None):
    """By loops; `segments` are sets of tokens for each row, by default all of a row. Others give 0."""
    segments = segments or [[range(v.shape[1])]] * len(v)
    e = 1e-6 + p["eps"].abs().squeeze()
    y = torch.zeros_like(v)
    for row, sets in enumerate(segments):
        for tokens in sets:
            square = sum(v[row, t] ** 2 for t in tokens) / len(tokens)
            for t in tokens:
                y[row, t] = p["weight"] * v[row, t] / (square + e) ** 0.5 + p["bias"]
    return torch.relu(y - p["tau"]) + p["tau"] if "tau" in p else y


FORMULAS = {
    "layer_norm": lambda v, p, eps: p["weight"] * layer_norm_simple(v, p, eps) + p["bias"],
    "layer_norm_simple": layer_norm_simple,
    "detach_norm": detach_norm,
    "ada_norm": ada_norm,
    "rms_norm": rms_norm,
    "frn": frn,
    "dyt": lambda v, p, eps: p["weight"] * torch.tanh(p["alpha"] * v) + p["bias"],
    "none": lambda v, p, eps: v,
}


def check_formula(function, formula, parameters, x):
    """Output, and gradients of the input and of every parameter."""
    cotangent = numbers(*x.shape, seed=5)
    runs = []
    for compute in (function, formula):
        x = x.clone().requires_grad_()
        y = compute(x)
        runs.append([y, *torch.autograd.grad(y, [x, *parameters.values()], cotangent)])
    for mine, expected in zip(*runs):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


def test_every_kind_has_a_formula():
    assert FORMULAS.keys() == NORMS.keys()


@pytest.mark.parametrize("shape", [(3, 5, WIDTH), (2, 5, 3, WIDTH)])  # tokens; the heads of tokens
@pytest.mark.parametrize("eps", [1e-12, 0.5])
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_norm_is_the_formula(kind, settings, eps, shape):
    norm = norm_of(kind, eps=eps, **settings)
    parameters = dict(norm.named_parameters())
    check_formula(norm, lambda v: FORMULAS[kind](v, parameters, eps), parameters, numbers(*shape))


@pytest.mark.parametrize("kind", NORMS)
def test_what_a_norm_says_of_itself(kind):
    norm, x = norm_of(kind), numbers(2, 5, WIDTH)
    factors = torch.linspace(0.5, 3, 5)[:, None]
    assert torch.allclose(norm(factors * x), norm(x), atol=1e-6) is norm.removes_scale
    changed = x.clone()
    changed[:, 3] += 1
    assert torch.equal(norm(changed)[:, 0], norm(x)[:, 0]) is not norm.crosses_tokens


@pytest.mark.parametrize("alpha", [0.5, 0.2])
def test_first_values(alpha):
    config = BertLnConfig(dyt_alpha=alpha, frn_tlu=True)
    first = {"weight": 1, "bias": 0, "alpha": alpha, "eps": 1e-4, "tau": 0}
    for kind in NORMS:
        norm = NORMS[kind](config, WIDTH)
        built = {name: value.clone() for name, value in norm.state_dict().items()}
        randomise(norm).reset_parameters()
        for values in (built, norm.state_dict()):
            assert all(value.eq(torch.tensor(float(first[name]))).all() for name, value in values.items())
    assert BertLnConfig().dyt_alpha == 0.5


# --- public implementations ---------------------------------------------------------------------------------


def modernbert_norm(bias):
    config = ModernBertConfig(hidden_size=WIDTH, num_attention_heads=1, norm_eps=1e-12, norm_bias=bias)
    return ModernBertEncoderLayer(config, layer_idx=1).mlp_norm


PUBLIC = {
    "torch LayerNorm": ("layer_norm", lambda: nn.LayerNorm(WIDTH, eps=1e-12)),
    "torch LayerNorm without affine": (
        "layer_norm_simple",
        lambda: nn.LayerNorm(WIDTH, eps=1e-12, elementwise_affine=False),
    ),
    "ModernBERT": ("layer_norm", lambda: modernbert_norm(bias=False)),
    "ModernBERT with bias": ("layer_norm", lambda: modernbert_norm(bias=True)),
    "torch RMSNorm": ("rms_norm", lambda: nn.RMSNorm(WIDTH, eps=1e-12)),
    "Llama": ("rms_norm", lambda: LlamaRMSNorm(WIDTH, eps=1e-12)),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_norm_equals_the_public_one(name):
    kind, build = PUBLIC[name]
    norm, public = norm_of(kind, dtype=torch.float32), build()
    missing = public.load_state_dict(norm.state_dict(), strict=False).unexpected_keys
    for left in missing:  # the bias, which ModernBERT has not
        nn.init.zeros_(norm.get_parameter(left))
    assert missing == (["bias"] if name == "ModernBERT" else [])
    x, cotangent = numbers(3, 5, WIDTH, dtype=torch.float32), numbers(3, 5, WIDTH, seed=5).float()
    runs = [output_and_gradient(function, x, cotangent) for function in (norm, public)]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-5, atol=1e-6)


# --- the gradients of Xu et al. 2019 ------------------------------------------------------------------------


def mean_and_variance(values):
    return values.mean(-1), values.var(-1, correction=0)


def gradient_statistics(kind):
    """Mean and variance of the input's gradient for each token, of what came from above, and sigma."""
    x, above = numbers(3, 5, 16), numbers(3, 5, 16, seed=5)
    _, gradient = output_and_gradient(norm_of(kind, width=16), x, above)
    return *mean_and_variance(gradient), *mean_and_variance(above), x.std(-1, correction=0)


def test_layer_norm_simple_centres_and_shrinks_the_gradient():
    mean, variance, _, above, sigma = gradient_statistics("layer_norm_simple")
    torch.testing.assert_close(mean, torch.zeros_like(mean))
    assert (variance < above / sigma**2).all()


def test_detach_norm_only_divides_the_gradient():
    mean, variance, mean_above, above, sigma = gradient_statistics("detach_norm")
    torch.testing.assert_close(mean, mean_above / sigma)
    torch.testing.assert_close(variance, above / sigma**2)
    assert (mean.abs() > 0.01).any()


def test_ada_norm_without_slope_is_layer_norm_simple():
    plain, ada = norm_of("layer_norm_simple"), norm_of("ada_norm", ada_norm_scale=1.0, ada_norm_k=0.0)
    x, above = numbers(3, 5, WIDTH), numbers(3, 5, WIDTH, seed=5)
    runs = [output_and_gradient(norm, x, above) for norm in (ada, plain)]
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("scale", "k"), [(1.0, 0.1), (2.0, 0.1), (0.7, 0.25)])
def test_mean_of_ada_norm(scale, k):
    y = norm_of("ada_norm", ada_norm_scale=scale, ada_norm_k=k)(numbers(3, 5, WIDTH))
    torch.testing.assert_close(y.mean(-1), torch.full((3, 5), -scale * k, dtype=y.dtype))


def test_no_gradient_through_the_factor_of_ada_norm():
    """It is that of layer norm without gain, fed with what came from above times the factor."""
    x, above = numbers(3, 5, WIDTH), numbers(3, 5, WIDTH, seed=5)
    y = layer_norm_simple(x, {}, 1e-12)
    _, expected = output_and_gradient(norm_of("layer_norm_simple"), x, above * 2 * (1 - 0.25 * y))
    norm = norm_of("ada_norm", ada_norm_scale=2.0, ada_norm_k=0.25)
    _, gradient = output_and_gradient(norm, x, above)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


# --- FRN: which tokens are averaged -------------------------------------------------------------------------

# Rows of ten tokens. Padding is 1 for real tokens; a letter is a document, a dot is padding.
ROWS = (
    "aaaaaaaaaa",
    "aaaaaaa...",
    "...aaaaaaa",
    "aaabbbbccc",
    "aaaabbb...",
    "..aaabbbbb",
    "aabbbaabbb",
    "abbbbbbbbc",
)


def sets_of_tokens(row):
    return [[t for t in range(len(row)) if row[t] == letter] for letter in sorted({*row} - {"."})]


def first_tokens(row):
    """A number for each document, the first of its tokens; each padding token is alone, as in the model."""
    return [t if letter == "." else row.index(letter) for t, letter in enumerate(row)]


@pytest.mark.parametrize("shape", [(WIDTH,), (2, WIDTH)])
@pytest.mark.parametrize("tlu", [False, True])
def test_frn_averages_over_segments(shape, tlu):
    norm = norm_of("frn", frn_tlu=tlu)
    parameters = dict(norm.named_parameters())
    norm.segments = torch.tensor([first_tokens(row) for row in ROWS])
    x, real = numbers(len(ROWS), 10, *shape), torch.tensor([[c != "." for c in row] for row in ROWS])
    real = real.view(len(ROWS), 10, *[1] * len(shape))  # the formula gives 0 for padding
    segments = [sets_of_tokens(row) for row in ROWS]
    check_formula(lambda v: norm(v) * real, lambda v: frn(v, parameters, 0, segments) * real, parameters, x)


def test_more_padding_changes_no_real_token_of_frn():
    norm, x = norm_of("frn"), numbers(2, 5, WIDTH)
    expected = norm(x)
    for left, right in ((0, 1), (0, 9), (4, 0), (3, 2)):
        padding = [numbers(2, count, WIDTH, seed=6) for count in (left, right)]
        longer = torch.cat([padding[0], x, padding[1]], dim=1)
        row = "." * left + "a" * 5 + "." * right
        norm.segments = torch.tensor([first_tokens(row)] * 2)
        torch.testing.assert_close(norm(longer)[:, left : left + 5], expected)
        norm.segments = None
        assert (norm(longer)[:, left : left + 5] - expected).abs().max() > 1e-2  # the check above can fail


def test_learnt_epsilon_of_frn_keeps_one_token_from_being_a_sign():
    """dy/dx = g eps / (x^2 + eps)^(3/2), which is g / sqrt(eps) at 0 and no spike of width 1e-3."""
    norm = NORMS["frn"](BertLnConfig(norm_type="frn"), 3)
    x = torch.tensor([0.0, 0.01, -0.02]).view(1, 1, 3)
    y, gradient = output_and_gradient(norm, x, torch.ones_like(x))
    eps = 1.01e-4
    torch.testing.assert_close(y, x / (x**2 + eps) ** 0.5)
    torch.testing.assert_close(gradient, eps / (x**2 + eps) ** 1.5)
    assert y.abs().max() < 0.95
    norm(x).square().sum().backward()
    expected = (-(x**2) / (x**2 + eps) ** 2).sum().view(1)
    torch.testing.assert_close(norm.eps.grad, expected, rtol=1e-4, atol=0)


# Placements with a norm in front, behind, both, and on the heads of queries, keys and values.
WITH_FRN = ("post", "pre", "sandwich", "hybrid_norm")


def frn_model(placement="pre", head="Model", **settings):
    return randomise(ours(head, placement, norm_type="frn", **settings))


def packed(rows, seed=2):
    """Inputs of a model for rows as in `ROWS`; positions start at 0 in each document."""
    ids = torch.randint(
        5, SIZES["vocab_size"], (len(rows), 10), generator=torch.Generator().manual_seed(seed)
    )
    numbers_of = [[1 + "ab.c".index(letter) for letter in row] for row in rows]
    positions = torch.tensor([[row[:t].count(letter) for t, letter in enumerate(row)] for row in rows])
    mask = torch.tensor([[int(letter != ".") for letter in row] for row in rows])
    return {
        "input_ids": ids, "position_ids": positions, "attention_mask": mask,
        "document_ids": torch.tensor(numbers_of),
    }  # fmt: skip


@pytest.mark.parametrize("given", ["padding", "documents", "both"])
@pytest.mark.parametrize("placement", WITH_FRN)
def test_a_document_gives_what_it_gives_alone_with_frn(placement, given):
    model = frn_model(placement)
    rows = {
        "padding": [row for row in ROWS if "b" not in row],
        "documents": [row for row in ROWS if "." not in row],
        "both": ROWS,
    }[given]
    inputs = packed(rows)
    if given == "padding":
        del inputs["document_ids"]
    if given == "documents":
        del inputs["attention_mask"]
    states = model(**inputs).last_hidden_state
    assert states.isfinite().all()
    for row, sets in enumerate(map(sets_of_tokens, rows)):
        for tokens in sets:
            alone = model(inputs["input_ids"][row : row + 1, tokens]).last_hidden_state[0]
            torch.testing.assert_close(states[row, tokens], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("placement", WITH_FRN)
def test_more_padding_changes_nothing_with_frn(placement):
    model = frn_model(placement, "ForMaskedLM")
    inputs = batch()
    longer = {name: nn.functional.pad(value, (0, 7)) for name, value in inputs.items()}
    real = inputs["attention_mask"].bool()
    logits = model(**longer).logits[:, :12]
    torch.testing.assert_close(logits[real], model(**inputs).logits[real], rtol=1e-4, atol=1e-5)
    longer["attention_mask"] = torch.ones_like(longer["attention_mask"])
    assert (model(**longer).logits[:, :12] - logits)[real].abs().max() > 1e-3  # the check above can fail


def stale(model):
    return [name for name, module in model.named_modules() if getattr(module, "segments", None) is not None]


def checkpointed_frn(**settings):
    model = frn_model("pre", "ForMaskedLM", use_cache=False, **settings).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def test_segments_are_forgotten_after_a_call():
    model, inputs = frn_model(), packed(ROWS[4:])
    expected = model(inputs["input_ids"]).last_hidden_state
    model(**inputs)
    assert not stale(model)
    torch.testing.assert_close(model(inputs["input_ids"]).last_hidden_state, expected)


def test_segments_are_forgotten_after_an_error():
    model, inputs = frn_model(), packed(ROWS[4:])
    for module in (model.embeddings.word_embeddings, model.encoder.layer[1].intermediate):
        hook = module.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**inputs)
        hook.remove()
        assert not stale(model)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_segments_are_forgotten_after_gradient_checkpointing():
    model, inputs = checkpointed_frn(), head_inputs("ForMaskedLM")
    model(**inputs).loss.backward()
    assert not stale(model)
    model.eval()(inputs["input_ids"][:2, :7])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_two_calls_and_one_backward_with_gradient_checkpointing():
    """Each call has its own padding, which the second computation of the layers must see again."""
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    plain, checkpointed = frn_model("pre", "ForMaskedLM", **dropout).train(), checkpointed_frn(**dropout)
    first = head_inputs("ForMaskedLM")
    second = {**first, "attention_mask": first["attention_mask"].flip(0, 1)}
    for model in (plain, checkpointed):
        (model(**first).loss + 2 * model(**second).loss).backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in checkpointed.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("settings", "words"), [
    ({"attention_window": 2}, "attention_window=2 must be None with norm_type='frn'"),
    ({"is_decoder": True}, "is_decoder=True must be false with norm_type='frn'"),
    ({"chunk_size_feed_forward": 2}, "chunk_size_feed_forward=2 must be 0 .* norm_type='frn'"),
])  # fmt: skip
def test_frn_is_refused_where_it_would_be_wrong(settings, words):
    with pytest.raises(ValueError, match=words):
        ours(norm_type="frn", **settings)


def test_frn_needs_a_mask_that_says_which_tokens_are_real():
    model, inputs = frn_model(), batch()
    with pytest.raises(ValueError, match=r"norm_type='frn' need an attention_mask \[batch, length\]"):
        model(inputs["input_ids"], attention_mask=torch.ones(3, 1, 12, 12))


@pytest.mark.slow
def test_frn_compiles_as_one_graph():
    torch._dynamo.reset()
    model = frn_model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for inputs in (packed(ROWS), {"input_ids": packed(ROWS)["input_ids"]}):
        torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)


# --- half precision -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_half_precision_is_that_of_the_output_alone(kind, settings, dtype):
    norm = norm_of(kind, dtype=dtype, **settings)
    wide = norm_of(kind, **settings)
    wide.load_state_dict(norm.state_dict())
    # The squares of the small and of the large are beyond float16.
    for scale in (0, 1e-4, 1, 1e3):
        x = (scale * numbers(3, 5, WIDTH)).to(dtype)
        y = norm(x)
        assert y.dtype == dtype and y.isfinite().all()
        exact = wide(x.double())
        torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    tiny = norm(torch.full((1, 2, WIDTH), torch.finfo(dtype).tiny, dtype=dtype))
    assert tiny.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_autocast_leaves_norms_exact(kind, settings, dtype):
    """Parameters stay in float32; inputs are what a matrix product gives, or a stream in float32."""
    norm = norm_of(kind, dtype=torch.float32, **settings)
    norm.segments = torch.tensor([[0, 0, 0, 1, 1]] * 3)  # which FRN alone reads
    for scale in (0, 1e-4, 1, 1e3):
        x = (scale * numbers(3, 5, WIDTH)).to(dtype)
        with torch.autocast("cpu", dtype=dtype):
            narrow, wide = norm(x), norm(x.float())
        exact = norm(x.float())
        torch.testing.assert_close(narrow.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
        torch.testing.assert_close(wide, exact)


# --- parameters ---------------------------------------------------------------------------------------------

COUNTS = {"layer_norm": (2, 0), "rms_norm": (1, 0), "frn": (2, 1), "dyt": (2, 1)}  # (for each feature, more)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_number_of_parameters(kind, settings):
    """Of a Pre-LN model with N layers, 2 N + 2 norms."""
    per_feature, more = COUNTS.get(kind, (0, 0))
    per_feature += settings.get("frn_tlu", False)
    each = per_feature * SIZES["hidden_size"] + more
    model, bare = ours("Model", norm_type=kind, **settings), ours("Model", norm_type="none")
    assert model.num_parameters() - bare.num_parameters() == (2 * SIZES["num_hidden_layers"] + 2) * each
    assert (each == 0) is (kind in WITHOUT_PARAMETERS)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_every_norm_trains_and_survives_a_state_dict(kind, settings):
    model, inputs = ours(norm_type=kind, **settings).train(), head_inputs("ForMaskedLM")
    optimizer = build_optimizer(model, OptimizationArguments(learning_rate=3e-3))
    losses = []
    for _ in range(4):
        losses.append(model(**inputs).loss)
        losses[-1].backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    again = ours(norm_type=kind, seed=9, **settings)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


@pytest.mark.parametrize(("kind", "settings"), [
    *KINDS, ("frn", {"frn_tlu": True, "placement": "hybrid_norm"}), ("dyt", {"qk_norm": "l2"}),
])  # fmt: skip
def test_no_parameter_of_a_norm_decays(kind, settings):
    model = ours(norm_type=kind, **settings)
    decayed, rest = split_parameters(model)
    matrices = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)}
    assert {id(parameter) for parameter in decayed} == matrices
    assert len(decayed) + len(rest) == len(list(model.parameters()))


# --- loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "settings"), [k for k in KINDS if k[0] not in WITHOUT_PARAMETERS])
def test_loaded_values_are_kept(tmp_path, kind, settings):
    model = randomise(ours(norm_type=kind, **settings))
    model.save_pretrained(tmp_path)
    state = model.state_dict()
    norms = [name for name in state if "norm" in name.lower() and name.startswith("bert.")]
    names = {name.rsplit(".", 1)[1] for name in norms}
    assert names == {name for name, _ in NORMS[kind](model.config, 4).named_parameters()}
    for loaded in (
        BertLnForMaskedLM.from_pretrained(tmp_path),
        BertLnModel.from_pretrained(tmp_path),  # a part of what was saved
        BertLnForSequenceClassification.from_pretrained(tmp_path),  # with a head that is new
    ):
        again = loaded.state_dict()
        prefix = "" if isinstance(loaded, BertLnModel) else "bert."
        for name in norms:
            assert torch.equal(again[prefix + name.removeprefix("bert.")], state[name]), name
        assert all(getattr(loaded.config, name) == value for name, value in settings.items())
    longer = BertLnModel.from_pretrained(tmp_path, num_hidden_layers=3)
    expected = ours("Model", norm_type=kind, num_hidden_layers=3, **settings).encoder.layer[2].state_dict()
    for name, value in longer.encoder.layer[2].state_dict().items():
        assert "norm" not in name or torch.equal(value, expected[name]), name
