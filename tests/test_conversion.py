"""Conversions, judged by the outputs of the stock classes."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from model_fixtures import HEADS, SIZES, batch, head_inputs, ours, randomise, stock
from test_loading import save_tokenizer
from transformers import AutoTokenizer, BertConfig

import bert_ln
from bert_ln.conversion import convert, main

CASES = {
    "bert": ("Bert", {"placement": "post"}, HEADS),
    "megatron-bert": ("MegatronBert", {"placement": "pre", "embedding_norm": False}, HEADS),
    "roberta-prelayernorm": (
        "RobertaPreLayerNorm",
        {"placement": "pre"},
        tuple(head for head in HEADS if head not in ("ForPreTraining", "ForNextSentencePrediction")),
    ),
}
PAIRS = [(family, head) for family, (_, _, heads) in CASES.items() for head in heads]


def assert_same_outputs(model, other, head, family):
    """Equal outputs and gradients, for RoBERTa without padding, whose positions it counts in another way."""
    inputs = head_inputs(head)
    if family == "roberta-prelayernorm":
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    mine, theirs = model.eval()(**inputs), other.eval()(**inputs)
    names = [name for name in mine if name in theirs]
    assert {"logits", "last_hidden_state", "prediction_logits", "start_logits"} & set(names)
    for name in names:
        torch.testing.assert_close(theirs[name], mine[name], rtol=1e-4, atol=1e-5)
    norms, expected = gradient_norms(other, theirs), gradient_norms(model, mine)
    torch.testing.assert_close(norms, expected, rtol=1e-3, atol=1e-5)


def gradient_norms(model, outputs):
    """The norm of the gradient of every parameter, sorted, because the names differ."""
    model.zero_grad()
    (outputs.loss if "loss" in outputs else outputs.pooler_output.square().sum()).backward()
    return torch.tensor(sorted(p.grad.norm().item() for p in model.parameters() if p.grad is not None))


@pytest.mark.parametrize(("family", "head"), PAIRS)
def test_to_stock_and_back(tmp_path, family, head):
    prefix, settings, _ = CASES[family]
    model = randomise(ours(head, **settings, num_labels=2, layer_norm_eps=1e-6))
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "stock", family)
    theirs, info = getattr(transformers, prefix + head).from_pretrained(
        tmp_path / "stock", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert theirs.config.layer_norm_eps == 1e-6
    assert not list((tmp_path / "stock").glob("*.py"))
    assert_same_outputs(model, theirs, head, family)
    convert(tmp_path / "stock", tmp_path / "back", "bert_ln")
    back = getattr(bert_ln, f"BertLn{head}").from_pretrained(tmp_path / "back")
    state = back.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert back.config.max_position_embeddings == SIZES["max_position_embeddings"]
    fields = ("norm_placement", "norm_type", "embedding_norm", "layer_norm_eps", "pad_token_id")
    assert [getattr(back.config, name) for name in fields] == [getattr(model.config, name) for name in fields]


@pytest.mark.parametrize(("family", "head"), PAIRS)
def test_from_stock(tmp_path, family, head):
    theirs = randomise(stock(head, family=CASES[family][0], pad_token_id=1, num_labels=2))
    theirs.save_pretrained(tmp_path / "stock")
    model = convert(tmp_path / "stock", tmp_path / "ours", "bert_ln")
    loaded = getattr(bert_ln, f"BertLn{head}").from_pretrained(tmp_path / "ours")
    assert type(loaded) is type(model)
    assert_same_outputs(loaded, theirs, head, family)


def test_roberta_with_padding_at_the_end(tmp_path):
    """BERT counts padding and RoBERTa does not: real tokens before it must not notice."""
    model = randomise(ours("ForMaskedLM", "pre"))
    model.save_pretrained(tmp_path / "ours")
    theirs = convert(tmp_path / "ours", tmp_path / "stock", "roberta-prelayernorm")
    inputs = batch()
    real = inputs["attention_mask"].bool()
    inputs["input_ids"][~real] = model.config.pad_token_id
    torch.testing.assert_close(
        theirs(**inputs).logits[real], model(**inputs).logits[real], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_labels_and_tokenizer_are_kept(tmp_path, dtype):
    names = {"id2label": {0: "no", 1: "yes", 2: "maybe"}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
    model = ours("ForSequenceClassification", "pre", embedding_norm=False, **names).to(dtype)
    model.save_pretrained(tmp_path / "ours")
    save_tokenizer(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "stock", "megatron-bert")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock")
    assert theirs.dtype == dtype
    assert theirs.config.id2label == names["id2label"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "stock")
    assert tokenizer("a cats").input_ids == [2, 5, 6, 8, 3]


@pytest.mark.parametrize("family", CASES)
def test_untied_weights_and_tokenizer_are_kept(tmp_path, family):
    prefix, settings, _ = CASES[family]
    model = randomise(ours("ForMaskedLM", **settings, tie_word_embeddings=False))
    model.save_pretrained(tmp_path / "ours")
    save_tokenizer(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "stock", family)
    theirs = getattr(transformers, f"{prefix}ForMaskedLM").from_pretrained(tmp_path / "stock")
    assert not torch.equal(theirs.get_output_embeddings().weight, theirs.get_input_embeddings().weight)
    assert_same_outputs(model, theirs, "ForMaskedLM", family)
    back = convert(tmp_path / "stock", tmp_path / "back", "bert_ln")
    assert_same_outputs(model, back, "ForMaskedLM", family)
    for folder in ("stock", "back"):
        assert AutoTokenizer.from_pretrained(tmp_path / folder)("a cats").input_ids == [2, 5, 6, 8, 3]


def test_stock_folder_has_no_trace_of_ours(tmp_path):
    ours("ForMaskedLM", "post").save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "stock", "bert")
    config = BertConfig.from_pretrained(tmp_path / "stock")
    assert config.architectures == ["BertForMaskedLM"]
    assert not {"norm_placement", "norm_type", "embedding_norm", "auto_map"} & set(config.to_dict())


@pytest.mark.parametrize(
    ("settings", "to", "words"),
    [
        ({"placement": "pre"}, "bert", "use --to roberta-prelayernorm"),
        ({"placement": "pre"}, "megatron-bert", "use --to roberta-prelayernorm"),
        ({"placement": "pre", "embedding_norm": False}, "roberta-prelayernorm", "use --to megatron-bert"),
        ({"placement": "post"}, "megatron-bert", "use --to bert"),
        ({"placement": "post", "embedding_norm": False}, "bert", "no stock architecture does"),
        ({"placement": "pre"}, "bert_ln", "exactly one of them must be bert_ln"),
        ({"placement": "pre", "hidden_act": "relu"}, "roberta-prelayernorm", "gelu, not hidden_act='relu'"),
        ({"placement": "pre", "pad_token_id": None}, "roberta-prelayernorm", "pad_token_id"),
        ({"placement": "pre", "head": "ForPreTraining"}, "roberta-prelayernorm", "no head 'ForPreTraining'"),
        ({"placement": "post", "is_decoder": True}, "bert", "only encoders"),
    ],
)
def test_refuses_what_has_no_counterpart(tmp_path, capsys, settings, to, words):
    ours(**settings).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=words):
        convert(tmp_path / "ours", tmp_path / "other", to)
    assert main([str(tmp_path / "ours"), str(tmp_path / "other"), "--to", to]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_refuses_incomplete_sources_and_used_destinations(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        convert(tmp_path / "nothing", tmp_path / "new", "bert")
    model = ours("Model", "post")
    model.save_pretrained(tmp_path / "ours")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    for used in (tmp_path / "used", tmp_path / "used" / "file"):
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            convert(tmp_path / "ours", used, "bert")
    state = model.state_dict()
    del state["pooler.dense.weight"]
    model.save_pretrained(tmp_path / "incomplete", state_dict=state)
    with pytest.raises(ValueError, match="lacks weights"):
        convert(tmp_path / "incomplete", tmp_path / "new", "bert")
    transformers.GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="model_type 'gpt2'"):
        convert(tmp_path / "gpt2", tmp_path / "new", "bert_ln")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BREAKS = {
    "no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "wrong type": lambda folder: change_config(folder, hidden_size="x"),
    "unknown placement": lambda folder: change_config(folder, norm_placement="foo"),
    "misspelt field": lambda folder: change_config(folder, norm_placment="post"),
    "unknown activation": lambda folder: change_config(folder, hidden_act="gelo"),
    "wrong size": lambda folder: change_config(folder, vocab_size=60),
    "wrong placement": lambda folder: change_config(folder, norm_placement="pre"),
    "weights cut off": lambda folder: (folder / "model.safetensors").write_bytes(b"xx"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights of more layers": lambda folder: change_config(folder, num_hidden_layers=1),
}


@pytest.mark.parametrize(("to", "what"), [
    *(("bert", what) for what in BREAKS),
    *(("bert_ln", what) for what in BREAKS if "placement" not in what and "misspelt" not in what),
])  # fmt: skip
def test_broken_sources_are_one_line(tmp_path, capsys, to, what):
    model = ours("ForMaskedLM", "post") if to == "bert" else stock("ForMaskedLM")
    model.save_pretrained(tmp_path / "src")
    BREAKS[what](tmp_path / "src")
    capsys.readouterr()
    assert main([str(tmp_path / "src"), str(tmp_path / "dst"), "--to", to]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"src"}


def test_weights_without_a_place_are_named(tmp_path, caplog):
    stock("ForPreTraining").save_pretrained(tmp_path / "stock")
    change_config(tmp_path / "stock", architectures=["BertForMaskedLM"])
    convert(tmp_path / "stock", tmp_path / "ours", "bert_ln")
    assert "bert.pooler.dense.weight" in caplog.text and "cls.seq_relationship.weight" in caplog.text


def test_destination_is_complete_or_absent(tmp_path, monkeypatch):
    ours("ForMaskedLM", "post").save_pretrained(tmp_path / "ours")
    save_tokenizer(tmp_path / "ours")

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        assert main([str(tmp_path / "ours"), str(tmp_path / "dst"), "--to", "bert"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}
    (tmp_path / "dst").mkdir()
    assert main([str(tmp_path / "ours"), str(tmp_path / "dst"), "--to", "bert"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "dst"}


def test_command_line(tmp_path, capsys):
    ours("ForMaskedLM", "post").save_pretrained(tmp_path / "ours")
    command = [sys.executable, "-m", "bert_ln.conversion", str(tmp_path / "ours"), str(tmp_path / "stock")]
    run = subprocess.run([*command, "--to", "bert"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "BertForMaskedLM" in run.stdout
    assert main([*command[3:], "--to", "bert"]) == 2
    assert "not an empty folder" in capsys.readouterr().err
