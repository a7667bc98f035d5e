"""FSDP2: each process holds a part of every weight, gradient and moment; checkpoints hold them whole.

The launcher only says that this is wanted. The model is sharded here, in the same way on CPU and GPU:
Accelerate's own preparation leaves out CPUs, where it would take DDP without a word.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from bert_ln import BertLnForMaskedLM
from recipes.arguments import PretrainingArguments
from recipes.checkpointing import TrainState, load_checkpoint
from recipes.errors import UserError
from recipes.optimization import build_optimizer

INSTEAD = "use --use_fsdp --fsdp_version 2 (recipes/configs/accelerate/fsdp2.yaml), or --multi_gpu"


def check_launcher() -> None:
    """Refuse what the launcher may ask for and training cannot do.

    Raises:
        UserError: DeepSpeed, the first FSDP, or a setting of FSDP2 that nothing here reads.
    """
    if _says("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(f"the launcher's use_deepspeed: not supported; {INSTEAD}")
    if not _says("ACCELERATE_USE_FSDP"):
        return
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError(f"the launcher's fsdp_version {version}: not supported; {INSTEAD}")
    if _says("FSDP_OFFLOAD_PARAMS"):
        raise UserError("the launcher's fsdp_offload_params true: not supported; leave it out")
    if _says("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError(
            "the launcher's fsdp_activation_checkpointing true: not supported; give "
            "--gradient_checkpointing true to recipes/pretrain.py"
        )


def is_wanted() -> bool:
    """Whether the launcher asks for FSDP2 and there are processes to shard over."""
    return _says("ACCELERATE_USE_FSDP") and distributed.is_initialized()


def _says(name: str, otherwise: str = "false") -> bool:
    return os.environ.get(name, otherwise).lower() in ("1", "true", "yes")


def shard(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Leave this process its part of the weights, on its device; they come together layer by layer.

    Tied weights are in one unit, all that is not in a layer, and stay tied.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    reshard = _says("FSDP_RESHARD_AFTER_FORWARD", "true")
    for layer in model.base_model.encoder.layer:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether every process must take part whenever the model computes."""
    return isinstance(model, FSDPModule)


@contextmanager
def no_sync(accelerator: Accelerator, model: torch.nn.Module) -> Iterator[None]:
    """Let gradients add up on this process, under DDP and FSDP2; each process then holds them whole."""
    # As a compiled model passes it on.
    if not hasattr(model, "set_requires_gradient_sync"):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, of which processes may hold parts; then every process takes part."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(
    model: PreTrainedModel, optimizer: Optimizer, args: PretrainingArguments, keep: bool
) -> tuple[PreTrainedModel, Optimizer]:
    """Model and optimiser as one process would have them: in main memory, where `keep`, else without values.

    Every process takes part, tensor by tensor. What is not sharded is returned as it is.
    """
    if not is_sharded(model):
        return model, optimizer
    whole_model, whole_optimizer = _empty(model, args, "cpu" if keep else "meta")
    for group, whole_group in zip(optimizer.param_groups, whole_optimizer.param_groups, strict=True):
        whole_group.update(group | {"params": whole_group["params"]})
        for part, parameter in zip(group["params"], whole_group["params"], strict=True):
            parameter.copy_(full(part))
            for name, value in optimizer.state.get(part, {}).items():
                value = full(value)
                if keep:
                    whole_optimizer.state[parameter][name] = value.cpu()
    return whole_model, whole_optimizer


def load(
    folder: Path, model: PreTrainedModel, optimizer: Optimizer, args: PretrainingArguments
) -> TrainState:
    """`load_checkpoint`, of which a sharded model takes its parts; the processes need not talk."""
    if not is_sharded(model):
        return load_checkpoint(folder, model, optimizer)
    whole_model, whole_optimizer = _empty(model, args, "cpu")
    state = load_checkpoint(folder, whole_model, whole_optimizer)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # validation leaves some weights gathered, which would stay as they were
    parts, wholes = _parameters(optimizer), _parameters(whole_optimizer)
    moments = whole_optimizer.state_dict()
    with torch.no_grad():
        for i, (part, whole) in enumerate(zip(parts, wholes, strict=True)):
            part.copy_(_part_of(whole.detach(), part))
            values = moments["state"].get(i, {})
            values.update({name: _part_of(value, part) for name, value in values.items()})
    optimizer.load_state_dict(moments)
    return state


def _empty(
    model: PreTrainedModel, args: PretrainingArguments, device: str
) -> tuple[PreTrainedModel, Optimizer]:
    """A whole model of the same configuration, without values, and its optimiser."""
    with torch.device("meta"):  # draws no random numbers
        whole = BertLnForMaskedLM(deepcopy(model.config))
    whole.to_empty(device=device)
    whole.tie_weights()
    return whole, build_optimizer(whole, args)


def _parameters(optimizer: Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _part_of(whole: torch.Tensor, like: DTensor) -> torch.Tensor:
    """This process's part of a tensor, spread as `like`; what has not its shape (a count) stays whole."""
    if whole.shape != like.shape:
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
