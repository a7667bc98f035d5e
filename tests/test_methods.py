"""Every method, and pairs of methods, in everything that a model is used for."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from model_fixtures import CODE, HEADS, SIZES, batch, head_inputs, ours, randomise, stock
from test_loading import run_without_package
from torch.nn import functional as F
from transformers import BertModel

from bert_ln.attention import GLOBAL, QK_NORMS
from bert_ln.norms import NORMS
from bert_ln.placements import PLACEMENTS
from recipes.optimization import split_parameters

METHODS = {name: {"placement": name} for name in PLACEMENTS}
METHODS |= {name: {"norm_type": name} for name in NORMS if name != "layer_norm"}
# Of two layers, one each.
METHODS["mix_ln"]["mix_ln_alpha"] = 0.5
PAIRS = {
    **{
        f"window-{name}": {"attention_window": 2, "attention_window_global": name, "num_hidden_layers": 3}
        for name in GLOBAL
    },
    "window-causal": {
        "attention_window": 2,
        "attention_window_causal": True,
        "attention_window_global": "none",
    },
    **{f"qk-{name}": {"qk_norm": name} for name in QK_NORMS},
    "frn-tlu": {"norm_type": "frn", "frn_tlu": True},
    "post-frn": {"placement": "post", "norm_type": "frn"},
    "post-window-qk": {"placement": "post", "attention_window": 2, "qk_norm": "l2"},
    "sandwich-rms_norm": {"placement": "sandwich", "norm_type": "rms_norm"},
    "normformer-scaled": {"placement": "normformer", "normformer_residual_scale": True},
    "deep_norm-ada_norm": {"placement": "deep_norm", "norm_type": "ada_norm"},
    "b2t-dyt": {"placement": "b2t", "norm_type": "dyt"},
    "residual_dual-scaled": {"placement": "residual_dual", "residual_dual_scale": 0.05},
    "recursive_skip-shared": {
        "placement": "recursive_skip",
        "recursive_skip_order": 3,
        "recursive_skip_shared_norm": True,
    },
    "hybrid_norm-rms_norm": {"placement": "hybrid_norm", "norm_type": "rms_norm"},
    "hybrid_norm-star-frn": {"placement": "hybrid_norm", "hybrid_norm_star": True, "norm_type": "frn"},
    "re_zero-window-qk": {"placement": "re_zero", "attention_window": 2, "qk_norm": "rms_norm"},
}
ALL = METHODS | PAIRS
# What hands on more than one stream, or reads the whole sequence.
WHOLE = ("b2t", "residual_dual", "re_zero", "frn")
# Whose factors are derived for encoders.
ENCODERS = ("sub_ln", "deep_norm", "admin", "t_fixup")

every_method = pytest.mark.parametrize("name", ALL)


def build(name, head="Model", **settings):
    return ours(head, **(ALL[name] | settings))


def arbitrary(name, head="Model", **settings):
    """With arbitrary weights, so that a branch that starts at 0 counts as well."""
    return randomise(build(name, head, **settings))


def packed(head="ForMaskedLM"):
    """A batch with labels, padding, and two documents in each row."""
    inputs = head_inputs(head)
    return inputs | {"document_ids": inputs["token_type_ids"]}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# --- heads --------------------------------------------------------------------------------------------------


@every_method
def test_every_head_trains(name):
    for head in HEADS:
        model = build(name, head).train()
        outputs = model(**head_inputs(head))
        loss = outputs[0].square().mean() + outputs[1].square().mean() if head == "Model" else outputs.loss
        loss.backward()
        assert loss.isfinite(), head
        for parameter, gradient in gradients(model).items():
            assert gradient is not None and gradient.isfinite().all(), (head, parameter)


@every_method
def test_states_of_every_layer_are_recorded(name):
    model = arbitrary(name, attn_implementation="eager")
    outputs = model(**batch(), output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == len(outputs.attentions) + 1 == model.config.num_hidden_layers + 1
    assert {tuple(states.shape) for states in outputs.hidden_states} == {(3, 12, SIZES["hidden_size"])}
    assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 12))


@every_method
def test_sparse_prediction_has_the_loss_and_the_gradients_of_dense(name):
    inputs = packed()
    dense, sparse = (arbitrary(name, "ForMaskedLM", sparse_prediction=on) for on in (False, True))
    losses = [model(**inputs).loss for model in (dense, sparse)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for parameter, gradient in gradients(dense).items():
        torch.testing.assert_close(gradients(sparse)[parameter], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_model_without_layers(name):
    assert build(name, num_hidden_layers=0)(**batch()).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("name", [name for name in ALL if "frn" not in name and "window" not in name])
def test_a_decoder_is_causal_caches_and_reads_its_memory_or_is_refused(name):
    if any(word in name for word in ENCODERS):
        with pytest.raises(ValueError, match="add_cross_attention=True must be false"):
            build(name, is_decoder=True, add_cross_attention=True)
        return
    model = arbitrary(name, is_decoder=True, add_cross_attention=True)
    ids = batch(padded=False)["input_ids"]
    memory = torch.randn(3, 7, SIZES["hidden_size"], generator=torch.Generator().manual_seed(4))
    states = model(ids, encoder_hidden_states=memory).last_hidden_state
    first = model(ids[:, :8], encoder_hidden_states=memory)
    torch.testing.assert_close(first.last_hidden_state, states[:, :8], rtol=1e-4, atol=1e-4)
    cached = model(ids[:, 8:], encoder_hidden_states=memory, past_key_values=first.past_key_values)
    torch.testing.assert_close(cached.last_hidden_state, states[:, 8:], rtol=1e-4, atol=1e-4)
    other = model(ids, encoder_hidden_states=-memory).last_hidden_state
    assert (other - states).abs().amax(-1).min() > 1e-4


@every_method
def test_chunks_of_the_feed_forward_network_change_nothing_or_are_refused(name):
    if any(word in name for word in WHOLE):
        with pytest.raises(ValueError, match="chunk_size_feed_forward=3 must be 0"):
            build(name, chunk_size_feed_forward=3)
    else:
        chunked = arbitrary(name, chunk_size_feed_forward=3)(**batch())[0]
        torch.testing.assert_close(chunked, arbitrary(name)(**batch())[0], rtol=1e-4, atol=1e-5)


# --- folders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder of folders, a model in each, and what each says to the same inputs."""
    folder, inputs, logits = tmp_path_factory.mktemp("saved"), packed(), {}
    for name in ALL:
        model = arbitrary(name, "ForMaskedLM")
        model.save_pretrained(folder / name)
        logits[name] = model(**inputs).logits.detach()
    torch.save((inputs, logits), folder / "expected.pt")
    return folder


