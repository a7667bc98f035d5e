"""BertLnConfig: what it accepts, what it refuses and how, what it writes."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from model_fixtures import SIZES
from transformers import AutoConfig, BertConfig

from bert_ln import BertLnConfig
from bert_ln.configuration_bert_ln import AUTO_MAP


def test_defaults():
    config = BertLnConfig()
    assert (config.norm_placement, config.norm_type, config.embedding_norm) == ("pre", "layer_norm", True)
    assert config.sparse_prediction is False
    assert config.hidden_size == BertConfig().hidden_size


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"norm_placement": "pree"}, ["norm_placement", "'pree'", "'post'", "did you mean 'pre'"]),
        ({"norm_type": "layernorm"}, ["norm_type", "'layernorm'", "did you mean 'layer_norm'"]),
        ({"norm_placement": 3}, ["norm_placement", "3"]),
        ({"embedding_norm": "yes"}, ["embedding_norm", "bool"]),
        ({"sparse_prediction": 1}, ["sparse_prediction", "bool"]),
        ({"layer_norm_eps": "1e-12"}, ["layer_norm_eps"]),
        ({"hidden_size": 30, "num_attention_heads": 4}, ["hidden_size (30)", "num_attention_heads (4)"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_attention_heads": -1}, ["num_attention_heads", "-1"]),
        ({"vocab_size": 0}, ["vocab_size", "0"]),
    ],
)
def test_refuses_bad_values(settings, words):
    with pytest.raises(StrictDataclassError) as error:
        BertLnConfig(**settings)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ["norm_placment", "norm_placements", "hidden_sise", "embeding_norm"])
def test_refuses_misspelt_keywords(name, tmp_path):
    with pytest.raises(TypeError, match=rf"'{name}'; did you mean '"):
        BertLnConfig(**{name: "pre"})
    BertLnConfig().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=rf"'{name}'; did you mean '"):
        BertLnConfig.from_pretrained(tmp_path, **{name: "pre"})


def test_extras_of_hub_configs_pass():
    extras = {
        "position_embedding_type": "absolute",
        "gradient_checkpointing": False,
        "directionality": "bidi",
        "pooler_num_attention_heads": 12,
        "layer_norm_epsilon": 1e-12,
        "_num_labels": 2,
        "num_labels": 5,
        "output_past": True,
        "torch_dtype": "float32",
        "finetuning_task": None,
    }
    config = BertLnConfig(**extras)
    assert config.num_labels == 5
    assert config.directionality == "bidi"


def test_overrides_of_a_folder_are_checked(tmp_path):
    BertLnConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="num_attention_heads"):
        BertLnConfig.from_pretrained(tmp_path, num_attention_heads=5)
    with pytest.raises(StrictDataclassError, match="norm_placement"):
        BertLnConfig.from_pretrained(tmp_path, norm_placement="before")


def test_stock_config_is_post_ln(tmp_path):
    BertConfig(**SIZES).save_pretrained(tmp_path)
    config = BertLnConfig.from_pretrained(tmp_path)
    assert config.norm_placement == "post"
    assert config.hidden_size == SIZES["hidden_size"]
    assert BertLnConfig.from_dict({"model_type": "bert", "norm_placement": "pre"}).norm_placement == "pre"
    assert BertLnConfig.from_dict({"model_type": "bert_ln"}).norm_placement == "pre"


@pytest.mark.parametrize("placement", ["post", "pre"])
@pytest.mark.parametrize("embedding_norm", [True, False])
def test_round_trip(tmp_path, placement, embedding_norm):
    settings = {"norm_placement": placement, "embedding_norm": embedding_norm, "layer_norm_eps": 1e-7}
    config = BertLnConfig(**SIZES, **settings, num_labels=5, sparse_prediction=True)
    config.save_pretrained(tmp_path)
    again = BertLnConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert {name: getattr(again, name) for name in settings} == settings
    assert again.num_labels == 5
    assert isinstance(AutoConfig.from_pretrained(tmp_path), BertLnConfig)
    assert BertLnConfig.from_dict(config.to_dict()).layer_norm_eps == 1e-7
    assert BertLnConfig.from_json_file(tmp_path / "config.json").layer_norm_eps == 1e-7


def test_saved_config_names_its_code_and_never_a_way_of_running(tmp_path):
    config = BertLnConfig(**SIZES, sparse_prediction=True)
    # What the Hub's loader leaves behind in a config that came from a repository.
    config.auto_map = {"AutoModel": "someone/repository--modeling_bert_ln.BertLnModel"}
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["auto_map"] == AUTO_MAP
    assert written["sparse_prediction"] is False
    names = {path.name for path in tmp_path.iterdir()}
    code = {"configuration_bert_ln.py", "modeling_bert_ln.py", "norms.py", "placements.py"}
    assert names == {"config.json", *code}
