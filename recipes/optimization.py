"""Optimisers, parameter groups and the learning rate as a closed formula of the update number."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from bert_ln.modeling_bert_ln import NO_WEIGHT_DECAY
from recipes.arguments import OptimizationArguments

Groups = list[dict[str, Any]]


def build_optimizer(model: nn.Module, args: OptimizationArguments) -> torch.optim.Optimizer:
    """The optimiser that `args.optim` names, with BERT's parameter groups."""
    decayed, rest = split_parameters(model)
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return OPTIMIZERS[args.optim](groups, args)


def _adamw(groups: Groups, args: OptimizationArguments) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019).

    It differs from BERT's own Adam in correcting the bias of the moments, as every current recipe does.
    """
    return torch.optim.AdamW(groups, fused=args.optim == "adamw_torch_fused", **_adam_options(args))


def _radam(groups: Groups, args: OptimizationArguments) -> torch.optim.Optimizer:
    """Rectified Adam (Liu et al. 2020), which has a warm-up of its own; decay is decoupled as in AdamW."""
    return torch.optim.RAdam(groups, decoupled_weight_decay=True, **_adam_options(args))


def _sgd(groups: Groups, args: OptimizationArguments) -> torch.optim.Optimizer:
    """Plain stochastic gradient descent without momentum, as in Xiong et al. 2020, section 3.2.

    `weight_decay` is added to the gradient here: it is not decoupled.
    """
    return torch.optim.SGD(groups, lr=args.learning_rate)


def _adam_options(args: OptimizationArguments) -> dict[str, Any]:
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


OPTIMIZERS: dict[str, Callable[[Groups, OptimizationArguments], torch.optim.Optimizer]] = {
    "adamw_torch": _adamw,
    "adamw_torch_fused": _adamw,
    "radam": _radam,
    "sgd": _sgd,
}


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters that decay, and those that do not: biases, norms, and factors on heads and branches.

    By module type, because names differ between placements. (BERT, `optimization.py` of
    google-research/bert: no decay on LayerNorm and bias.)
    """
    exempt = set(_exempt_ids(model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [p for p in parameters if id(p) not in exempt], [p for p in parameters if id(p) in exempt]


def _exempt_ids(model: nn.Module) -> Iterator[int]:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, NO_WEIGHT_DECAY) or name == "bias":
                yield id(parameter)


def learning_rate_at(step: int, args: OptimizationArguments, max_steps: int) -> float:
    """The learning rate of update number `step`, counted from 1 to `max_steps`.

    While `step <= warmup_steps` it is `step / warmup_steps` of the peak (Xiong et al. 2020, section 3.2).
    After that the shapes are those of `transformers.get_scheduler`, in which the first update after the
    warm-up has the full rate and no update has rate 0.
    """
    if step <= args.warmup_steps and args.lr_scheduler_type != "constant":
        return args.learning_rate * step / args.warmup_steps
    return args.learning_rate * SCHEDULES[args.lr_scheduler_type](step - 1, args, max_steps)


def _constant(done: int, args: OptimizationArguments, max_steps: int) -> float:
    return 1.0


def _linear(done: int, args: OptimizationArguments, max_steps: int) -> float:
    return (max_steps - done) / (max_steps - args.warmup_steps)


def _cosine(done: int, args: OptimizationArguments, max_steps: int) -> float:
    progress = (done - args.warmup_steps) / (max_steps - args.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def _inverse_sqrt(done: int, args: OptimizationArguments, max_steps: int) -> float:
    # Without a warm-up transformers takes 10,000 as the time scale; so do we.
    scale = args.warmup_steps or 10_000
    return math.sqrt(scale / (done - args.warmup_steps + scale))


def _warmup_stable_decay(done: int, args: OptimizationArguments, max_steps: int) -> float:
    decay_steps = args.lr_scheduler_kwargs.get("num_decay_steps", max(1, max_steps // 10))
    lowest = args.lr_scheduler_kwargs.get("min_lr_ratio", 0.0)
    left = min(1.0, (max_steps - done) / decay_steps)
    return lowest + (1 - lowest) * 0.5 * (1 - math.cos(math.pi * left))


SCHEDULES = {
    "linear": _linear,
    "constant": _constant,
    "constant_with_warmup": _constant,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
    "warmup_stable_decay": _warmup_stable_decay,
}
