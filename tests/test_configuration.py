"""BertLnConfig: what it accepts, what it refuses and how, what it writes."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from model_fixtures import CODE, SIZES, ours
from transformers import AutoConfig, BertConfig, BertModel

from bert_ln import BertLnConfig, BertLnModel
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
    ],
)
def test_refuses_bad_values(settings, words):
    with pytest.raises(StrictDataclassError) as error:
        BertLnConfig(**settings)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": 30}, ["hidden_size=30", "num_attention_heads=4"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers=-1", "at least 0"]),
        ({"num_attention_heads": 0}, ["num_attention_heads=0", "at least 1"]),
        ({"vocab_size": 0}, ["vocab_size=0", "at least 1"]),
        ({"hidden_dropout_prob": 3.0}, ["hidden_dropout_prob=3.0", "between 0 and 1"]),
        ({"attention_probs_dropout_prob": -0.1}, ["attention_probs_dropout_prob=-0.1"]),
        ({"classifier_dropout": 2.0}, ["classifier_dropout=2.0"]),
        ({"layer_norm_eps": -1.0}, ["layer_norm_eps=-1.0", "above 0"]),
        ({"hidden_act": "gelo"}, ["hidden_act='gelo'", "'gelu'"]),
        ({"add_cross_attention": True}, ["add_cross_attention=True", "is_decoder=True"]),
    ],
)
def test_refuses_to_build(settings, words):
    with pytest.raises(ValueError) as error:
        ours("ForMaskedLM", **settings)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("number", [{}, {"a": 1e-12, "b": 1e-6}])
def test_epsilon_is_one_number(number):
    with pytest.raises(ValueError, match="must be one number"):
        BertLnConfig(layer_norm_eps=number)


@pytest.mark.parametrize(
    "settings",
    [{"hidden_size": 37}, {"hidden_size": 0}, {"num_attention_heads": 0}, {"num_hidden_layers": 0}],
)
def test_holds_what_a_stock_config_holds(settings):
    """Tools of transformers make configs that are never built."""
    assert settings.items() <= BertConfig(**settings).to_dict().items()
    assert settings.items() <= BertLnConfig(**settings).to_dict().items()


def test_no_layers_as_stock():
    assert len(BertModel(BertConfig(**{**SIZES, "num_hidden_layers": 0})).encoder.layer) == 0
    assert len(ours("Model", num_hidden_layers=0).encoder.layer) == 0


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
        "tie_encoder_decoder": False,
        "torchscript": False,
        "pruned_heads": {},
        "use_bfloat16": False,
        "cross_attention_hidden_size": None,
        "decoder_start_token_id": None,
        "sep_token_id": None,
    }
    config = BertLnConfig(**extras)
    assert config.num_labels == 5
    assert config.directionality == "bidi"


def test_overrides_of_a_folder_are_checked(tmp_path):
    BertLnConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="num_attention_heads=5"):
        BertLnModel(BertLnConfig.from_pretrained(tmp_path, num_attention_heads=5))
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
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", *CODE}
