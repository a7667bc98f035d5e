"""Folders: what loads where, what is refused, and loading without this package."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from model_fixtures import CODE, HEADS, PLACEMENTS, SIZES, batch, ours, randomise, stock
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, BertTokenizer

import bert_ln
from bert_ln import BertLnConfig, BertLnForMaskedLM, BertLnForSequenceClassification, BertLnModel, norms


def save_tokenizer(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "sat", "##s"]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    BertTokenizer(tokenizer_object=backend, vocab={word: i for i, word in enumerate(words)}).save_pretrained(
        folder
    )


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_save_and_load(tmp_path, head, placement):
    model = randomise(ours(head, placement))
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors", *CODE}
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_several_files_and_half_precision(tmp_path, dtype):
    model = randomise(ours())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    state = BertLnForMaskedLM.from_pretrained(tmp_path, dtype=dtype).state_dict()
    assert all(torch.equal(value.to(dtype), state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole(copied):
    model = randomise(ours(sparse_prediction=True))
    again = copied(model)
    assert again.config.sparse_prediction is True
    assert again.cls.predictions.decoder.weight is again.get_input_embeddings().weight
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)


def test_fill_mask_pipeline(tmp_path):
    model = randomise(ours(vocab_size=9))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    fill = transformers.pipeline("fill-mask", str(tmp_path), top_k=9)
    scores = model(torch.tensor([[2, 5, 4, 7, 3]])).logits[0, 2].softmax(-1)
    for answer in fill("a [MASK] sat"):
        assert answer["score"] == pytest.approx(scores[answer["token"]].item(), rel=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_auto_classes(tmp_path, head):
    model = ours(head)
    model.save_pretrained(tmp_path)
    auto_class = getattr(transformers, f"Auto{head}" if head == "Model" else f"AutoModel{head}")
    assert type(auto_class.from_pretrained(tmp_path)) is type(model)
    assert type(auto_class.from_config(model.config)) is type(model)


def test_auto_tokenizer(tmp_path):
    ours().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, BertTokenizer)
    assert tokenizer("a cats").input_ids == [2, 5, 6, 8, 3]


@pytest.mark.parametrize("head", HEADS)
def test_stock_folder_loads_in_ours(tmp_path, head):
    theirs = randomise(stock(head))
    theirs.save_pretrained(tmp_path)
    model = getattr(bert_ln, f"BertLn{head}").from_pretrained(tmp_path)
    assert model.config.norm_placement == "post"
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("head", HEADS)
def test_post_ln_folder_loads_in_stock(tmp_path, head):
    model = randomise(ours(head, "post"))
    model.save_pretrained(tmp_path)
    theirs, info = getattr(transformers, f"Bert{head}").from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = theirs.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_post_ln_folder_gives_equal_logits_in_stock(tmp_path):
    model = randomise(ours("ForMaskedLM", "post"))
    model.save_pretrained(tmp_path)
    theirs = BertForMaskedLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(**batch()).logits, model(**batch()).logits, rtol=0, atol=0)


@pytest.mark.parametrize("settings", [{"placement": "pre"}, {"placement": "post", "embedding_norm": False}])
@pytest.mark.parametrize("stock_class", [BertModel, BertForMaskedLM, BertConfig])
def test_stock_refuses_what_it_would_compute_wrongly(tmp_path, settings, stock_class):
    model = ours("ForMaskedLM", **settings)
    model.save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match=r"layer_norm_eps[^?]*not stock BERT: norm_placement"):
        stock_class.from_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="not stock BERT"):
        BertConfig(**model.config.to_dict())


def test_stock_class_with_a_config_of_its_own_only_warns(tmp_path):
    """The limit of that guard, which is documented: this class never reads config.json."""
    ours().save_pretrained(tmp_path)
    _, info = BertForMaskedLM.from_pretrained(tmp_path, config=BertConfig(**SIZES), output_loading_info=True)
    assert any(key.endswith("LayerNorm.weight") for key in info["missing_keys"])
    assert any(key.endswith("pre_norm.weight") for key in info["unexpected_keys"])


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("how", ["keyword", "config", "config, without config.json"])
def test_other_placement_is_refused(tmp_path, placement, how):
    ours("ForMaskedLM", placement).save_pretrained(tmp_path)
    other = {"post": "pre", "pre": "post"}[placement]
    config = BertLnConfig(**SIZES, norm_placement=other)
    settings = {"norm_placement": other} if how == "keyword" else {"config": config}
    if "without" in how:
        (tmp_path / "config.json").unlink()
    for model_class in (BertLnForMaskedLM, BertLnModel, BertLnForSequenceClassification):
        with pytest.raises(ValueError, match=f"another architecture than norm_placement='{other}'"):
            model_class.from_pretrained(tmp_path, **settings)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_other_embedding_norm_is_refused(tmp_path, placement):
    ours("Model", placement, embedding_norm=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="embedding_norm=True"):
        BertLnModel.from_pretrained(tmp_path, embedding_norm=True)


def test_stock_folder_as_pre_ln_is_refused(tmp_path):
    stock().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json says norm_placement='post'"):
        BertLnForMaskedLM.from_pretrained(tmp_path, norm_placement="pre")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="10 norm parameters are missing"):
        BertLnForMaskedLM.from_pretrained(tmp_path, config=BertLnConfig(**SIZES))


@pytest.mark.parametrize("family", ["MegatronBert", "RobertaPreLayerNorm"])
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM"])
def test_folder_of_another_family_is_refused(tmp_path, family, head):
    stock(head, family=family).save_pretrained(tmp_path)
    for model_class in (BertLnModel, BertLnForMaskedLM):
        with pytest.raises(ValueError, match="another architecture"):
            model_class.from_pretrained(tmp_path, norm_placement="pre")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("layers", [1, 3])
def test_another_number_of_layers_as_stock(tmp_path, placement, layers):
    model = randomise(ours("ForMaskedLM", placement))
    model.save_pretrained(tmp_path)
    loaded = BertLnForMaskedLM.from_pretrained(tmp_path, num_hidden_layers=layers)
    assert len(loaded.bert.encoder.layer) == layers
    old, new = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old if name in new)
    (tmp_path / "config.json").unlink()
    other = {"post": "pre", "pre": "post"}[placement]
    config = BertLnConfig(**{**SIZES, "num_hidden_layers": layers}, norm_placement=other)
    with pytest.raises(ValueError, match="another architecture"):
        BertLnForMaskedLM.from_pretrained(tmp_path, config=config)


class Gain(nn.Module, norms.Norm):
    """A norm that no base class knows how to initialise."""

    def __init__(self, config, width):
        super().__init__()
        self.gain = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.gain, 3.0)

    def forward(self, x):
        return self.gain * x / x.norm(dim=-1, keepdim=True)


def test_missing_norms_start_as_new_and_loaded_ones_are_kept(monkeypatch):
    monkeypatch.setitem(norms.NORMS, "gain", Gain)
    config = BertLnConfig(**SIZES, norm_type="gain")
    loaded = {"embeddings.LayerNorm.gain": torch.full((SIZES["hidden_size"],), 5.0)}
    model = BertLnModel.from_pretrained(None, config=config, state_dict=loaded)
    assert model.embeddings.LayerNorm.gain.eq(5).all()
    assert all(n.gain.eq(3).all() for n in model.encoder.modules() if isinstance(n, Gain))
    loaded = {"embeddings.LayerNorm.weight": torch.full((SIZES["hidden_size"],), 5.0)}
    model = BertLnModel.from_pretrained(None, config=BertLnConfig(**SIZES), state_dict=loaded)
    assert model.embeddings.LayerNorm.weight.eq(5).all() and model.embeddings.LayerNorm.bias.eq(0).all()
    assert model.encoder.final_norm.weight.eq(1).all()


def test_norm_with_the_same_names_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(norms.NORMS, "other", type("Other", (norms.LayerNorm,), {}))
    ours("Model").save_pretrained(tmp_path)
    for settings in ({"norm_type": "other"}, {"config": BertLnConfig(**SIZES, norm_type="other")}):
        with pytest.raises(ValueError, match=r"config\.json says norm_type='layer_norm'"):
            BertLnModel.from_pretrained(tmp_path, **settings)


def test_new_heads_are_allowed(tmp_path):
    model = ours("ForMaskedLM")
    model.save_pretrained(tmp_path)
    classifier, info = BertLnForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= set(info["missing_keys"])
    old, new = model.bert.encoder.state_dict(), classifier.bert.encoder.state_dict()
    assert all(torch.equal(value, new[name]) for name, value in old.items())
    assert classifier.classifier.weight.std() > 0


def test_decoder_from_an_encoder_is_allowed(tmp_path):
    ours("Model").save_pretrained(tmp_path)
    model = BertLnModel.from_pretrained(tmp_path, is_decoder=True, add_cross_attention=True)
    assert model.encoder.layer[0].crossattention.output.pre_norm.weight.eq(1).all()


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("bert_ln", "recipes", "glue_eval"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
"""


