"""What an update costs on machines that are not there: time, traffic and memory. See docs/scaling.md."""

import math
import time
from dataclasses import dataclass, replace
from functools import cache

import psutil
import torch

from bert_ln import BertLnConfig, BertLnForMaskedLM
from recipes.arguments import nearest
from recipes.budget import BF16_PEAKS, peak_of, training_flops
from recipes.errors import UserError
from recipes.launch import choose_precision

# Of a link's data sheet, what a collective gets; assumed.
LINK_SHARE = 0.8
# Of a device's memory, what a run can have; the rest is the driver's, the collectives' and gaps. Assumed.
MEMORY_SHARE = 0.9
# Seconds before a collective begins to travel (NCCL's own model, tuning.cc, LL128).
COLLECTIVE_SECONDS = 14e-6
# DDP sends gradients in parts of this size (bucket_cap_mb, PyTorch's default).
BUCKET_BYTES = 25 * 2**20
# Bytes a parameter in float32: weight, gradient and two moments.
STATE_BYTES = 16
# Weight and two moments: what a checkpoint holds.
CHECKPOINT_BYTES = 12
# What clipping (the norm reads, scaling reads and writes the gradient) and AdamW (reads four, writes three)
# move to and from memory, a parameter.
OPTIMIZER_BYTES = 40
TOKEN_BYTES = 2


@dataclass(frozen=True)
class Hardware:
    """A device and what is between devices. Bandwidths in bytes/s, those of links in one direction."""

    name: str
    flops: float
    """Dense bf16 operations per second."""
    memory: float
    memory_bandwidth: float
    link: float
    """Bandwidth of a device to the others of its node."""
    network: float
    """Bandwidth of a node to the others."""
    devices_per_node: int = 8
    link_seconds: float = 1.25e-6
    """Of a hop within a node (NVLink in NCCL's own model: tuning.cc, tree, LL128)."""
    network_seconds: float = 8.5e-6
    """Of a hop between nodes, likewise."""
    overlaps: bool = True
    """Whether gradients travel while the device computes."""

    def nodes(self, devices: int) -> int:
        """Nodes that so many devices need."""
        return math.ceil(devices / self.devices_per_node)


# From the vendors' data sheets: memory, its bandwidth, half of NVLink's or PCIe's two-way bandwidth; networks
# of NVIDIA's DGX (8 x 400 Gb/s, A100: 8 x 200 Gb/s) and of Amazon's g5.48xlarge and g6.48xlarge (100 Gb/s).
_NVLINK_4, _NVLINK_3, _PCIE_4 = (LINK_SHARE * bandwidth for bandwidth in (450e9, 300e9, 32e9))
_DGX_H100, _DGX_A100, _AMAZON_G = (LINK_SHARE * bandwidth for bandwidth in (400e9, 200e9, 12.5e9))
HARDWARE = {
    "h100": Hardware("H100 SXM", BF16_PEAKS["H100"], 80e9, 3.35e12, _NVLINK_4, _DGX_H100),
    "h200": Hardware("H200 SXM", BF16_PEAKS["H200"], 141e9, 4.8e12, _NVLINK_4, _DGX_H100),
    "a100": Hardware("A100 SXM 80 GB", BF16_PEAKS["A100"], 80e9, 2.039e12, _NVLINK_3, _DGX_A100),
    "a10g": Hardware("A10G", BF16_PEAKS["A10G"], 24e9, 0.6e12, _PCIE_4, _AMAZON_G),
    "l4": Hardware("L4", BF16_PEAKS["L4"], 24e9, 0.3e12, _PCIE_4, _AMAZON_G),
}


def find_hardware(name: str, devices: int) -> Hardware:
    """The row of the table, or this machine's processor shared by so many processes.

    Raises:
        UserError: An unknown name.
    """
    if name.lower() == "cpu":
        return _this_machine(devices)
    if name.lower() not in HARDWARE:
        raise UserError(f"hardware {name}: {nearest(name.lower(), [*HARDWARE, 'cpu'])}")
    return HARDWARE[name.lower()]


