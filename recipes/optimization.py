"""Optimisers, parameter groups and the learning rate as a closed formula of the update number."""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from bert_ln.modeling_bert_ln import NO_WEIGHT_DECAY
from recipes.arguments import OptimizationArguments

Groups = list[dict[str, Any]]


def build_optimizer(model: nn.Module, args: OptimizationArguments) -> Optimizer:
    """The optimiser that `args.optim` names, with BERT's parameter groups."""
    return OPTIMIZERS[args.optim](model, args)


def _groups(model: nn.Module, args: OptimizationArguments) -> Groups:
    decayed, rest = split_parameters(model)
    return [{"params": decayed, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]


def _adamw(model: nn.Module, args: OptimizationArguments) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2019).

    It differs from BERT's own Adam in correcting the bias of the moments, as every current recipe does.
    """
    fused = args.optim == "adamw_torch_fused"
    return torch.optim.AdamW(_groups(model, args), fused=fused, **_adam_options(args))


def _radam(model: nn.Module, args: OptimizationArguments) -> Optimizer:
    """Rectified Adam (Liu et al. 2020), which has a warm-up of its own; decay is decoupled as in AdamW."""
    return torch.optim.RAdam(_groups(model, args), decoupled_weight_decay=True, **_adam_options(args))


def _sgd(model: nn.Module, args: OptimizationArguments) -> Optimizer:
    """Plain stochastic gradient descent without momentum, as in Xiong et al. 2020, section 3.2.

    `weight_decay` is added to the gradient here: it is not decoupled.
    """
    return torch.optim.SGD(_groups(model, args), lr=args.learning_rate)


def _muon(model: PreTrainedModel, args: OptimizationArguments) -> Optimizer:
    """Muon for the matrices between hidden states, fused AdamW for the rest, at one learning rate.

    Of a matrix, momentum (0.95, Nesterov) is brought near to the nearest matrix whose singular values are 1,
    by five steps of Newton and Schulz in bfloat16, and multiplied by 0.2 sqrt(max(rows, columns)). Its root
    mean square is then about 0.2, which is reported for AdamW's updates too: `learning_rate`, its schedule
    and `weight_decay` mean what they mean for AdamW. Queries, keys and values are matrices of their own.

    Sources: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the factor: Liu et al. 2025, arXiv
    2502.16982. Both are as recalled, and as `torch.optim.Muon` computes and documents them.
    """
    hidden = hidden_matrices(model)
    ids = {id(p) for p in hidden}
    rest = _groups(model, args)
    for group in rest:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    options = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    muon = torch.optim.Muon([{"params": hidden}], adjust_lr_fn="match_rms_adamw", **options)
    return Combined(muon, torch.optim.AdamW(rest, fused=True, **_adam_options(args)))


class Combined(Optimizer):
    """Optimisers of different parameters as one: one list of groups, one state, one step.

    Groups and state are kept here, where learning rates are set and checkpoints loaded, and lent to the parts
    for each step.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], defaults={})

    def step(self, closure: None = None) -> None:
        """Let each part update its parameters; a closure is not supported."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups, part.state = list(islice(groups, len(part.param_groups))), self.state
            part.step()


def hidden_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights of all linear maps from hidden states to hidden states.

    That is those of the layers and the transform of the masked-language-model head, which is one more such
    map. The embeddings and the decoder, tied or not, have a row for each token: each is a vector of its own.
    """
    decoder = model.get_output_embeddings()
    maps = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not decoder]
    return [m.weight for m in maps if m.weight.requires_grad]


def _adam_options(args: OptimizationArguments) -> dict[str, Any]:
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw_torch": _adamw,
    "adamw_torch_fused": _adamw,
    "muon": _muon,
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
