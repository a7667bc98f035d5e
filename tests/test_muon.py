"""Muon for the matrices between hidden states, AdamW for the rest: as the papers' formulas, and resumable."""

import copy
import json
import math

import pytest
import torch

from recipes.arguments import OptimizationArguments
from recipes.errors import UserError
from recipes.optimization import build_optimizer
from recipes.pretraining import pretrain
from recipes.training import Trainer
from tests.conftest import metrics_of
from tests.model_fixtures import ours
from tests.test_training import DROPOUT, Interrupted, digest, interrupt_at

OPTIONS = {"optim": "muon", "learning_rate": 3e-3, "weight_decay": 0.1}
TRANSFORM = "cls.predictions.transform.dense.weight"


def muon(model, **changes):
    return build_optimizer(model, OptimizationArguments(**OPTIONS | changes))


def names_of(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in group["params"]}


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def polynomial_of_singular_values(matrix):
    """Five times s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5 on the singular values, which norm 1 has scaled."""
    u, s, v = torch.linalg.svd(matrix / matrix.norm(), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize(
    ("placement", "settings"),
    [
        ("post", {}),
        ("pre", {"tie_word_embeddings": False}),
        ("normformer", {"normformer_residual_scale": True, "qk_norm": "layer_norm"}),
        ("hybrid_norm", {"norm_type": "rms_norm"}),
        ("admin", {}),
    ],
)
def test_which_parameters_go_where(placement, settings):
    model = ours(placement=placement, **settings)
    matrices, decayed, rest = muon(model).param_groups
    in_layers = {name for name, p in model.named_parameters() if ".layer." in name and p.ndim == 2}
    assert names_of(model, matrices) == in_layers | {TRANSFORM}
    assert len(in_layers) == 2 * 6
    tables = {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    decoder = {"cls.predictions.decoder.weight"} if settings.get("tie_word_embeddings") is False else set()
    assert names_of(model, decayed) == tables | decoder
    assert {p.ndim for p in rest["params"]} == {1}
    in_groups = sorted(id(p) for group in (matrices, decayed, rest) for p in group["params"])
    assert in_groups == sorted(id(p) for p in model.parameters())
    assert [group["weight_decay"] for group in (matrices, decayed, rest)] == [0.1, 0.1, 0.0]


def test_a_model_without_layers():
    model = ours(num_hidden_layers=0)
    before = copy.deepcopy(model.state_dict())
    optimizer = muon(model)
    assert names_of(model, optimizer.param_groups[0]) == {TRANSFORM}
    set_gradients(model, seed=0)
    optimizer.step()
    assert not torch.equal(model.state_dict()[TRANSFORM], before[TRANSFORM])


def test_updates_are_those_of_the_formulas():
    """Three updates: matrices as Jordan's and Liu's formulas in float64, the rest as AdamW alone."""
    rate, decay = 3e-3, 10.0  # so strong that an update and its decay are of one size
    model, stock = ours(), ours()
    optimizer, adamw = (
        muon(m, weight_decay=decay, optim=o) for m, o in ((model, "muon"), (stock, "adamw_torch_fused"))
    )
    names = names_of(model, optimizer.param_groups[0])
    matrices = {name: p.detach().double() for name, p in model.named_parameters() if name in names}
    momentum = {name: torch.zeros_like(w) for name, w in matrices.items()}
    for step in range(3):
        set_gradients(model, seed=step)
        set_gradients(stock, seed=step)
        for name, w in matrices.items():
            gradient = model.get_parameter(name).grad.double()
            momentum[name] = 0.95 * momentum[name] + 0.05 * gradient
            direction = polynomial_of_singular_values(0.05 * gradient + 0.95 * momentum[name])
            matrices[name] = (1 - rate * decay) * w - rate * 0.2 * math.sqrt(max(w.shape)) * direction
        optimizer.step()
        adamw.step()
    first = dict(ours().named_parameters())
    for name, p in model.named_parameters():
        if name not in names:
            assert torch.equal(p, stock.get_parameter(name)), name
            continue
        buffer = optimizer.state[p]["momentum_buffer"].double()
        torch.testing.assert_close(buffer, momentum[name], rtol=0, atol=1e-6)
        moved, expected = (w.detach() - first[name].detach() for w in (p, matrices[name]))
        # The products are in bfloat16, which has 8 binary digits: 0.7 % here.
        assert (moved - expected).norm() < 0.03 * expected.norm(), name


def test_a_matrix_moves_as_far_as_with_adamw():
    """That is what makes one learning rate do for both: 0.2 in the root mean square, whatever the shape."""
    model = ours(hidden_size=64, intermediate_size=256)
    optimizer = muon(model, weight_decay=0.0)
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    set_gradients(model, seed=0)
    optimizer.step()
    for p, old in zip(optimizer.param_groups[0]["params"], before, strict=True):
        assert (p - old).square().mean().sqrt().item() == pytest.approx(0.2 * 3e-3, rel=0.2)


def test_the_state_goes_into_a_file_and_back(tmp_path):
    """Two updates, saved, loaded into other objects, and two more: as four without a break."""

    def update(model, optimizer, steps):
        for step in steps:
            set_gradients(model, seed=step)
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (step + 1)
            optimizer.step()

    whole, model, other = ours(), ours(), ours(seed=1)
    update(whole, muon(whole), range(4))
    optimizer, loaded = muon(model), muon(other)
    update(model, optimizer, range(2))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    update(other, loaded, range(2, 4))
    for name, p in whole.named_parameters():
        assert torch.equal(other.get_parameter(name), p), name


def test_a_rate_that_is_set_reaches_every_parameter():
    """As the loop sets it."""
    model = ours()
    optimizer = muon(model)
    before = copy.deepcopy(model.state_dict())
    for rate in (0.0, 1e-3):
        for group in optimizer.param_groups:
            group["lr"] = rate
        set_gradients(model, seed=0)
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == (set(dict(model.named_parameters())) if rate else set())


@pytest.mark.parametrize("steps", [(6,), (4, 11)])
def test_resuming_changes_nothing(tiny, tmp_path, monkeypatch, steps):
    options = DROPOUT | {"optim": "muon", "logging_steps": 3}
    pretrain(tiny(output_dir=str(tmp_path / "whole"), **options))
    for step in steps:
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt_at(patch, step)
            pretrain(tiny(**options))
    pretrain(tiny(**options))
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert digest(run / "checkpoint-12") == digest(whole / "checkpoint-12")
    assert metrics_of(run) == metrics_of(whole)
    saved = torch.load(run / "checkpoint-12" / "trainer" / "optimizer.pt", weights_only=True)
    # The last update of 12 has a twelfth of the rate, in the file as in the metrics.
    assert [group["lr"] for group in saved["param_groups"]] == pytest.approx([1e-3 / 12] * 3)
    kinds = {frozenset(values) for values in saved["state"].values()}
    assert kinds == {frozenset({"momentum_buffer"}), frozenset({"step", "exp_avg", "exp_avg_sq"})}


def test_an_update_that_is_not_finite_is_skipped(tiny, tmp_path, monkeypatch):
    backward = Trainer._backward

    def poisoned(self, batch, count):
        return backward(self, batch, count * math.nan if self.state.step + 1 == 3 else count)

    monkeypatch.setattr(Trainer, "_backward", poisoned)
    pretrain(tiny(optim="muon", max_steps=4, save_steps=1))
    run = tmp_path / "run"
    weights = [digest(run / f"checkpoint-{step}")["model.safetensors"] for step in (2, 3, 4)]
    assert weights[0] == weights[1] != weights[2]
    moments = [
        torch.load(run / f"checkpoint-{step}" / "trainer" / "optimizer.pt", weights_only=True)["state"]
        for step in (2, 3)
    ]
    for index, values in moments[0].items():
        for name, value in values.items():
            assert torch.equal(value, moments[1][index][name]), (index, name)
    assert json.loads((run / "run.json").read_text())["results"]["nonfinite_updates"] == 1


def test_a_misspelt_name_is_refused(tiny):
    with pytest.raises(UserError, match=r"optim 'moun': allowed: .*adamw_torch_fused, muon"):
        tiny(optim="moun")