def _this_machine(processes: int) -> Hardware:
    """Cores, memory and its bandwidth are divided; gloo's all-reduce needs the cores that compute.

    Its 1.9 GB/s and 120 microseconds were measured with two processes of a thread each (docs/scaling.md).
    """
    flops, memory_bandwidth = _measured()
    return Hardware(
        name="CPU of this machine, measured now",
        flops=flops / processes,
        memory=psutil.virtual_memory().total / processes,
        memory_bandwidth=memory_bandwidth / processes,
        link=1.9e9,
        network=math.inf,
        devices_per_node=processes,
        link_seconds=53e-6,
        overlaps=False,
    )


@cache
def _measured(numbers: int = 2**25) -> tuple[float, float]:
    """Operations per second of a matrix product, and bytes per second that a copy reads and writes."""
    device = torch.device("cpu")
    peak = peak_of(device, bf16=choose_precision(None, device)[0])
    source, target = torch.zeros(numbers), torch.zeros(numbers)
    best = math.inf
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return peak.flops, 2 * source.nbytes / best


@dataclass(frozen=True)
class Model:
    """What of a model its cost depends on."""

    config: BertLnConfig
    parameters: int
    embedded: int
    """Parameters of the embeddings, whose gradients are complete last."""
    predicted_share: float

    @classmethod
    def of(cls, config: BertLnConfig, predicted_share: float) -> "Model":
        """Count the parameters of a model that is built without memory."""
        with torch.device("meta"):
            model = BertLnForMaskedLM(config)
        counts = (sum(p.numel() for p in part.parameters()) for part in (model, model.base_model.embeddings))
        return cls(config, *counts, predicted_share)

    def flops_per_token(self, length: int) -> float:
        """As the training lines count them."""
        return training_flops(self.config, length, self.predicted_share)

    def activation_bytes(self, length: int, gradient_checkpointing: bool) -> float:
        """Bytes that a block keeps for its backward pass, with bf16 autocast and fused attention.

        A layer keeps, in multiples of its width, 4 + 4 of the norms in float32, 2 of each copy that a product
        or the attention makes in bf16 (8 of them), and two bf16 tensors as wide as the feed-forward block. A
        predicted token keeps its float32 log-probabilities, beside which their gradient (4) and the logits'
        (2) stand for a moment.
        """
        c = self.config
        layer = 24 * c.hidden_size + 4 * c.intermediate_size
        layers = c.num_hidden_layers * layer
        if gradient_checkpointing:  # the input of each layer, and one layer at a time
            layers = c.num_hidden_layers * 4 * c.hidden_size + layer
        return length * (layers + 10 * self.predicted_share * c.vocab_size)


@dataclass(frozen=True)
class Plan:
    """How the blocks of an update lie on the devices."""

    devices: int
    length: int
    micro_batch: int
    """Blocks that a device computes at a time."""
    micro_batches: int
    """How often it does so in an update."""
    is_sharded: bool = False
    """FSDP2 instead of DDP."""
    gradient_checkpointing: bool = False

    @property
    def blocks(self) -> int:
        """Blocks of an update on all devices."""
        return self.devices * self.micro_batch * self.micro_batches

    @property
    def tokens(self) -> int:
        """Tokens of an update on all devices."""
        return self.blocks * self.length


def divide(blocks: int, devices: int, most: int) -> tuple[int, int]:
    """Micro-batch of at most `most` blocks, and how many of them a device computes in an update.

    Raises:
        UserError: The devices cannot have the same whole number of blocks.
    """
    if blocks % devices:
        allowed = ", ".join(str(n) for n in range(1, blocks + 1) if blocks % n == 0)
        raise UserError(
            f"devices {devices}: an update has {blocks} blocks, and each device needs the same whole number "
            f"of them, at least 1; allowed: {allowed}; or give another --global_batch_size"
        )
    each = blocks // devices
    micro_batch = next(n for n in range(min(most, each), 0, -1) if each % n == 0)
    return micro_batch, each // micro_batch


@dataclass(frozen=True)
class Update:
    """Seconds of an update, by what they go to."""

    compute: float
    optimizer: float
    traffic: float
    """All that travels between devices."""
    exposed: float
    """The part of it for which the devices wait."""

    @property
    def seconds(self) -> float:
        """The whole."""
        return self.compute + self.optimizer + self.exposed