@every_method
def test_save_and_load(saved, name):
    model = arbitrary(name, "ForMaskedLM")
    assert {file.name for file in (saved / name).iterdir()} == {"config.json", "model.safetensors", *CODE}
    again, info = type(model).from_pretrained(saved / name, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.layers == model.config.layers
    state = again.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    inputs, logits = torch.load(saved / "expected.pt")
    torch.testing.assert_close(again(**inputs).logits, logits[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ALL if name != "post"])
def test_stock_refuses_the_folder(saved, name):
    with pytest.raises(StrictDataclassError, match="not stock BERT: norm_placement="):
        BertModel.from_pretrained(saved / name)


LOAD_ALL = """
import torch
from transformers import AutoModelForMaskedLM

folder = sys.argv[1]
inputs, expected = torch.load(folder + "/expected.pt")
for name, logits in expected.items():
    model = AutoModelForMaskedLM.from_pretrained(f"{folder}/{name}", trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    torch.testing.assert_close(model(**inputs).logits, logits, msg=lambda words: f"{name}: {words}")
print("loaded", len(expected))
"""


def test_folders_load_without_this_package(saved, tmp_path):
    run = run_without_package(LOAD_ALL, tmp_path, saved)
    assert run.returncode == 0, run.stderr
    assert f"loaded {len(ALL)}" in run.stdout


# --- training -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@every_method
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    plain, checkpointed = (arbitrary(name, "ForMaskedLM").train() for _ in range(2))
    if reentrant and ALL[name].get("placement") == "residual_dual":
        with pytest.raises(ValueError, match="use_reentrant=True is not possible"):
            checkpointed.gradient_checkpointing_enable({"use_reentrant": True})
        return
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed.enable_input_require_grads()  # the reentrant kind needs it
    runs = []
    checkpointed.bert.encoder.layer[0].intermediate.register_forward_hook(lambda *_: runs.append(1))
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        model(**packed()).loss.backward()
    assert len(runs) == 2  # once forward, once again for the gradients
    for parameter, gradient in gradients(plain).items():
        torch.testing.assert_close(gradients(checkpointed)[parameter], gradient)
    # What was set for those documents is gone.
    ids = packed()["input_ids"]
    torch.testing.assert_close(checkpointed.eval()(ids).logits, plain.eval()(ids).logits)


@pytest.mark.parametrize("name", [name for name in ALL if "frn" in name])
def test_a_call_that_fails_leaves_nothing_behind(name):
    model, inputs = arbitrary(name), packed("Model")
    expected = model(inputs["input_ids"]).last_hidden_state

    def fail(*_):
        raise RuntimeError

    handle = model.encoder.layer[-1].intermediate.register_forward_hook(fail)
    with pytest.raises(RuntimeError):
        model(**inputs)
    handle.remove()
    torch.testing.assert_close(model(inputs["input_ids"]).last_hidden_state, expected)


@every_method
def test_exactly_the_matrices_of_stock_bert_decay(name):
    model = build(name, "ForMaskedLM", num_hidden_layers=2)
    decayed, rest = (set(map(id, group)) for group in split_parameters(model))
    matrices = {key for key, parameter in stock().named_parameters() if parameter.ndim == 2}
    assert {key for key, parameter in model.named_parameters() if id(parameter) in decayed} == matrices
    assert len(decayed) + len(rest) == len(list(model.parameters()))


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    model, reference = build(name, "ForMaskedLM").to(dtype), build(name, "ForMaskedLM")
    outputs, expected = model(**packed()), reference(**packed())
    assert {parameter.dtype for parameter in model.parameters()} == {outputs.logits.dtype} == {dtype}
    torch.testing.assert_close(outputs.logits.float(), expected.logits, rtol=0.05, atol=0.02)
    outputs.loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@every_method
def test_autocast(name):
    model = build(name, "ForMaskedLM")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**packed()).loss
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(**packed()).loss, rtol=0.01, atol=0.01)
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("name", [*METHODS, "window-cls", "qk-l2"])
def test_compiles_as_one_graph(name):
    torch._dynamo.reset()
    model, inputs = arbitrary(name), packed("Model")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs)[0], model(**inputs)[0], rtol=1e-4, atol=1e-5)


