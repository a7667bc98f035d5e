"""The cost model against sums written out by hand, a real model's memory, and published runs."""

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from bert_ln import BertLnConfig, BertLnForMaskedLM
from recipes import cost_model
from recipes import estimate as command
from recipes.budget import training_flops
from recipes.cost_model import (
    HARDWARE,
    Hardware,
    Model,
    Plan,
    all_reduce_bytes,
    all_reduce_seconds,
    divide,
    find_hardware,
    gather_seconds,
    largest_micro_batch,
    memory_of,
    update_of,
)
from recipes.errors import UserError
from recipes.estimate import estimate, numbers_of_devices, parse
from tests.conftest import ROOT
from tests.model_fixtures import SIZES
from tests.published_runs import RUNS, table

BASE = BertLnConfig(vocab_size=30522, norm_placement="post", pad_token_id=0)
# Round numbers: 2 devices a node, 1 TFLOP/s, a link of 10 GB/s and a network of 1 GB/s without latency.
ROUND = Hardware("round", 1e12, 10e9, 1e12, 10e9, 1e9, 2, link_seconds=0.0, network_seconds=0.0)


@pytest.fixture(scope="module")
def base():
    return Model.of(BASE, predicted_share=0.15)


@pytest.fixture
def no_start(monkeypatch):
    """Collectives that begin to travel at once."""
    monkeypatch.setattr(cost_model, "COLLECTIVE_SECONDS", 0.0)


def plan(devices, blocks=64, **changes):
    micro_batch, micro_batches = divide(blocks, devices, 32)
    return Plan(devices, 128, micro_batch, micro_batches, **changes)


def run(*words, devices=None):
    own, args = parse(list(words))
    return estimate(own, args, devices or numbers_of_devices(own, args)[0])


def test_parameters_are_those_of_stock_bert(base):
    stock = BertForMaskedLM(BertConfig())
    assert base.parameters == sum(p.numel() for p in stock.parameters())
    assert base.embedded == sum(p.numel() for p in stock.bert.embeddings.parameters())


@pytest.mark.parametrize(("devices", "factor"), [(1, 0), (2, 1), (4, 1.5), (8, 1.75)])
def test_a_ring_sends_all_parts_round_twice(devices, factor):
    assert all_reduce_bytes(100, devices) == 100 * factor


def test_one_device_has_the_speed_of_its_mfu(base):
    update = update_of(base, plan(1), HARDWARE["h100"], mfu=0.5)
    rate = 64 * 128 / update.seconds
    assert rate == pytest.approx(0.5 * 989e12 / training_flops(BASE, 128, 0.15))
    assert update.traffic == update.exposed == 0


def test_an_update_by_hand(base, no_start):
    """Two nodes of two devices, with DDP; a device computes two micro-batches of 32 blocks."""
    flops, p, network = training_flops(BASE, 128, 0.15), base.parameters, 1e8
    optimizer = 40 * p / 1e12
    compute = (256 * 128 * flops / (0.4 * 1e12) - optimizer) / 4
    traffic = 2 * 3 / 4 * 4 * p / network
    update = update_of(base, plan(4, blocks=256), replace(ROUND, network=network), mfu=0.4)
    assert update.optimizer == pytest.approx(optimizer)
    assert update.compute == pytest.approx(compute)
    assert update.traffic == pytest.approx(traffic)
    hidden = compute * 2 / 3 / 2  # the last micro-batch's backward pass
    assert 0 < hidden < traffic - 4 * base.embedded / network * 1.5
    assert update.exposed == pytest.approx(traffic - hidden)
    assert update.seconds == pytest.approx(compute + optimizer + traffic - hidden)


def test_the_embeddings_gradient_is_waited_for_however_long_the_backward_pass(base, no_start):
    update = update_of(base, plan(2, blocks=2**16), ROUND, mfu=0.4)
    assert update.exposed == pytest.approx(4 * base.embedded / 10e9)
    no_overlap = update_of(base, plan(2, blocks=2**16), replace(ROUND, overlaps=False), mfu=0.4)
    assert no_overlap.exposed == no_overlap.traffic == pytest.approx(4 * base.parameters / 10e9)


def test_fsdp2_sends_weights_in_each_pass_and_divides_the_optimizer(base, no_start):
    for micro_batches, passes in ((1, 3), (2, 5)):
        sharded = Plan(2, 128, 1, micro_batches, is_sharded=True)
        update = update_of(base, sharded, ROUND, mfu=0.4)
        assert update.traffic == pytest.approx(passes / 2 * 4 * base.parameters / 10e9)
        assert update.optimizer == pytest.approx(40 * base.parameters / 1e12 / 2)


