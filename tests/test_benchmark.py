"""recipes/benchmark.py: its ways of training do the same work, its figures follow from what is measured."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from model_fixtures import ours, randomise
from test_fast_paths import CAPACITY, LENGTH, ROWS, layer_outputs, masked_batch
from transformers import BertForMaskedLM

from bert_ln import BertLnForMaskedLM
from recipes import benchmark
from recipes.arguments import model_config
from recipes.batches import with_all_positions
from recipes.benchmark import ABLATION, GROWTH, KINDS, Arm, main, parse_command_line
from recipes.benchmark_arms import Clock, _switch_off, measure
from recipes.benchmark_loss import SHARE, Course, time_to_loss
from recipes.benchmark_report import exponent, ratios, write_benchmark
from recipes.benchmark_scaling import predicted_ratio, scaling
from recipes.benchmark_start import start_times
from recipes.budget import training_flops
from recipes.command_line import build_arguments
from recipes.cost_model import Hardware, Model
from recipes.dropout import CheapDropout, cheapen_dropout
from recipes.errors import UserError
from recipes.preparation import prepare_stores
from recipes.stock_recipe import stock_config

OPTIONS = {
    "vocab_size": 2000,
    "max_seq_length": 32,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "per_device_train_batch_size": 4,
    "max_steps": 1000,
}


def types(model, batch):
    """How many embeddings of types are looked up."""
    found = []
    table = model.bert.embeddings.token_type_embeddings
    with table.register_forward_hook(lambda module, inputs, output: found.append(inputs[0].numel())):
        model(**batch)
    return found[0]


def scores(model, batch):
    """Positions that the head works at."""
    return model(**batch).logits.shape[:-1].numel()


# What each switch must be seen to change, and its values before and after.
SEEN = {
    "cheap_dropout": (
        lambda model, batch: {type(m) for m in model.modules() if isinstance(m, torch.nn.Dropout)},
        {CheapDropout},
        {torch.nn.Dropout},
    ),
    "narrow_layer": (lambda model, batch: layer_outputs(model, **batch)[1], CAPACITY, LENGTH),
    "shared_embeddings": (types, 1, ROWS * LENGTH),
    "sparse_head": (scores, ROWS * CAPACITY, ROWS * LENGTH),
}


@pytest.mark.parametrize(
    "what", [arm.without for arm in ABLATION if arm.without not in (None, "keep_memory")]
)
def test_what_is_switched_off_is_off_and_changes_no_loss(what):
    plain, other = (randomise(ours(sparse_prediction=True)) for _ in range(2))
    for model in (plain, other):
        cheapen_dropout(model, has_mask=False)
        model.eval()
    _switch_off(what, other)
    batch = masked_batch()
    rival = with_all_positions(batch) if what == "sparse_head" else batch
    torch.testing.assert_close(plain(**batch).loss, other(**rival).loss, rtol=1e-5, atol=1e-6)
    look, before, after = SEEN[what]
    assert (look(plain, batch), look(other, rival)) == (before, after)


def test_the_stock_model_has_the_same_sizes():
    args = build_arguments(OPTIONS | benchmark.DROPOUT)
    config = stock_config(args)
    for name in (
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
    ):
        assert getattr(config, name) == OPTIONS[name]
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.1


def test_both_sides_train_the_same_parameters():
    args = build_arguments(OPTIONS | {"norm_placement": "post"})
    mine = BertLnForMaskedLM(model_config(args, vocab_size=args.vocab_size, pad_token_id=0))
    rival = BertForMaskedLM(stock_config(args))
    sizes = [{name: p.shape for name, p in model.named_parameters()} for model in (mine, rival)]
    assert sizes[0] == sizes[1]


@pytest.fixture
def options(tmp_path, corpus_dir):
    """A tiny model on a store that is there."""
    data = {"cache_dir": str(tmp_path), "train_file": str(corpus_dir), "sample_by": "paragraph"}
    options = OPTIONS | data | {"validation_split_percentage": 10.0, "norm_placement": "post"}
    prepare_stores(build_arguments(options), 0)
    return options


def test_both_sides_get_blocks_of_one_shape_and_predict_the_same_share(options, monkeypatch):
    batches = {"stock": [], "ours": []}

    def noting(name, forward):
        def noted(model, **batch):
            batches[name].append(batch)
            return forward(model, **batch)

        return noted

    monkeypatch.setattr(BertForMaskedLM, "forward", noting("stock", BertForMaskedLM.forward))
    monkeypatch.setattr(BertLnForMaskedLM, "forward", noting("ours", BertLnForMaskedLM.forward))
    for kind in batches:
        measure(Arm(kind, kind), options, 0.0)
    rows, length = OPTIONS["per_device_train_batch_size"], OPTIONS["max_seq_length"]
    share = build_arguments(options).mlm_probability
    capacity = round(share * (length - 2))
    shapes = {
        "stock": dict.fromkeys(
            ("input_ids", "token_type_ids", "attention_mask", "labels"), torch.Size([rows, length])
        ),
        "ours": {
            "input_ids": torch.Size([rows, length]),
            "masked_positions": torch.Size([rows, capacity]),
            "labels": torch.Size([rows, capacity]),
            "num_items_in_batch": torch.Size([]),
        },
    }
    for name, seen in batches.items():
        assert all({key: value.shape for key, value in batch.items()} == shapes[name] for batch in seen)
        predicted = sum(int((batch["labels"] != -100).sum()) for batch in seen) / len(seen)
        # The stock collator draws how many.
        assert predicted == pytest.approx(rows * share * (length - 2), rel=0.4)
    assert all(batch["attention_mask"].all() for batch in batches["stock"])


@pytest.mark.slow
def test_each_way_of_training_is_measured(options):
    plan = [(Arm(kind, kind, benchmark.NO_DROPOUT), options) for kind in KINDS]
    for (found,) in benchmark._alternate(plan, 1, 0.0).values():
        assert found["updates"] >= 5
        assert min(found[name] for name in ("tokens_per_second", "mfu", "ceiling", "peak_bytes")) > 0


@pytest.mark.slow
def test_losses_are_taken_from_the_weights_that_are_trained(options):
    options["learning_rate"] = 1e-3
    found = time_to_loss(options, {"same": {}, "idle": {"learning_rate": 0.0}}, minutes=0.1)
    assert len({way["masks"] for way in found.values()}) == 1
    losses = {name: [loss for _, _, loss in way["curve"]] for name, way in found.items()}
    assert len(set(losses["idle"])) == 1
    for name, limit in (("stock", 6.0), ("same", 6.0 * SHARE)):
        assert losses[name][-1] < losses["idle"][0]
        assert found[name]["curve"][-1][1] > limit  # the weights at the end are measured, too
        assert min(found[name]["ceilings"]) > 0


@pytest.mark.slow
def test_two_processes_share_the_blocks_of_one(options):
    found = scaling({"tiny": options}, 0.0, 1)["tiny"]
    assert [[one["updates"] for one in rounds] for rounds in found["measured"].values()] == [[5], [5]]
    assert all(rounds[0]["tokens_per_second"] > 0 for rounds in found["measured"].values())
    assert found["predicted"][0] > 0


def test_the_prediction_counts_the_gradients_that_travel(options, monkeypatch):
    args, one = build_arguments(options), {"ceiling": 1e12, "mfu": 0.5}
    parameters = Model.of(model_config(args, vocab_size=args.vocab_size, pad_token_id=0), 0.15).parameters
    tokens = args.per_device_train_batch_size * args.max_seq_length
    config = model_config(args, vocab_size=args.vocab_size, pad_token_id=0)
    alone = tokens * training_flops(config, args.max_seq_length, args.mlm_probability) / 0.5e12
    # Each of two sends and gets the bytes of the gradient once, and no memory is shared that has no limit.
    bare = Hardware("cpu", 1.0, 1.0, math.inf, 1e9, math.inf, 2, link_seconds=0.0, overlaps=False)
    monkeypatch.setattr("recipes.benchmark_scaling.find_hardware", lambda name, devices: bare)
    monkeypatch.setattr("recipes.cost_model.COLLECTIVE_SECONDS", 0.0)
    assert predicted_ratio(args, one) == pytest.approx(alone / (alone + 4 * parameters / 1e9))


@pytest.mark.slow
def test_a_run_is_resumed_from_where_it_was_ended():
    found = start_times(["--num_hidden_layers", "1", "--hidden_size", "64", "--num_attention_heads", "1"])
    few, more = found["resumed"]
    assert 10 <= few < few + 90 <= more
    assert min(found["cold"], found["warm"], *found["resumed"].values()) > 0


def test_training_time_is_without_validations(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def validate():
        nonlocal now
        now += 140.0
        return 5.0

    course = Course(100.0)
    now = 30.0  # start-up, and the first update
    assert not course.answer()
    now = 40.0
    assert not course.answer()
    course.note(validate)
    course.note(validate)  # once an update
    assert course.curve == [(2, 10.0, 5.0)] and course.seconds == 10.0
    now += 90.5
    assert course.answer() and course.agreed


def test_the_first_updates_are_not_timed(monkeypatch):
    times = iter([10.0, 20.0, 21.0, 22.0, 23.0, 24.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock(2.5)
    ended = [clock.answer() for _ in range(5)]
    assert ended == [False, False, False, False, True] and clock.agreed
    assert clock.seconds_per_update == 1.0


def round_of(rate, peak=1.0):
    return {"tokens_per_second": rate, "mfu": 0.5, "ceiling": 1e9, "peak_bytes": peak, "updates": 9}


def test_ratios_are_those_of_a_round_to_the_best_rival_in_it():
    mine, one, other = ([round_of(rate) for rate in rates] for rates in ((8, 9), (2, 1), (1, 3)))
    assert ratios(mine, [one, other]) == [4, 3]
    peaks = ([round_of(1, peak) for peak in peaks] for peaks in ((1, 2), (4, 9), (5, 8)))
    mine, one, other = peaks
    assert ratios(mine, [one, other], "peak_bytes") == [0.25, 0.25]


def test_an_exponent_is_that_of_a_power_law():
    assert exponent([2, 4, 8, 16], [3 * n**1.5 for n in (2, 4, 8, 16)]) == pytest.approx(1.5)


def test_the_report_has_a_row_for_each_way_and_each_axis(tmp_path):
    names = [f"6x256|{dropout}|{kind}" for dropout in (0.1, 0.0) for kind in KINDS]
    results = {
        "circumstances": "here",
        "command": "python recipes/benchmark.py",
        "ratios": {name: [round_of(2.0 + name.endswith("ours"))] * 3 for name in names},
        "ablation": {arm.name: [round_of(1.0)] * 3 for arm in ABLATION},
        "growth": {f"{what}|{n}": [round_of(n)] for what, points in GROWTH.items() for n, _ in points},
        "data": {
            "token_store": dict.fromkeys(
                [f"{name}_tokens_per_second" for name in ("store", "all_cores", "one_core")], 1.0
            )
            | {"bytes_per_token": 2.0},
            "first_batch_seconds": {10: 0.1},
            "validation_tokens_per_second": 5.0,
        },
        "loss": {
            "stock": {
                "curve": [(20, 300.0, 7.0), (40, 600.0, 6.5), (80, 1200.0, 6.55)],
                "ceilings": [4e11, 5e11],
            },
            "quick": {
                "curve": [(20, 60.0, 6.6), (40, 120.0, 6.5), (60, 180.0, 6.4)],
                "ceilings": [4e11, 5e11],
            },
            "slow": {"curve": [(20, 60.0, 6.6)], "ceilings": [4e11, 5e11]},
        },
        "scaling": {"BERT-base": {"measured": {1: [round_of(8.0)], 2: [round_of(6.0)]}, "predicted": [0.8]}},
        "start": {"cold": 20.0, "warm": 8.0, "resumed": {10: 9.0}},
    }
    values, tables, *figures = write_benchmark(results, tmp_path)
    assert json.loads(values.read_text())["circumstances"] == "here"
    text = tables.read_text()
    assert "| 6x256, 0.1 | ours compiled | 1.00 (1.00-1.00) |" in text
    assert "| 6x256, 0.1 | ours | 1.50 (1.50-1.50) | 1.50 (1.50-1.50) | 1.00 (1.00-1.00) |" in text
    assert "| BERT-base | 8 | 6 | 0.75 (0.75-0.75) | 0.80 (0.80-0.80) |" in text
    assert "| resumed after 10 updates | 9.0 |" in text
    # Stock has its lowest loss after 600 s, not at its end.
    assert "| quick | 60 | 180 | 6.400 | 0.200 | 400, 500 |" in text
    assert "| slow | 20 | 60 | 6.600 | not reached | 400, 500 |" in text
    assert all(f"| {arm.name} |" in text for arm in ABLATION)
    assert all(f"| {what} |" in text for what in GROWTH) and "| -1.00 |" in text
    assert len(figures) == 2 and all(figure.stat().st_size > 10_000 for figure in figures)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--part data", "--part: unknown option; did you mean parts?"),
        (
            "--parts data,speed",
            "parts speed: allowed: ratios, ablation, growth, data, loss, scaling, start, with",
        ),
        ("--sizes large", "sizes large: allowed: 6x256, BERT-base"),
        ("--repeats 0", "repeats 0: must be at least 1"),
        ("--seconds -1", "seconds -1.0: must be at least 0"),
        ("--minutes -1", "minutes -1.0: must be at least 0"),
        ("--repeats many", "repeats"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size 0"),
        ("--max_seq_length 2", "max_seq_length 2"),
    ],
)
def test_a_mistake_is_named(words, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse_command_line(words.split())


def test_the_shape_of_a_batch_is_that_of_ratios_and_ablation():
    given = parse_command_line(["--max_seq_length", "512", "--per_device_train_batch_size", "64"])
    shape = benchmark._shape(given)
    for plan in (benchmark._ratios(["BERT-base"], shape), benchmark._ablation(shape)):
        assert all(
            options["max_seq_length"] == 512 and options["per_device_train_batch_size"] == 64
            for _, options in plan
        )
    assert benchmark._shape(parse_command_line([])) == {}


def test_on_a_gpu_two_processes_are_not_asked_for(monkeypatch):
    monkeypatch.setattr(Accelerator, "device", torch.device("cuda"))
    assert "scaling" not in parse_command_line([]).parts
    with pytest.raises(UserError, match=r"parts scaling: .*cuda"):
        parse_command_line(["--parts", "scaling"])


def test_what_was_measured_is_written_after_each_part(monkeypatch, tmp_path):
    def fail():
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["b", "--parts", "growth,start", "--output_dir", str(tmp_path)])
    monkeypatch.setattr(benchmark, "prepare_stores", lambda args, seconds: None)
    monkeypatch.setattr(
        benchmark, "_alternate", lambda plan, *rest: {arm.name: [round_of(1.0)] for arm, _ in plan}
    )
    monkeypatch.setattr(benchmark, "start_times", lambda options: fail())
    with pytest.raises(KeyboardInterrupt):
        main()
    assert "| depth |" in (tmp_path / "benchmark.md").read_text()


def test_a_mistake_ends_with_2(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recipes/benchmark.py", "--repeats", "0"])
    assert main() == 2
    assert capsys.readouterr().err == "error: repeats 0: must be at least 1\n"
