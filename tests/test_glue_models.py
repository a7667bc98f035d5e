"""Which models are found, what is said of them, and what is refused."""

import json
import shutil

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Data2VecTextConfig,
    Data2VecTextForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
    ViTConfig,
    XLNetConfig,
    XLNetLMHeadModel,
)

from bert_ln import BertLnForMaskedLM
from glue_eval.arguments import build_glue_arguments
from glue_eval.models import Source, find_sources, inspect_model, load_classifier
from glue_eval.tasks import TASKS
from recipes.errors import UserError
from tests.glue_made_up import small_tokenizer, write_model_folder

SMALL = {
    "vocab_size": 600,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def inspect(folder, task="mrpc", max_seq_length=128, **how):
    return inspect_model(Source(str(folder), **how), TASKS[task], max_seq_length)


def arguments(**values):
    return build_glue_arguments({"task": "mrpc"} | {k: str(v) for k, v in values.items()})


@pytest.fixture
def run(tmp_path):
    """A pre-training run with complete checkpoints 4 and 12, and a torn one, 20."""
    folder = write_model_folder(tmp_path / "run")
    for step in (12, 4, 20):
        checkpoint = shutil.copytree(folder, tmp_path / "copy")
        if step != 20:
            (checkpoint / "complete.json").write_text("{}")
        shutil.move(checkpoint, folder / f"checkpoint-{step}")
    return folder


def test_every_complete_checkpoint_of_a_run_in_the_order_of_steps(run):
    sources = find_sources(arguments(run_dir=run))
    assert [(s.path, s.run, s.step) for s in sources] == [
        (str(run / "checkpoint-4"), str(run), 4),
        (str(run / "checkpoint-12"), str(run), 12),
    ]


def test_several_runs(run):
    other = shutil.copytree(run, run.parent / "other")
    assert [s.step for s in find_sources(arguments(run_dir=f"{run},{other}"))] == [4, 12, 4, 12]
    again = f"{run},{run.parent}/other/../run"
    assert [s.step for s in find_sources(arguments(run_dir=again))] == [4, 12]


def test_without_a_model_the_newest_checkpoint_of_the_default_run(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"accelerate launch recipes/pretrain\.py"):
        find_sources(arguments())
    (tmp_path / "output").mkdir()
    run.rename(tmp_path / "output" / "pretrain")
    (source,) = find_sources(arguments())
    assert (source.path, source.step) == ("output/pretrain/checkpoint-12", 12)


def test_a_checkpoint_by_its_name_keeps_its_step(run):
    (source,) = find_sources(arguments(model_name_or_path=run / "checkpoint-4"))
    assert (source.run, source.step) == (str(run), 4)
    (source,) = find_sources(arguments(model_name_or_path=run))
    assert (source.run, source.step) == (None, None)


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_what_is_new_is_listed_and_the_rest_is_that_of_the_folder(tmp_path, placement):
    folder = write_model_folder(tmp_path / "model", placement)
    model = inspect(folder)
    head = ["classifier.bias", "classifier.weight"]
    assert model.new_parameters == ["bert.pooler.dense.bias", "bert.pooler.dense.weight", *head]
    assert (model.norm_placement, model.max_length, model.token_types) == (placement, 64, True)
    loaded = load_classifier(Source(str(folder)), TASKS["mrpc"], seed=1).state_dict()
    for name, tensor in BertLnForMaskedLM.from_pretrained(folder).bert.state_dict().items():
        assert torch.equal(loaded[f"bert.{name}"], tensor)


def test_the_seed_decides_new_weights_only(tmp_path):
    source = Source(str(write_model_folder(tmp_path / "model")))
    one, again, other = (load_classifier(source, TASKS["mrpc"], seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    assert changed == {"classifier.weight", "bert.pooler.dense.weight"}


def test_a_fine_tuned_model_knows_the_names_of_its_labels(tmp_path):
    source = Source(str(write_model_folder(tmp_path / "model")))
    config = load_classifier(source, TASKS["mnli"], 1).config
    assert config.id2label == {0: "entailment", 1: "neutral", 2: "contradiction"}
    assert config.label2id["contradiction"] == 2
    config = load_classifier(source, TASKS["stsb"], 1).config
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_from_scratch_keeps_the_configuration_only(tmp_path):
    folder = write_model_folder(tmp_path / "model")
    source = Source(str(folder), from_scratch=True)
    trained, random = (
        load_classifier(Source(str(folder)), TASKS["rte"], 1),
        load_classifier(source, TASKS["rte"], 1),
    )
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(trained.state_dict()[query], random.state_dict()[query])
    assert random.config.norm_placement == "pre"
    assert inspect(folder, from_scratch=True).fingerprint != inspect(folder).fingerprint


def test_a_bf16_checkpoint_is_fine_tuned_in_float32(tmp_path):
    folder = write_model_folder(tmp_path / "model")
    BertLnForMaskedLM.from_pretrained(folder).bfloat16().save_pretrained(folder)
    assert load_classifier(Source(str(folder)), TASKS["mrpc"], 1).dtype == torch.float32


def test_any_encoder(tmp_path):
    small = {"n_layer": 2, "n_head": 2, "d_model": 32, "d_inner": 64, "vocab_size": 600}
    models = {
        # XLNet has no last position; the longest input is what is asked for, padded on the left.
        "xlnet": (XLNetLMHeadModel(XLNetConfig(**small)), 128, True),
        "data2vec": (Data2VecTextForMaskedLM(Data2VecTextConfig(**SMALL, max_position_embeddings=66,
                                             pad_token_id=1, type_vocab_size=1)), 64, False),
        "bert": (BertForMaskedLM(BertConfig(**SMALL, max_position_embeddings=64)), 64, True),
        # RoBERTa numbers positions from 2: 66 positions are 64 tokens; it has one token type.
        "roberta": (RobertaForMaskedLM(RobertaConfig(**SMALL, max_position_embeddings=66, pad_token_id=1,
                                                     type_vocab_size=1)), 64, False),
        "modernbert": (ModernBertForMaskedLM(ModernBertConfig(**SMALL, max_position_embeddings=90,
                                                              pad_token_id=0)), 90, False),
    }  # fmt: skip
    for name, (model, longest, token_types) in models.items():
        model.save_pretrained(tmp_path / name)
        small_tokenizer().save_pretrained(tmp_path / name)
        change_tokenizer(tmp_path / name, padding_side="left" if name == "xlnet" else "right")
        found = inspect(tmp_path / name)
        assert (found.max_length, found.token_types) == (longest, token_types), name
        assert found.pad_left == (name == "xlnet")
        assert any(n.startswith(("classifier", "logits_proj")) for n in found.new_parameters), name


def test_the_fingerprint_is_that_of_weights_configuration_and_vocabulary(tmp_path):
    folder = write_model_folder(tmp_path / "model")
    before = inspect(folder).fingerprint
    assert inspect(shutil.copytree(folder, tmp_path / "copy")).fingerprint == before
    assert inspect(folder, "mnli").fingerprint == before
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-5}))
    assert inspect(tmp_path / "copy").fingerprint != before
    model = BertLnForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[7, 0] += 1
    model.save_pretrained(folder)
    assert inspect(folder).fingerprint != before