def test_a_ring_is_as_fast_as_its_slowest_link(no_start):
    assert all_reduce_seconds(1e9, 2, ROUND) == pytest.approx(1e9 / 10e9)
    assert all_reduce_seconds(1e9, 4, ROUND) == pytest.approx(1.5 * 1e9 / 1e9)
    assert gather_seconds(1e9, 4, 1, ROUND) == pytest.approx(0.75 * 1e9 / 1e9)


def test_latency_is_that_of_a_tree_for_each_bucket_and_of_a_ring_for_each_unit():
    """Of 4 nodes with 8 devices each; the bytes are too few to count."""
    endless = replace(ROUND, link=math.inf, network=math.inf, devices_per_node=8)
    latent = replace(endless, link_seconds=1e-6, network_seconds=1e-5)
    bucket = 14e-6 + 2 * (7 * 1e-6 + 2 * 1e-5)
    assert all_reduce_seconds(25 * 2**20, 32, latent) == pytest.approx(bucket)
    assert all_reduce_seconds(25 * 2**20 + 1, 32, latent) == pytest.approx(2 * bucket)
    assert gather_seconds(1, 32, 3, latent) == pytest.approx(3 * (14e-6 + 28 * 1e-6 + 3 * 1e-5))


@pytest.mark.parametrize("is_sharded", [False, True])
def test_more_devices_are_never_faster_than_in_proportion(base, is_sharded):
    seconds = [
        update_of(base, plan(2**i, 1024, is_sharded=is_sharded and i > 0), HARDWARE["h100"], 0.4).seconds
        for i in range(11)
    ]
    for one, two in pairwise(seconds):
        assert two > one / 2
    assert seconds[3] < seconds[2] < seconds[1] < seconds[0]


def test_states_are_sixteen_bytes_a_parameter_and_fsdp2_divides_them(base):
    p = base.parameters
    assert memory_of(base, plan(2), ROUND).states == 18 * p  # with the copies in bf16
    assert memory_of(base, plan(2, is_sharded=True), ROUND).states == (8 + 2) * p
    accumulating = plan(2, blocks=128, is_sharded=True)
    assert memory_of(base, accumulating, ROUND).states == (8 + 4 + 2) * p


@pytest.mark.parametrize("intermediate_size", [128, 256])
def test_activations_are_what_a_real_model_keeps(intermediate_size):
    """Counted by PyTorch as it saves them, less the copies of the weights; without dropout, dense enough."""
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": intermediate_size, "vocab_size": 3000}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_attention_heads": 2}

    def kept(layers):
        model = BertLnForMaskedLM(BertLnConfig(**sizes | {"num_hidden_layers": layers})).train()
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor

        ids = torch.randint(5, 3000, (64, 16))
        saving = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with saving, torch.autocast("cpu", torch.bfloat16):
            model(input_ids=ids, labels=ids)
        return sum(size for size, _ in seen.values())

    per_layer = (kept(5) - kept(2)) / 3
    copies = 2 * (4 * 64 * 64 + 2 * 64 * intermediate_size)
    counts = [
        Model.of(BertLnConfig(**sizes | {"num_hidden_layers": layers}), 1.0).activation_bytes(16, False)
        for layers in (2, 5)
    ]
    assert 64 * (counts[1] - counts[0]) / 3 == pytest.approx(per_layer - copies, rel=0.15)


def test_gradient_checkpointing_keeps_a_layer_and_the_inputs_of_the_others(base):
    head = 10 * 0.15 * 30522
    layer = 24 * 768 + 4 * 3072
    assert base.activation_bytes(128, False) == pytest.approx(128 * (12 * layer + head))
    assert base.activation_bytes(128, True) == pytest.approx(128 * (12 * 4 * 768 + layer + head))


def test_the_largest_micro_batch_fits_and_one_more_does_not(base):
    small = replace(HARDWARE["l4"], memory=6e9)
    most = largest_micro_batch(base, plan(1), small)
    assert most > 0
    assert memory_of(base, Plan(1, 128, most, 2), small).fits
    assert not memory_of(base, Plan(1, 128, most + 1, 2), small).fits
    assert largest_micro_batch(base, plan(1), replace(small, memory=1e9)) == 0


def test_the_screen_says_what_does_not_fit(capsys, monkeypatch):
    words = "--hardware l4 --devices 1 --stages none --per_device_train_batch_size 256 --max_seq_length 512"
    monkeypatch.setattr(sys, "argv", ["estimate.py", *words.split(), "--num_processes", "1"])
    assert command.main() == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "DOES NOT FIT" in line)
    most = line.split()[-1]
    assert run(*words.split(), "--per_device_train_batch_size", most, "--num_processes", "1").memories[0].fits


def test_blocks_are_divided_evenly_in_micro_batches_that_are_not_larger():
    assert divide(256, 8, 32) == (32, 1)
    assert divide(256, 1, 32) == (32, 8)
    assert divide(96, 2, 32) == (24, 2)
    assert divide(256, 256, 32) == (1, 1)