def run_without_package(code, home, *arguments):
    """Run `code` in a process that is offline and cannot import our packages."""
    (home / "elsewhere").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(home / "modules"), "HF_HOME": str(home)}
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *map(str, arguments)],
        cwd=home / "elsewhere", env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


LOAD_EVERY_HEAD = """
import json, torch, transformers
from transformers import AutoConfig, AutoTokenizer

source, target, reference = sys.argv[1:]
flat = {name: torch.tensor(value) for name, value in json.load(open(reference)).items()}
expected = flat.pop("logits")
seen = []
heads = (
    "MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification", "QuestionAnswering",
    "MultipleChoice", "NextSentencePrediction",
)
for head in ("", *("For" + name for name in heads)):
    auto_class = getattr(transformers, "AutoModel" + head)
    loading = {"trust_remote_code": True, "output_loading_info": True}
    model, info = auto_class.from_pretrained(source, **loading)
    assert type(model.eval()).__module__.startswith("transformers_modules."), type(model)
    # A new head is missing from the source, and only that.
    new = {key.removeprefix("bert.").split(".")[0] for key in info["missing_keys"]}
    assert new <= {"pooler", "classifier", "qa_outputs", "cls"} and bool(new) == (head != "ForMaskedLM"), new
    if head in ("ForMaskedLM", "ForPreTraining"):
        embeddings = model.get_input_embeddings().weight
        assert model.cls.predictions.decoder.weight.data_ptr() == embeddings.data_ptr()
    choices = head == "ForMultipleChoice"
    inputs = {name: value.unsqueeze(0) if choices else value for name, value in flat.items()}
    outputs = model(**inputs)
    if head == "ForMaskedLM":
        torch.testing.assert_close(outputs.logits, expected)
    # A copy saved from here must be complete: it loads again, from its own folder.
    copy = f"{target}/{head or 'Base'}"
    model.save_pretrained(copy)
    again, info = auto_class.from_pretrained(copy, **loading)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    again.eval()
    torch.testing.assert_close(again(**inputs)[0], outputs[0])
    auto_map = json.load(open(copy + "/config.json"))["auto_map"]
    assert "modeling_bert_ln.BertLn" + (head or "Model") in auto_map.values(), auto_map
    seen.append(head)
AutoConfig.from_pretrained(source, trust_remote_code=True).save_pretrained(target + "/config_only")
assert len(AutoTokenizer.from_pretrained(source, trust_remote_code=True)) == 9
# Without trust too: a tokenizer needs no custom code. The loader would ask, and nobody answers.
assert len(AutoTokenizer.from_pretrained(source)) == 9
assert "bert_ln" not in sys.modules
print("loaded", len(seen))
"""


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_folder_is_complete_without_this_package(tmp_path, placement):
    source, target, reference = (tmp_path / name for name in ("source", "target", "reference.json"))
    model = randomise(ours("ForMaskedLM", placement))
    model.save_pretrained(source)
    save_tokenizer(source)
    inputs = batch()
    values = inputs | {"logits": model(**inputs).logits.detach()}
    reference.write_text(json.dumps({name: value.tolist() for name, value in values.items()}))
    run = run_without_package(LOAD_EVERY_HEAD, tmp_path, source, target, reference)
    assert run.returncode == 0, run.stderr
    assert f"loaded {len(HEADS)}" in run.stdout
    for folder in ("Base", "ForMaskedLM", "config_only"):
        assert {path.name for path in Path(target / folder).iterdir()} >= CODE
