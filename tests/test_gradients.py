"""The gradient probe: what it measures, against sums written out by hand, and its command."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bert_ln.placements import PLACEMENTS
from recipes import gradient_study, gradients
from recipes.command_line import parse_arguments
from recipes.errors import UserError
from recipes.gradient_arguments import parse_gradient_arguments
from recipes.gradient_probe import measure, xavier_
from recipes.gradient_report import _style, report_text, summarise
from recipes.gradient_study import load_model, plan
from recipes.pretraining import pretrain
from tests.model_fixtures import SIZES, mlm_labels, ours, randomise

# Norms in a layer, and at both ends of the encoder, written from the papers' formulas.
NORMS = {
    "post": (2, 1),
    "pre": (2, 2),
    "sandwich": (4, 2),
    "sub_ln": (4, 2),
    "normformer": (4, 2),
    "deep_norm": (2, 1),
    "b2t": (2, 1),
    "residual_dual": (2, 2),
    "admin": (2, 1),
    "recursive_skip": (4, 1),
    "mix_ln": (2, 2),
    "hybrid_norm": (4, 2),
    "re_zero": (0, 0),
    "t_fixup": (0, 0),
}
SMALL = {
    "vocab_size": 1000,
    "max_seq_length": 32,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "per_device_train_batch_size": 4,
    "num_batches": 2,
    "validation_split_percentage": 10,
    "seeds": 1,
    "warmup_steps": 2,
}


def batches_of(sizes, rate=0.4):
    """Batches of so many blocks, with labels at random positions."""
    tokens = torch.randint(
        5, SIZES["vocab_size"], (sum(sizes), 12), generator=torch.Generator().manual_seed(7)
    )
    labels = mlm_labels(tokens, rate=rate)
    parts = zip(tokens.split(sizes), labels.split(sizes))
    return [{"input_ids": ids, "labels": targets} for ids, targets in parts]


def model_of(placement, **settings):
    return randomise(ours(placement=placement, num_hidden_layers=3, **settings))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_gradient_is_averaged_over_batches_before_its_norm_is_taken(placement):
    model, batches = model_of(placement), batches_of([1, 4, 2])
    found = measure(model, batches)
    matrix = model.bert.encoder.layer[1].output.dense.weight
    by_hand, masked = [], []
    for batch in batches:
        logits = model(batch["input_ids"]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        by_hand.append(torch.autograd.grad(loss, matrix)[0])
        masked.append((batch["labels"] != -100).sum())
    expected = sum(n * g for n, g in zip(masked, by_hand)) / sum(masked)
    assert found.w2_gradient[1] == pytest.approx(expected.norm().item(), rel=1e-4)
    mean_of_norms = np.mean([g.norm().item() for g in by_hand])
    assert found.w2_batch_gradient[1] == pytest.approx(mean_of_norms, rel=1e-4)
    assert mean_of_norms > 1.1 * found.w2_gradient[1]


def test_w1_is_the_first_matrix_and_w2_the_second():
    model, (batch,) = model_of("pre"), batches_of([3])
    found = measure(model, [batch])
    model(**batch).loss.backward()
    for number, layer in enumerate(model.bert.encoder.layer):
        w1, w2 = layer.intermediate.dense.weight.grad, layer.output.dense.weight.grad
        assert found.w1_gradient[number] == pytest.approx(w1.norm().item(), rel=1e-4)
        assert found.w2_gradient[number] == pytest.approx(w2.norm().item(), rel=1e-4)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_how_many_blocks_are_measured_at_once_does_not_matter(placement):
    model = model_of(placement)
    one, several = (vars(measure(model, batches_of(sizes))) for sizes in ([6], [1, 2, 3]))
    for name in set(one) - {"w1_batch_gradient", "w2_batch_gradient"}:
        values = [list(m[name].values()) if isinstance(m[name], dict) else m[name] for m in (one, several)]
        np.testing.assert_allclose(*values, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_norm_of_the_encoder_is_found_and_its_input_measured(placement):
    model, (batch,) = model_of(placement), batches_of([3])
    found = measure(model, [batch]).norm_inputs
    norms = {name: m for name, m in model.bert.named_modules() if isinstance(m, nn.LayerNorm)}
    in_layer, at_the_ends = NORMS[placement]
    assert len(norms) == 3 * in_layer + at_the_ends
    assert set(found) == set(norms)
    if not norms:
        return
    assert next(iter(found)) == "embeddings.LayerNorm"
    embeddings = model.bert.embeddings
    first = embeddings.word_embeddings(batch["input_ids"]) + embeddings.token_type_embeddings.weight[0]
    first = first + embeddings.position_embeddings.weight[:12]
    assert found["embeddings.LayerNorm"] == pytest.approx(first.square().mean().item(), rel=1e-5)


def test_the_hidden_state_is_the_sum_that_lemma_2_speaks_of():
    (batch,) = batches_of([3])
    for placement in ("post", "pre"):
        model = model_of(placement)
        found = measure(model, [batch]).hidden_state
        x, expected = model.bert.embeddings(batch["input_ids"]), []
        for layer in model.bert.encoder.layer:
            middle = layer.attention(x)[0]
            norm = layer.output.LayerNorm if placement == "post" else layer.output.pre_norm
            inside = middle if placement == "post" else norm(middle)
            total = middle + layer.output.dense(layer.intermediate(inside))
            expected.append(total.square().mean().item())
            x = norm(total) if placement == "post" else total
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_what_passes_straight_through_is_the_projection_on_the_gradient_behind():
    model, (batch,) = model_of("post"), batches_of([2])
    found = measure(model, [batch])
    states = model(**batch, output_hidden_states=True).hidden_states[1:]
    model.zero_grad()
    count = (batch["labels"] != -100).sum()
    logits = model.cls(states[-1])
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()) * count
    before, behind = torch.autograd.grad(loss, states[1:])
    expected = (before * behind).sum() / behind.square().sum()
    assert found.straight_through[1] == pytest.approx(expected.item(), rel=1e-4)
    rms = before.square().sum(dim=-1).mean().sqrt()
    assert found.stream_gradient[1] == pytest.approx(rms.item(), rel=1e-4)


def test_nothing_is_left_behind_and_dropout_is_off():
    model, batches = model_of("pre", hidden_dropout_prob=0.5).train(), batches_of([2, 2])
    assert measure(model, batches) == measure(model, batches)
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_xavier_draws_every_linear_matrix_but_the_tied_one():
    model = ours(hidden_size=96, intermediate_size=384, vocab_size=500, initializer_range=0.01)
    embedding = model.get_input_embeddings().weight.clone()
    xavier_(model)
    layer = model.bert.encoder.layer[1]
    for matrix in (layer.attention.self.key, layer.intermediate.dense, layer.output.dense):
        variance = 2 / sum(matrix.weight.shape)
        assert matrix.weight.std().item() == pytest.approx(math.sqrt(variance), rel=0.03)
        assert not matrix.bias.any()
    assert torch.equal(model.get_input_embeddings().weight, embedding)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_checkpoint_gives_what_the_model_in_memory_gives(placement, tmp_path):
    model, batches = model_of(placement), batches_of([2, 3])
    model.save_pretrained(tmp_path)
    loaded, in_memory = vars(measure(load_model(tmp_path), batches)), vars(measure(model, batches))
    for name, value in in_memory.items():
        assert loaded[name] == pytest.approx(value, rel=1e-5), name


@pytest.fixture
def command(corpus_dir, cache_dir, tmp_path, monkeypatch, capsys):
    """Runs recipes/gradients.py on the small corpus; returns exit code and what it said."""

    def start(**changes):
        options = SMALL | {"train_file": corpus_dir, "cache_dir": cache_dir, "output_dir": tmp_path / "out"}
        words = ["gradients.py"]
        for name, value in (options | changes).items():
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        monkeypatch.setattr(sys, "argv", words)
        code = gradients.main()
        said = capsys.readouterr()
        return code, said.out + said.err

    return start


def test_the_command_measures_reports_and_reuses(command, tmp_path):
    out = tmp_path / "out"
    settings = {"depths": [1, 2], "num_hidden_layers": 2, "learning_rate": 0}
    code, said = command(**settings)
    assert code == 0, said
    assert "14 measurements, 14 to make" in said
    measurements = json.loads((out / "gradients.json").read_text())["measurements"]
    by_point = {(m["kind"], m["norm_placement"], m["num_hidden_layers"]): m for m in measurements}
    assert len(by_point) == 14
    # A warm-up at rate 0 leaves the model where it began: the probe starts from a run's weights and batches.
    for placement in ("post", "pre"):
        fresh, warm = (by_point[kind, placement, 2] for kind in ("bert", "warmup"))
        assert warm["w2_gradient"] == pytest.approx(fresh["w2_gradient"], rel=1e-6)
    report = (out / "report.md").read_text()
    for name in ("gradient_by_layer", "gradient_by_depth", "hidden_states", "towards_the_input"):
        assert f"({name}.png)" in report
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{name}.svg").read_text()
    files = {file: file.stat().st_mtime_ns for file in (out / "measurements").iterdir()}
    code, said = command(**settings | {"inits": "bert"})
    assert code == 0
    assert "6 measurements, 0 to make" in said
    assert files == {file: file.stat().st_mtime_ns for file in (out / "measurements").iterdir()}
    code, said = command(**settings | {"num_batches": 3})
    assert (code, "num_batches is 3, was 2" in said) == (2, True)
    # The run's folder is a checkpoint like any other.
    folder = out / "warmup" / "warmup-pre-2layers-seed42"
    code, said = command(**settings | {"checkpoints": str(folder), "inits": "none"})
    assert code == 0, said
    (measured,) = json.loads((out / "gradients.json").read_text())["measurements"]
    assert measured["w2_gradient"] == by_point["warmup", "pre", 2]["w2_gradient"]


@pytest.mark.filterwarnings("error:constrained_layout not applied")  # a legend as large as the figure
def test_the_command_measures_and_draws_every_placement(command, tmp_path, monkeypatch):
    """More placements than a figure has colours, and those whose gradients start at 0."""
    warmed_up = []

    def in_this_process(words, **_):
        warmed_up.append(words)
        pretrain(parse_arguments(words[2:]))
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(gradient_study, "subprocess", SimpleNamespace(run=in_this_process))
    settings = {"norm_placements": "all", "depths": [1], "num_hidden_layers": 2, "max_eval_samples": 8}
    code, said = command(**settings)
    assert code == 0, said
    assert len(warmed_up) == len(PLACEMENTS)
    measurements = json.loads((tmp_path / "out" / "gradients.json").read_text())["measurements"]
    kinds = {"bert": (1, 2), "xavier": (1, 2), "theory": (1, 2), "warmup": (2,)}
    found = [(m["kind"], m["norm_placement"], m["num_hidden_layers"]) for m in measurements]
    expected = {(kind, p, depth) for kind, depths in kinds.items() for p in PLACEMENTS for depth in depths}
    assert len(found) == len(expected) and set(found) == expected
    for one in measurements:
        in_layer, at_the_ends = NORMS[one["norm_placement"]]
        ends = at_the_ends - (one["kind"] == "theory" and at_the_ends > 0)  # it has no embedding norm
        assert len(one["norm_inputs"]) == one["num_hidden_layers"] * in_layer + ends
        starts_at_0 = one["norm_placement"] == "re_zero" and one["kind"] != "warmup"
        assert all((gradient == 0) == starts_at_0 for gradient in one["w1_gradient"]), one
    report = (tmp_path / "out" / "report.md").read_text()
    assert "nan" not in report.lower()
    for name in ("gradient_by_layer", "gradient_by_depth", "hidden_states", "towards_the_input"):
        picture = (tmp_path / "out" / f"{name}.svg").read_text()
        drawn = {placement for placement in PLACEMENTS if f"<!-- {placement}" in picture}
        # Of gradients that are all 0 there is no exponent.
        without = {"re_zero"} if name == "gradient_by_depth" else set()
        assert drawn == set(PLACEMENTS) - without, name


def test_every_placement_has_a_line_of_its_own():
    ones = [measurement(seed, placement=placement) for placement in PLACEMENTS for seed in range(2)]
    summary = summarise(ones)
    styles = [_style(summary, group) for group in summary["groups"]]
    assert len({(style["color"], style["ls"]) for style in styles}) == len(PLACEMENTS)


def test_a_checkpoint_of_another_tokenizer_is_refused(command, tmp_path, cache_dir):
    import transformers

    folder = tmp_path / "other"
    ours().save_pretrained(folder)
    letters = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])}
    transformers.BertTokenizerFast(vocab=letters).save_pretrained(folder)
    code, said = command(checkpoints=str(folder), inits="none")
    assert (code, f"checkpoints {folder}: has another tokenizer than the data" in said) == (2, True)


def test_an_output_folder_of_something_else_is_refused(command, tmp_path):
    (tmp_path / "file").write_text("text")
    code, said = command(output_dir=tmp_path / "file")
    assert (code, f"output_dir {tmp_path / 'file'}: " in said) == (2, True)
    code, said = command(output_dir=tmp_path)
    assert (code, "holds files but no measurements" in said) == (2, True)


def measurement(seed, kind="bert", placement="post", depth=6, scale=1.0):
    layers = [scale * (1 + 0.1 * seed)] * depth
    point = {"kind": kind, "norm_placement": placement, "num_hidden_layers": depth, "seed": seed}
    names = ("w1_gradient", "w2_gradient", "w1_batch_gradient", "w2_batch_gradient", "hidden_state")
    return point | {
        "checkpoint": None, "loss": 9.0, **dict.fromkeys((*names, "stream_gradient"), layers),
        "straight_through": [0.5] * (depth - 1), "norm_inputs": {"first": 1.0, "last": 2.0},
    }  # fmt: skip


def test_exponents_are_fitted_seed_by_seed():
    """A seed that is larger at all depths widens the interval of the gradient, not that of the exponent."""
    ones = [measurement(seed, depth=d, scale=d**-0.5) for d in (6, 12, 24) for seed in range(4)]
    (fit,) = summarise(ones)["depth_exponents"]
    assert fit["mean"] == pytest.approx(-0.5)
    assert fit["high"] - fit["low"] < 1e-9
    group = summarise(ones)["groups"][0]
    assert (
        group["w2_gradient"]["high"][0] - group["w2_gradient"]["low"][0]
        > 0.1 * group["w2_gradient"]["mean"][0]
    )


def test_seeds_that_differ_by_orders_of_magnitude_are_averaged_in_the_logarithm():
    (group,) = summarise([measurement(0, scale=scale) for scale in (1.0, 100.0)])["groups"]
    assert group["w2_gradient"]["mean"][0] == pytest.approx(10)
    assert group["w2_gradient"]["low"][0] > 0
    assert group["hidden_state"]["mean"][0] == pytest.approx(50.5)


def test_a_report_of_one_seed_claims_no_interval():
    summary = summarise([measurement(0)]) | {"num_hidden_layers": 6}
    summary = json.loads(json.dumps(summary).replace("NaN", "null"))
    text = report_text(summary, [])
    assert "| 1 | 1 | 1 | 1 |" in text
    assert "nan" not in text.lower()


def test_more_seeds_and_depths_only_add_points():
    words = ["--seed", "7", "--seeds"]
    few = plan(parse_gradient_arguments([*words, "2", "--depths", "6"]))
    assert {point.seed for point in few} == {7, 8}
    assert {point.num_hidden_layers for point in few} == {6, 12}
    assert set(few) < set(plan(parse_gradient_arguments([*words, "3", "--depths", "6,8"])))


def test_all_names_every_placement_there_is():
    assert parse_gradient_arguments(["--norm_placements", "all"]).probe.norm_placements == list(PLACEMENTS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--deepths 6", "--deepths: unknown option; did you mean depths?"),
        ("--hiden_size 8", "--hiden_size: unknown option; did you mean hidden_size?"),
        ("--seeds 0", "seeds 0: must be at least 1"),
        ("--seeds many", "seeds 'many': must be of type int"),
        ("--num_batches 0", "num_batches 0: must be at least 1"),
        ("--depths 6 0", "depths 0: must be at least 1"),
        ("--depths six", "depths 'six': must be of type int"),
        ("--inits xaver", "inits 'xaver': did you mean xavier?"),
        ("--norm_placements prenorm", "norm_placements 'prenorm':"),
        ("--norm_placements none", "norm_placements []: give at least one"),
        ("--norm_placement pre", "norm_placement: is set by the probe; give norm_placements"),
        ("--max_steps 9", "max_steps: is set by the probe; is warmup_steps + 1"),
        ("--warmup_steps 0", "warmup_steps 0: must be at least 1"),
        ("--checkpoints nowhere", "checkpoints nowhere: holds no config.json"),
        ("--config nowhere.yaml", "config nowhere.yaml: no such file"),
        ("--hidden_size 130 --num_attention_heads 4", "num_attention_heads"),
        ("--seed 4294967290", "seed 4294967290: with seeds 10 the last is not less than 2**32"),
    ],
)
def test_mistakes_are_named_before_any_work(words, message):
    with pytest.raises(UserError) as error:
        parse_gradient_arguments(words.split())
    assert message in str(error.value)


def test_a_misspelt_key_in_yaml_is_named(tmp_path):
    config = tmp_path / "probe.yaml"
    config.write_text("depth: [6]\n")
    with pytest.raises(UserError, match="depth: unknown option; did you mean depths"):
        parse_gradient_arguments(["--config", str(config)])