@pytest.mark.parametrize("devices", [3, 512])
def test_a_batch_that_cannot_be_divided_is_refused(devices):
    words = (
        f"^devices {devices}: an update has 256 blocks.* allowed: 1, 2, 4, 8, 16, 32, 64, 128, 256; or give"
    )
    with pytest.raises(UserError, match=words):
        run("--devices", str(devices))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--hardware", "h10"], "hardware h10: did you mean h100?"),
        (["--hardware", "mi300x"], "hardware mi300x: allowed: a100, a10g, cpu, h100, h200, l4"),
        (["--devices", "1,x"], "devices 1,x: must be integers of at least 1, such as 8 or 1,8,64"),
        (["--devices", "0"], "devices 0: must be integers"),
        (["--mfu", "1.5"], "mfu 1.5: must be more than 0 and at most 1"),
        (["--price_per_hour", "free"], "price_per_hour 'free': must be of type float or null"),
        (["--device", "8"], "--device: unknown option; did you mean devices?"),
        (["--hidden_sise", "8"], "--hidden_sise: unknown option; did you mean hidden_size?"),
        (["--config", "nowhere.yaml"], "config nowhere.yaml: no such file"),
        (["--network_bandwidth", "0"], "network_bandwidth 0.0: must be more than 0"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, words, error):
    monkeypatch.setattr(sys, "argv", ["estimate.py", *words])
    assert command.main() == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"error: {error}") and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize("name", ["bert_base_wikipedia", "default", "compare_base"])
def test_configurations_of_runs_are_read(name):
    file = ROOT / "recipes" / "configs" / f"{name}.yaml"
    own, args = parse(["--config", str(file)])
    e = run("--config", str(file))
    assert sum(e.steps) == args.max_steps
    assert e.devices == (args.num_processes or 1)


def test_another_batch_keeps_the_tokens_and_the_run_is_the_sum_of_its_stages():
    one, other = run(), run("--global_batch_size", "4096")
    assert other.tokens == pytest.approx(one.tokens, rel=1e-4)
    assert one.tokens == 256 * (900_000 * 128 + 100_000 * 512)
    updates = sum(steps * update.seconds for steps, update in zip(one.steps, one.updates))
    assert one.saves == 100  # 1,000,000 / save_steps 10,000
    assert one.save_seconds == pytest.approx(12 * one.model.parameters / 1e9)
    assert one.seconds == pytest.approx(updates + 100 * one.save_seconds)
    assert one.device_hours == pytest.approx(one.seconds / 3600 * 8)


def test_a_network_as_its_data_sheet_says():
    slow = run("--devices", "16", "--network_bandwidth", "12.5")
    assert slow.hardware.network == pytest.approx(0.8 * 12.5e9)
    assert slow.seconds > run("--devices", "16").seconds


def test_processes_on_a_cpu_share_it(monkeypatch):
    monkeypatch.setattr(cost_model, "_measured", lambda: (4e11, 2e10))
    one, two = find_hardware("cpu", 1), find_hardware("CPU", 2)
    assert (one.flops, two.flops) == (4e11, 2e11)
    assert one.memory == pytest.approx(2 * two.memory)
    assert two.nodes(2) == 1 and not two.overlaps


def test_a_row_for_each_number_of_devices(tmp_path):
    """As a user starts it, from elsewhere."""
    words = ["--devices", "1,8", "--price_per_hour", "2.5"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "estimate.py"), *words],
        cwd=tmp_path, text=True, capture_output=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    header, first, second = done.stdout.splitlines()[-3:]
    assert header.split()[-1] == "cost"
    one, eight = run("--devices", "1"), run("--devices", "8")
    for row, e in ((first, one), (second, eight)):
        assert row.split()[0] == str(e.devices)
        assert f"{e.tokens / e.training_seconds:,.0f}" in row
        assert row.split()[-1] == f"{2.5 * e.device_hours:,.0f}"
    assert not list(tmp_path.iterdir())


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--price_per_hour VALUE Price of a device for an hour" in text
    assert "--mlm_probability VALUE" in text


@pytest.mark.parametrize("published", [r for r in RUNS if r.like], ids=lambda published: published.name)
def test_published_runs_are_met_from_the_speed_of_smaller_ones(published):
    """To a quarter, from 8 to 3,472 GPUs; docs/scaling.md says why not better."""
    mfu = next(other for other in RUNS if other.name == published.like).mfu()
    assert published.predict(mfu) == pytest.approx(published.tokens_per_second, rel=0.25)


def test_the_documentation_has_the_table_that_the_program_prints():
    assert "\n".join(table()) in (ROOT / "docs" / "scaling.md").read_text()
