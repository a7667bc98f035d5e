"""Options: YAML under the command line, types kept, mistakes refused by name."""

import subprocess
import sys

import pytest
import yaml

from recipes.arguments import model_config
from recipes.command_line import DEFAULT_CONFIG, parse_arguments
from recipes.errors import UserError
from recipes.stages import build_stages
from tests.conftest import ROOT


def test_the_command_line_wins_over_yaml_over_defaults(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("learning_rate: 5e-4\nhidden_size: 64\nnum_attention_heads: 4\nbf16: true\n")
    args = parse_arguments(["--config", str(config), "--hidden_size", "128", "--adam_beta2=0.98"])
    assert (args.learning_rate, args.adam_beta2, args.weight_decay, args.bf16) == (5e-4, 0.98, 0.01, True)
    assert (args.model["hidden_size"], args.model["num_attention_heads"]) == (128, 4)
    # What neither says is as in the default run.
    default = parse_arguments([])
    assert args.max_steps == default.max_steps
    assert args.model["num_hidden_layers"] == default.model["num_hidden_layers"]


def test_without_a_config_it_is_the_default_run():
    args = parse_arguments(["--warmup_steps", "7"])
    assert f"vocab_size: {args.vocab_size}" in DEFAULT_CONFIG.read_text()
    assert args.warmup_steps == 7


def test_words_become_values():
    words = (
        "--bf16 --torch_compile false --resume_from_checkpoint --learning_rate 1e-3 --embedding_norm false"
    )
    words += (
        " --save_total_limit none --num_processes 1 --train_file 2024 --lr_scheduler_type warmup_stable_decay"
    )
    args = parse_arguments([*words.split(), "--lr_scheduler_kwargs", "{num_decay_steps: 5}"])
    assert args.bf16 is True
    assert args.torch_compile is False
    assert args.resume_from_checkpoint is True
    assert args.learning_rate == 1e-3
    assert args.model["embedding_norm"] is False
    assert args.save_total_limit is None
    assert args.train_file == "2024"
    assert args.lr_scheduler_kwargs == {"num_decay_steps": 5}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--learning_rat 1", "--learning_rat: unknown option; did you mean learning_rate?"),
        ("--hiden_size 8", "--hiden_size: unknown option; did you mean hidden_size?"),
        ("--max_steps 0", "max_steps 0: must be at least 1"),
        ("--max_steps 1.5", "max_steps 1.5: must be of type int"),
        ("--max_steps many", "max_steps 'many': must be of type int"),
        ("--per_device_train_batch_size 0", "per_device_train_batch_size 0: must be at least 1"),
        ("--learning_rate high", "learning_rate 'high': must be of type float"),
        ("--learning_rate -1", "learning_rate -1.0: must be at least 0"),
        ("--mlm_probability 0", "mlm_probability 0.0: must be more than 0 and less than 1"),
        ("--mlm_probability 15", "mlm_probability 15.0: must be more than 0 and less than 1"),
        ("--mask_replace_prob 0.95", "must be at most 1"),
        ("--masking_unit words", "masking_unit 'words': allowed: token, whole_word, span"),
        ("--optim adamw_torch_fussed", "optim 'adamw_torch_fussed': allowed: adamw_torch, adamw_torch_fused"),
        ("--lr_scheduler_type linar", "lr_scheduler_type 'linar': allowed: linear, constant"),
        ("--lr_scheduler_kwargs {num_decay_steps: 1}", "lr_scheduler_kwargs.num_decay_steps"),
        ("--norm_placement prenorm", "norm_placement"),
        ("--norm_placement prenorm", "'pre'"),
        ("--norm_type layernorm", "layer_norm"),
        ("--hidden_size 250", "num_attention_heads"),
        ("--max_seq_length 513", "max_seq_length 513: the model has max_position_embeddings 512"),
        ("--max_seq_length 4", "max_seq_length 4: must be at least 8"),
        ("--warmup_steps 999999", "warmup_steps 999999: must be less than max_steps"),
        ("--bf16 perhaps", "bf16 'perhaps': must be of type bool or null"),
        ("--report_to wanddb", "report_to 'wanddb': allowed: none, tensorboard"),
        ("--config nowhere.yaml", "config nowhere.yaml: no such file"),
        ("stray", "stray: unknown option"),
        ("--seed 4294967296", "seed 4294967296: must be at least 0 and less than 2**32"),
        ("--learning_rate inf", "learning_rate inf: must be at least 0"),
        ("--max_steps", "max_steps"),
        ("--num_attention_heads 0", "num_attention_heads"),
        ("--stages [5]", "stages[0] 5: must be a table"),
        ("--mlm_probability 0.001", "mlm_probability 0.001: selects no token of a block of 128"),
        ("--attn_implementation flash", "attn_implementation 'flash': allowed: eager, sdpa, flex_attention"),
    ],
)
def test_mistakes_are_named(words, message):
    flag, *value = words.split(" ", 1)
    with pytest.raises(UserError) as error:
        parse_arguments([flag, *value])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: [1]", "learning_rate [1]: must be of type float"),
        ("learnin_rate: 1", "learnin_rate: unknown option; did you mean learning_rate?"),
        ("- 1", "must be a table of option: value"),
        ("a: b: c", "not readable as YAML"),
        ("stages: 5", "stages 5: must be of type"),
        ("vocab_size: true", "vocab_size True: must be of type int"),
        ("1: 2", "1: unknown option"),
        ("token_store: x\ntrain_file: y", "train_file y: not together with token_store"),
        (
            "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {num_decay_steps: 0}",
            "lr_scheduler_kwargs.num_decay_steps 0: must be at least 1",
        ),
        (
            "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {min_lr_ratio: low}",
            "lr_scheduler_kwargs.min_lr_ratio 'low': must be between 0 and 1",
        ),
    ],
)
def test_mistakes_in_yaml_are_named(tmp_path, text, message):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(UserError) as error:
        parse_arguments(["--config", str(config)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("--norm_type none", "none"),
        ("--qk_norm none", None),
        ("--qk_norm l2", "l2"),
        ("--attention_window none", None),
        ("--attention_window 4", 4),
        ("--attention_window 4 --attention_window_global last_layer", "last_layer"),
        ("--initializer xavier_normal", "xavier_normal"),
        ("--norm_placement normformer --normformer_residual_scale", True),
        ("--norm_placement deep_norm --deep_norm_alpha 2", 2.0),
        ("--norm_placement deep_norm --num_hidden_layers 8 --deep_norm_alpha none", 2.0),
        ("--norm_placement re_zero --embedding_norm none", False),
        ("--norm_placement recursive_skip --recursive_skip_order 3", 3),
        ("--norm_type ada_norm --ada_norm_scale 2", 2.0),
        ("--norm_type dyt --dyt_alpha 1e-1", 0.1),
    ],
)
def test_methods_are_options(tmp_path, words, value):
    """On the command line and in YAML; what is none is the method's own, as far as it has one."""
    args = parse_arguments(words.split())
    names = [word.removeprefix("--") for word in words.split() if word.startswith("--")]
    found = getattr(model_config(args, vocab_size=100), names[-1])
    assert (found, type(found)) == (value, type(value))
    config = tmp_path / "run.yaml"
    given = f" {words}".split(" --")[1:]
    config.write_text("".join(f"{': '.join((option + ' true').split()[:2])}\n" for option in given))
    assert parse_arguments(["--config", str(config)]).model == args.model


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--norm_placement deepnorm", "did you mean 'deep_norm'"),
        ("--norm_type rmsnorm", "did you mean 'rms_norm'"),
        ("--qk_norm l3", "qk_norm: 'l3' is not one of ['l2', 'layer_norm', 'rms_norm']"),
        ("--initializer xavier", "did you mean 'xavier_normal'"),
        ("--attention_window_global CLS", "attention_window_global"),
        ("--attention_windows 4", "did you mean attention_window?"),
        ("--attention_window wide", "attention_window 'wide': must be of type int or null"),
        ("--attention_window 0", "attention_window=0 must be None or at least 1"),
        ("--attention_window 4 --attention_window_causal", "attention_window_global='cls' lets all tokens"),
        ("--attention_window_global none", "attention_window_global='none' has no effect"),
        ("--norm_placement re_zero --norm_type rms_norm", "norm_placement='re_zero': it has no norms"),
        ("--norm_type frn --attention_window 4", "attention_window=4 must be None with norm_type='frn'"),
        ("--norm_placement t_fixup --embedding_norm true", "embedding_norm=True must be false"),
        ("--norm_placement post --norm_type none", "it would be another method"),
        ("--norm_placement deep_norm --norm_type dyt", "takes away the scale of each token"),
        ("--norm_placement hybrid_norm --qk_norm l2", "qk_norm='l2' must be None"),
        ("--deep_norm_alpha 2", "deep_norm_alpha=2.0 has no effect with norm_placement='pre'"),
        ("--norm_placement deep_norm --deep_norm_alpha 0", "deep_norm_alpha=0.0 must be a number above 0"),
        ("--frn_tlu", "frn_tlu=True has no effect with norm_type='layer_norm'"),
        ("--norm_placement mix_ln --mix_ln_alpha 2", "mix_ln_alpha=2.0 must be between 0 and 1"),
        ("--norm_placement recursive_skip --recursive_skip_order 0", "recursive_skip_order=0 must be"),
        ("--qk_norm rms_norm --qk_norm_length 9", "qk_norm_length=9 has no effect without qk_norm='l2'"),
    ],
)
def test_methods_that_make_no_sense_are_refused_in_one_line(words, message):
    with pytest.raises(UserError) as error:
        parse_arguments(words.split())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_refused_pair_ends_the_command_before_any_work(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "pretrain.py")]
    command += ["--norm_placement", "re_zero", "--norm_type", "rms_norm"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    (line,) = run.stderr.splitlines()
    assert line.startswith("error: norm_type='rms_norm' is not possible with norm_placement='re_zero'")
    assert not list(tmp_path.iterdir())


def test_help_lists_every_option_with_its_default():
    command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), "--help"]
    text = " ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    default = parse_arguments([])
    for words in (
        f"that is selected for prediction. [{default.mlm_probability}]",
        f"--hidden_size VALUE hidden_size of BertLnConfig. [{default.model['hidden_size']}]",
        "--weight_decay VALUE Decoupled decay, not on norms and biases. [0.01]",
    ):
        assert words in text


def test_the_wikipedia_configuration_says_everything_that_matters():
    """It must not change when the default run does."""
    own = yaml.safe_load((ROOT / "recipes/configs/bert_base_wikipedia.yaml").read_text())
    default = yaml.safe_load(DEFAULT_CONFIG.read_text())
    assert set(default) - set(own) <= {"per_device_train_batch_size"}  # each of its stages says that
    args = parse_arguments(["--config", str(ROOT / "recipes/configs/bert_base_wikipedia.yaml")])
    assert [stage.global_batch_size(8) for stage in build_stages(args)] == [256, 256]