def update_of(model: Model, plan: Plan, hardware: Hardware, mfu: float) -> Update:
    """What an update takes, from what one device of MFU `mfu` would take for it alone.

    Of one device's time, the optimiser's part (bound by memory bandwidth) is no less on a device of many,
    unless the states are sharded; the rest is divided.
    """
    alone = plan.tokens * model.flops_per_token(plan.length) / (mfu * hardware.flops)
    optimizer = min(alone, OPTIMIZER_BYTES * model.parameters / hardware.memory_bandwidth)
    compute = (alone - optimizer) / plan.devices
    traffic, hidden, last = (_sharded if plan.is_sharded else _replicated)(model, plan, hardware, compute)
    exposed = max(traffic - hidden, last) if hardware.overlaps else traffic
    return Update(compute, optimizer / (plan.devices if plan.is_sharded else 1), traffic, exposed)


def _replicated(model: Model, plan: Plan, hardware: Hardware, compute: float) -> tuple[float, float, float]:
    """DDP: seconds of traffic; behind what it may hide, the last backward pass; and what comes after that."""
    seconds = [all_reduce_seconds(4 * n, plan.devices, hardware) for n in (model.parameters, model.embedded)]
    return seconds[0], compute * 2 / 3 / plan.micro_batches, seconds[1]


def _sharded(model: Model, plan: Plan, hardware: Hardware, compute: float) -> tuple[float, float, float]:
    """FSDP2: weights come together in each forward and backward pass, gradients are scattered once."""
    passes, units = 2 * plan.micro_batches + 1, model.config.num_hidden_layers + 1
    whole = gather_seconds(4 * model.parameters, plan.devices, units, hardware)
    first = gather_seconds(4 * model.embedded, plan.devices, 1, hardware)
    return passes * whole, compute, 2 * first


def all_reduce_bytes(size: float, devices: int) -> float:
    """Bytes that each device sends in a ring: every part goes round twice, but for the last hop."""
    return 2 * (devices - 1) / devices * size


def all_reduce_seconds(size: float, devices: int, hardware: Hardware) -> float:
    """Seconds to add up `size` bytes over the devices, in DDP's buckets, each with the latency of a tree."""
    if devices == 1:
        return 0.0
    nodes = hardware.nodes(devices)
    hops = 2 * (min(devices, hardware.devices_per_node) - 1) * hardware.link_seconds
    hops += 2 * math.floor(math.log2(nodes)) * hardware.network_seconds
    latency = math.ceil(size / BUCKET_BYTES) * (COLLECTIVE_SECONDS + hops)
    return all_reduce_bytes(size, devices) / _bandwidth(devices, hardware) + latency


def gather_seconds(size: float, devices: int, units: int, hardware: Hardware) -> float:
    """Seconds to gather, or to add up and scatter, `size` bytes in so many units, each round a ring."""
    if devices == 1:
        return 0.0
    nodes = hardware.nodes(devices)
    hops = (devices - nodes) * hardware.link_seconds + (nodes - 1) * hardware.network_seconds
    travel = (devices - 1) / devices * size / _bandwidth(devices, hardware)
    return travel + units * (COLLECTIVE_SECONDS + hops)


def _bandwidth(devices: int, hardware: Hardware) -> float:
    """That of a ring's slowest link."""
    return min(hardware.link, hardware.network) if hardware.nodes(devices) > 1 else hardware.link


@dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    states: float
    """Weights, gradients, moments and the bf16 copies of the weights."""
    activations: float
    available: float

    @property
    def total(self) -> float:
        """What a run needs."""
        return self.states + self.activations

    @property
    def fits(self) -> bool:
        """Whether the device has it."""
        return self.total <= self.available


def memory_of(model: Model, plan: Plan, hardware: Hardware) -> Memory:
    """What a device needs, beside what it has."""
    states = STATE_BYTES * model.parameters
    if plan.is_sharded:
        states /= plan.devices
        if plan.micro_batches > 1:  # gradients add up whole
            states += 4 * model.parameters
    states += 2 * model.parameters
    activations = plan.micro_batch * model.activation_bytes(plan.length, plan.gradient_checkpointing)
    return Memory(states, activations, MEMORY_SHARE * hardware.memory)


def largest_micro_batch(model: Model, plan: Plan, hardware: Hardware) -> int:
    """The most blocks at a time for which the memory suffices."""
    one = memory_of(model, replace(plan, micro_batch=1, micro_batches=2), hardware)
    return max(0, math.floor((one.available - one.states) / one.activations))
