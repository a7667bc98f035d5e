"""Learning rates against closed formulas and transformers; parameter groups by module type."""

import math

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from bert_ln import BertLnConfig, BertLnForMaskedLM
from recipes.arguments import OptimizationArguments
from recipes.optimization import build_optimizer, learning_rate_at, split_parameters

STEPS = 100


def ours(**options):
    args = OptimizationArguments(learning_rate=2e-3, **options)
    return [learning_rate_at(step, args, STEPS) for step in range(1, STEPS + 1)]


def stock(name, warmup_steps, **specific):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-3)
    scheduler = get_scheduler(
        name, optimizer, warmup_steps, STEPS, scheduler_specific_kwargs=specific or None
    )
    rates = []
    for _ in range(STEPS):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("warmup_steps", [0, 10])
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("linear", {}),
        ("constant_with_warmup", {}),
        ("cosine", {}),
        ("inverse_sqrt", {}),
        ("warmup_stable_decay", {"num_decay_steps": 30, "min_lr_ratio": 0.1}),
    ],
)
def test_after_the_warmup_as_transformers(name, kwargs, warmup_steps):
    rates = ours(lr_scheduler_type=name, warmup_steps=warmup_steps, lr_scheduler_kwargs=kwargs)
    assert rates[warmup_steps:] == pytest.approx(stock(name, warmup_steps, **kwargs)[warmup_steps:])


def test_warmup_is_the_papers_formula():
    rates = ours(warmup_steps=10)
    assert rates[:10] == pytest.approx([2e-3 * t / 10 for t in range(1, 11)])
    assert min(rates) > 0


def test_no_warmup_starts_at_the_peak():
    rates = ours()
    assert rates[0] == 2e-3
    assert rates[49] == pytest.approx(2e-3 * 51 / 100)


def test_constant_ignores_the_warmup():
    assert set(ours(lr_scheduler_type="constant", warmup_steps=10)) == {2e-3}


def test_default_decay_of_wsd_is_a_tenth():
    rates = ours(lr_scheduler_type="warmup_stable_decay")
    assert rates[:91] == pytest.approx([2e-3] * 91)
    assert rates[95] == pytest.approx(2e-3 * 0.5 * (1 + math.cos(math.pi * 0.5)))


@pytest.mark.parametrize("placement", ["post", "pre"])
@pytest.mark.parametrize("embedding_norm", [True, False])
def test_norms_and_biases_do_not_decay(placement, embedding_norm):
    config = BertLnConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        norm_placement=placement, embedding_norm=embedding_norm,
    )  # fmt: skip
    model = BertLnForMaskedLM(config)
    decayed, rest = split_parameters(model)
    # Independent of names and types: exactly the matrices decay, and every parameter is in one group.
    assert all(p.ndim == 2 for p in decayed)
    assert all(p.ndim == 1 for p in rest)
    assert len(decayed) + len(rest) == len(list(model.parameters()))
    groups = build_optimizer(model, OptimizationArguments(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]


def test_sgd_is_plain_gradient_descent_with_decay_on_matrices_only():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = build_optimizer(
        model, OptimizationArguments(optim="sgd", learning_rate=0.5, weight_decay=0.1)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.ones(4, 3)).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.1 * before[name] if name == "0.weight" else 0.0
        torch.testing.assert_close(p.detach(), before[name] - 0.5 * (p.grad + decay))


def test_radam_warms_up_by_itself():
    """Liu et al. 2020, Algorithm 2: while rho_t <= 5 the step is not divided by the second moment."""
    weight = nn.Parameter(torch.zeros(2, 2))
    model = nn.Module()
    model.weight = weight
    args = OptimizationArguments(optim="radam", learning_rate=1e-2, weight_decay=0.0)
    optimizer = build_optimizer(model, args)
    weight.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    optimizer.step()
    # The first step is that of momentum, bias-corrected: the gradient itself.
    torch.testing.assert_close(weight.detach(), -1e-2 * weight.grad)
