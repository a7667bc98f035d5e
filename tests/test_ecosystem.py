"""The recipes of docs/ecosystem.md, executed as they stand there on checkpoints of the training loop."""

import functools
import json
import pickle
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from bert_ln import conversion
from recipes.command_line import build_arguments
from recipes.pretraining import pretrain
from tests.conftest import ROOT, TINY
from tests.test_loading import run_without_package

PRE, POST = {}, {"norm_placement": "post"}
DEEP = {"norm_placement": "deep_norm", "norm_type": "rms_norm"}
# A mask for each pair of tokens, and a norm across tokens.
WINDOW, FRN = {"attention_window": 2}, {"norm_type": "frn"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SHAPES = [(1, 9), (5, 64), (2, 1), (1, 1), (3, 20)]


def named(settings):
    return "-".join(f"{name}={value}" for name, value in settings.items()) or "pre"


@pytest.fixture(scope="session")
def trained(corpus_dir, cache_dir, tmp_path_factory):
    """Gives the folder of a short run of a method; its weights start large, so that attention matters."""
    made = {"train_file": str(corpus_dir), "cache_dir": str(cache_dir), "initializer_range": 0.2}

    @functools.cache
    def run(**settings):
        folder = tmp_path_factory.mktemp("run")
        pretrain(build_arguments(TINY | made | {"output_dir": str(folder), "save_steps": 12} | settings))
        return folder

    return run


@pytest.fixture
def run_dir(trained, tmp_path, monkeypatch):
    """Puts a copy of such a run where the recipes expect it."""

    def put(**settings):
        monkeypatch.chdir(tmp_path)
        return shutil.copytree(trained(**settings), "output/pretrain")

    return put


def recipe(heading, language="python"):
    """The code under a heading of docs/ecosystem.md."""
    section = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    return re.search(f"```{language}\n(.*?)```", section, re.DOTALL)[1]


def follow(heading):
    """Executes a recipe and gives its names."""
    names = {"__name__": heading}
    exec(compile(recipe(heading), heading, "exec"), names)
    return names


def inputs(rows, length, seed=0):
    """Token ids as no recipe has them; the last row has padding, where there is room."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, TINY["vocab_size"], (rows, length), generator=generator)
    segments, mask = torch.zeros_like(ids), torch.ones_like(ids)
    segments[:, length // 2 :] = 1
    mask[-1, max(1, length - 3) :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": segments}


@torch.no_grad()
def logits(model, **batch):
    return model(**batch).logits


def assert_agrees(model, other, atol):
    """`other` maps the inputs to logits, and gives those of `model`, whatever the shape and the padding."""
    for rows, length in SHAPES:
        batch = inputs(rows, length)
        real = batch["attention_mask"].bool().numpy()
        expected, found = logits(model, **batch).numpy(), np.asarray(other(batch))
        np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=atol)
    ignored = logits(model, **batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}).numpy()
    assert abs(ignored - expected)[real].max() > 100 * atol  # else padding would show nothing


# --- transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [PRE, POST], ids=named)
def test_pipeline(run_dir, settings):
    run_dir(**settings)
    names = follow("Pipelines")
    tokenizer = AutoTokenizer.from_pretrained("output/pretrain")
    batch = tokenizer("The [MASK] of the United States.", return_tensors="pt")
    model = AutoModelForMaskedLM.from_pretrained("output/pretrain/checkpoint-12")
    best = logits(model, **batch)[batch["input_ids"] == tokenizer.mask_token_id].softmax(-1)[0].topk(5)
    assert [answer["token"] for answer in names["answers"]] == best.indices.tolist()
    assert [answer["score"] for answer in names["answers"]] == pytest.approx(best.values.tolist(), rel=1e-4)


HEADS_WITHOUT_PACKAGE = """
import torch, transformers

for head in sys.argv[2].split():
    model = getattr(transformers, head).from_pretrained(sys.argv[1], trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    ids = torch.arange(5, 15).view(1, 2, 5) if "Choice" in head else torch.arange(5, 15).view(2, 5)
    assert model(input_ids=ids)[0].isfinite().all()
fill = transformers.pipeline("fill-mask", sys.argv[1], trust_remote_code=True)
print(len(fill("The [MASK] of the United States.")))
"""


def test_auto_classes_without_this_package(run_dir, tmp_path):
    folder = tmp_path / run_dir(**DEEP)
    code = recipe("Auto classes").replace("output/pretrain", str(folder)) + HEADS_WITHOUT_PACKAGE
    heads = ["AutoModel", *(f"AutoModelFor{head}" for head in documented_heads())]
    done = run_without_package(code, tmp_path, folder, " ".join(heads))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "5"


def documented_heads():
    text = (ROOT / "docs" / "ecosystem.md").read_text(encoding="utf-8")
    heads = re.findall(r"`(\w+)`", re.search(r"`AutoModelFor...`: (.*?)\.", text)[1])
    assert len(heads) == 7
    return heads


def test_trainer_continues(run_dir, tmp_path):
    run_dir()
    trainer = follow("transformers.Trainer")["trainer"]
    assert trainer.state.global_step == 4
    old, new = (load_file(f"output/{name}/model.safetensors") for name in ("pretrain", "continued"))
    assert old.keys() == new.keys()
    assert all(not torch.equal(value, new[name]) for name, value in old.items() if name.endswith("weight"))
    fill = 'import transformers; transformers.pipeline("fill-mask", sys.argv[1], trust_remote_code=True)'
    done = run_without_package(fill, tmp_path, tmp_path / "output" / "continued")
    assert done.returncode == 0, done.stderr


def masked_rows():
    """32 rows of unequal length, masked once: the pieces of an update hold the same, however it is cut."""
    tokenizer = AutoTokenizer.from_pretrained("output/pretrain")
    rows = [tokenizer("peace and war " * (1 + 9 * (i % 8 == 0)) + "of states " * (i % 5)) for i in range(32)]
    masked = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)(rows)
    return [{name: values[i] for name, values in masked.items()} for i in range(32)]


def one_update(model_class, rows, steps):
    """Loss and gradient norm of one update on all rows, in `steps` pieces."""
    arguments = TrainingArguments(
        "output/update", per_device_train_batch_size=len(rows) // steps, gradient_accumulation_steps=steps,
        max_steps=1, logging_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    model = model_class.from_pretrained("output/pretrain", **NO_DROPOUT)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    log = trainer.state.log_history[0]
    return log["loss"], float(log["grad_norm"])


def test_accumulation_is_right_where_stock_is_wrong(run_dir):
    run_dir(**POST)  # the stock class loads it too
    torch.manual_seed(0)
    rows = masked_rows()
    whole = one_update(BertForMaskedLM, rows, 1)
    for steps in (1, 4, 8):
        assert one_update(AutoModelForMaskedLM, rows, steps) == pytest.approx(whole, rel=1e-4)
    stock_loss, stock_norm = one_update(BertForMaskedLM, rows, 4)
    assert (stock_loss, stock_norm) == pytest.approx((4 * whole[0], 4 * whole[1]), rel=0.2)


def test_datasets(run_dir):
    pytest.importorskip("datasets")
    run_dir(**POST)
    names = follow("datasets")
    assert names["trainer"].evaluate()["eval_loss"] < 0.1  # two sentences, and a coin is 0.69
    again = AutoModelForSequenceClassification.from_pretrained("output/classifier")
    assert again.config.num_labels == 2
    batch = names["tokenizer"]("Peace with all nations.", return_tensors="pt")
    assert torch.equal(logits(again, **batch), logits(names["model"].eval().cpu(), **batch))


# --- peft ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [PRE, POST], ids=named)
def test_peft(run_dir, settings):
    pytest.importorskip("peft")
    folder = run_dir(**settings)
    names = follow("peft")
    adapter = names["adapter"].eval().cpu()
    old = load_file(f"{folder}/model.safetensors")
    state = adapter.base_model.model.state_dict()
    assert all(value.any() for name, value in state.items() if "lora_B" in name)  # they start as 0
    kept = {name.replace(".base_layer", ""): value for name, value in state.items()}
    encoder = [name for name in old if name.startswith("bert.")]
    assert encoder and all(torch.equal(old[name], kept[name]) for name in encoder)
    batch = inputs(4, 12)
    expected = logits(adapter, **batch)
    with adapter.disable_adapter():
        assert (logits(adapter, **batch) - expected).abs().max() > 0.1
    reloaded = AutoModelForSequenceClassification.from_pretrained("output/merged")
    for model in (names["merged"], reloaded):
        torch.testing.assert_close(logits(model, **batch), expected, rtol=1e-4, atol=1e-5)


def merging_changes(targets):
    """By how much merging adapters of random weights changes the logits."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForMaskedLM.from_pretrained("output/pretrain")
    torch.manual_seed(0)
    adapter = get_peft_model(model, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    before = logits(adapter, **inputs(4, 12))
    return (logits(adapter.merge_and_unload(), **inputs(4, 12)) - before).abs().max()


@pytest.mark.parametrize("settings", [{"qk_norm": "l2"}, {"norm_placement": "hybrid_norm"}], ids=named)
def test_adapters_behind_norms_cannot_be_merged(run_dir, settings):
    pytest.importorskip("peft")
    run_dir(**settings)
    assert merging_changes(["query", "value"]) > 0.1
    assert merging_changes(["dense"]) < 1e-4


# --- sentence-transformers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [PRE, POST], ids=named)
def test_sentence_transformers(run_dir, tmp_path, settings):
    module = pytest.importorskip("sentence_transformers")
    run_dir(**settings)
    before = module.SentenceTransformer("output/pretrain").encode(["The Union", "Peace"])
    tokenizer = AutoTokenizer.from_pretrained("output/pretrain")
    batch = tokenizer(["The Union", "Peace"], padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = transformers.AutoModel.from_pretrained("output/pretrain")(**batch).last_hidden_state
    weights = batch["attention_mask"].unsqueeze(-1)
    np.testing.assert_allclose(before, (hidden * weights).sum(1) / weights.sum(1), atol=1e-5)
    names = follow("sentence-transformers")
    assert abs(names["embeddings"] - before).max() > 1e-2
    code = (
        "import sentence_transformers as s; "
        "print(s.SentenceTransformer(sys.argv[1], trust_remote_code=True).encode(['The Union']).tolist())"
    )
    done = run_without_package(code, tmp_path, tmp_path / "output" / "sentences")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), names["embeddings"][:1], atol=1e-5)


# --- export, compilation, quantisation ----------------------------------------------------------------------


@pytest.mark.parametrize("settings", [PRE, DEEP, WINDOW], ids=named)
def test_torch_export(run_dir, settings):
    run_dir(**settings)
    names = follow("torch.export")
    program = torch.export.load("output/model.pt2").module()
    assert_agrees(names["model"], lambda batch: logits(program, **batch), atol=1e-5)


@pytest.mark.parametrize("settings", [PRE, POST, DEEP, WINDOW, FRN], ids=named)
def test_onnx(run_dir, settings):
    pytest.importorskip("onnxscript")  # brings onnx
    pytest.importorskip("onnxruntime")
    run_dir(**settings)
    names = follow("ONNX")
    expected = logits(names["model"], **names["example"])
    real = names["example"]["attention_mask"].bool()
    np.testing.assert_allclose(names["logits"][real], expected[real], atol=1e-4)

    def run(batch):
        return names["session"].run(None, {name: value.numpy() for name, value in batch.items()})[0]

    assert_agrees(names["model"], run, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PRE, DEEP], ids=named)
def test_torch_compile(run_dir, settings):
    run_dir(**settings)
    torch._dynamo.reset()
    names = follow("torch.compile")
    plain = AutoModelForMaskedLM.from_pretrained("output/pretrain")
    assert_agrees(plain, lambda batch: logits(names["model"], **batch), atol=1e-4)


def test_compiled_models_are_saved_under_the_usual_names(run_dir):
    usual = load_file(f"{run_dir()}/model.safetensors")
    model = AutoModelForMaskedLM.from_pretrained("output/pretrain")
    assert any(name.startswith("_orig_mod.") for name in torch.compile(model).state_dict())
    torch.compile(model).save_pretrained("output/wrapped")
    model.compile()
    model.save_pretrained("output/compiled")
    for folder in ("wrapped", "compiled"):
        assert load_file(f"output/{folder}/model.safetensors").keys() == usual.keys()


@pytest.mark.parametrize("settings", [PRE, POST, DEEP], ids=named)
def test_torchao(run_dir, settings):
    pytest.importorskip("torchao")
    run_dir(**settings)
    names = follow("torchao")
    plain = AutoModelForMaskedLM.from_pretrained("output/pretrain")
    batch = inputs(4, 20)
    expected, found = logits(plain, **batch), logits(names["model"], **batch)
    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.05
    assert torch.equal(logits(names["again"], **batch), found)
    matrices = [m.weight for m in plain.bert.encoder.modules() if isinstance(m, nn.Linear)]
    before, after = (Path(f"output/{name}/model.safetensors").stat().st_size for name in ("pretrain", "int8"))
    assert before - after > 0.5 * sum(matrix.nbytes for matrix in matrices)  # the rest is scales


# --- safetensors, stock classes -----------------------------------------------------------------------------


class Poison:
    def __reduce__(self):
        return Path.touch, (Path("poisoned"),)


def test_safetensors_only(run_dir):
    folder = Path(run_dir())
    suffixes = {file.suffix for file in folder.rglob("*") if "trainer" not in file.parts}
    assert ".safetensors" in suffixes
    assert not suffixes & {".bin", ".pt", ".pt2", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz"}
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"bert.pooler.dense.weight": Poison()}))
    model = AutoModelForMaskedLM.from_pretrained("output/pretrain")
    assert not Path("poisoned").exists()
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in follow("safetensors")["weights"].items())
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert Path("poisoned").exists()