# --- who sees whom ------------------------------------------------------------------------------------------


@every_method
def test_attention_kernels_agree(name):
    eager, sdpa = (arbitrary(name, attn_implementation=kernel) for kernel in ("eager", "sdpa"))
    inputs = packed("Model")
    torch.testing.assert_close(eager(**inputs)[0], sdpa(**inputs)[0], rtol=1e-4, atol=1e-4)


@every_method
def test_documents_of_a_block_are_isolated(name):
    model, ids = arbitrary(name), batch(rows=1, padded=False)["input_ids"]
    block = {
        "document_ids": torch.tensor([[0] * 4 + [1] * 5 + [0] * 3]),
        "position_ids": torch.tensor([[*range(4), *range(5), *range(3)]]),
        "attention_mask": torch.tensor([[1] * 9 + [0] * 3]),
    }
    states = model(ids, **block).last_hidden_state
    assert states.isfinite().all()
    for start, end in ((0, 4), (4, 9)):
        alone = model(ids[:, start:end]).last_hidden_state
        torch.testing.assert_close(states[:, start:end], alone, rtol=1e-4, atol=1e-4)
    together = model(ids, position_ids=block["position_ids"]).last_hidden_state
    assert (together - states)[:, :9].abs().max() > 1e-3  # the check above can fail


@every_method
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_matter(name, side):
    model, ids = arbitrary(name), batch(rows=2, padded=False)["input_ids"]
    expected = model(ids).last_hidden_state
    for more in (1, 9):
        padding = (more, 0) if side == "left" else (0, more)
        inputs = {
            "input_ids": F.pad(ids, padding, value=0),
            "attention_mask": F.pad(torch.ones_like(ids), padding),
            "position_ids": F.pad(torch.arange(12).expand(2, -1), padding),
        }
        states = model(**inputs).last_hidden_state
        kept = states[:, more:] if side == "left" else states[:, :-more]
        assert states.isfinite().all()
        torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-4)