def test_the_fingerprint_tells_tokenizers_apart_and_not_heads(tmp_path):
    folder = write_model_folder(tmp_path / "model")
    before = inspect(folder).fingerprint
    change_tokenizer(folder, do_lower_case=False)
    assert inspect(folder).fingerprint != before
    tuned = load_classifier(Source(str(folder)), TASKS["rte"], 1)
    tuned.save_pretrained(folder)
    assert len({inspect(folder, task).fingerprint for task in ("rte", "stsb", "mnli")}) == 1


def test_only_a_model_of_mnli_is_a_start_for_other_tasks(tmp_path):
    folder = write_model_folder(tmp_path / "model")
    with pytest.raises(UserError, match=r"from_task_checkpoint .*: is no model of MNLI"):
        inspect(folder, option="from_task_checkpoint")
    tokenizer = small_tokenizer()
    load_classifier(Source(str(folder)), TASKS["mnli"], 1).save_pretrained(tmp_path / "mnli")
    tokenizer.save_pretrained(tmp_path / "mnli")
    assert inspect(tmp_path / "mnli", "rte", option="from_task_checkpoint").new_parameters == [
        "classifier.bias",
        "classifier.weight",
    ]


def change_tokenizer(folder, **changes):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def break_folder(folder, how):
    if how == "tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif how == "weights":
        (folder / "model.safetensors").unlink()
    elif how == "config":
        (folder / "config.json").unlink()
    elif how == "truncated":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif how == "head":
        ViTConfig().save_pretrained(folder)
    elif how == "layers":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    elif how == "torn":
        (folder / "trainer").mkdir()
    elif how == "vocabulary":
        config = BertConfig(**SMALL | {"vocab_size": 200}, max_position_embeddings=64)
        BertForMaskedLM(config).save_pretrained(folder)
    elif how == "absent":
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("tokenizer", "has no tokenizer that loads|its tokenizer is not usable"),
        ("weights", "holds no weights"),
        ("config", "holds no config.json"),
        ("truncated", "does not load"),
        ("head", "a model of type vit has no sequence-classification head"),
        ("layers", "not those of its configuration; 16 parameters of the encoder"),
        ("torn", "is an incomplete checkpoint"),
        ("vocabulary", r"its tokenizer has \d+ tokens, its embedding 200 rows"),
        ("absent", "no such folder"),
    ],
)
def test_a_folder_that_is_no_model(tmp_path, how, message):
    folder = write_model_folder(tmp_path / "model")
    break_folder(folder, how)
    with pytest.raises(UserError, match=f"model_name_or_path {folder}: .*({message})"):
        inspect(folder)


def test_a_run_instead_of_a_checkpoint_is_pointed_out(run):
    (run / "config.json").unlink()
    with pytest.raises(UserError, match=r"give one of its checkpoints, such as .*checkpoint-12"):
        inspect(run)
    with pytest.raises(UserError, match=r"run_dir .*copies: holds no complete checkpoint"):
        find_sources(arguments(run_dir=run / "copies"))