@pytest.mark.parametrize(
    ("settings", "family", "stock"),
    [
        (PRE, "roberta-prelayernorm", "RobertaPreLayerNormForMaskedLM"),
        (PRE | {"embedding_norm": False}, "megatron-bert", "MegatronBertForMaskedLM"),
        (POST, "bert", "BertForMaskedLM"),
    ],
)
def test_stock_classes(run_dir, settings, family, stock):
    run_dir(**settings)
    words = shlex.split(recipe("Stock classes", "bash"))
    assert words[:3] == ["python", "-m", "bert_ln.conversion"]
    assert conversion.main([*words[3:-1], family]) == 0
    model = AutoModelForMaskedLM.from_pretrained("output/stock")
    assert type(model) is getattr(transformers, stock)
    assert not list(Path("output/stock").glob("*.py"))
    ours = AutoModelForMaskedLM.from_pretrained("output/pretrain")
    assert_agrees(ours, lambda batch: logits(model, **batch), atol=1e-4)
    assert AutoTokenizer.from_pretrained("output/stock").mask_token == "[MASK]"


def test_other_methods_have_no_stock_class(run_dir, capsys):
    run_dir(**DEEP)
    assert conversion.main(shlex.split(recipe("Stock classes", "bash"))[3:]) == 2
    assert "no stock architecture does" in capsys.readouterr().err
