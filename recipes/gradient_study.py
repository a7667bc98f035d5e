"""All measurements that were asked for: each made once, kept in a file of its own, and reused.

OUTPUT_DIR/settings.json       what all measurements of the folder have in common
OUTPUT_DIR/measurements/       one JSON for each (kind, placement, depth, seed)
OUTPUT_DIR/warmup/             the warm-up runs, made by recipes/pretrain.py: folder, options, log
"""

import hashlib
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import AutoTokenizer, PreTrainedModel

from bert_ln import BertLnForMaskedLM
from recipes.arguments import MODEL_OPTIONS, PretrainingArguments, model_config
from recipes.batches import TrainingBatches
from recipes.console import clock
from recipes.diagnosis import Diverged
from recipes.errors import UserError
from recipes.files import write_json
from recipes.gradient_arguments import GradientArguments
from recipes.gradient_probe import INITS, Batch, Measurement, measure
from recipes.launch import set_threads
from recipes.masking import Masker
from recipes.preparation import PreparedData, prepare_data
from recipes.pretraining import build_model
from recipes.run_record import OPERATIONAL, model_settings
from recipes.stages import build_stages
from recipes.theory import simplified_batches, simplified_model
from recipes.tokenization import tokenizer_fingerprint

WARMUP, CHECKPOINT = "warmup", "checkpoint"
# Options that differ between the measurements of a folder, or do not change them.
NOT_COMMON = OPERATIONAL - {"per_device_train_batch_size", "gradient_accumulation_steps"}
NOT_COMMON |= {"norm_placement", "num_hidden_layers", "seed"}


@dataclass(frozen=True)
class Point:
    """One measurement to make. `kind` is a name in INITS, `warmup` or `checkpoint`."""

    kind: str
    norm_placement: str
    num_hidden_layers: int
    seed: int
    checkpoint: str | None = None
    """The folder, where the kind is `checkpoint`."""

    @property
    def name(self) -> str:
        """The name of its files; a checkpoint is known by its weights, wherever it lies."""
        name = f"{self.kind}-{self.norm_placement}-{self.num_hidden_layers}layers-seed{self.seed}"
        if self.checkpoint is None:
            return name
        return f"{name}-{_fingerprint(Path(self.checkpoint))}"


def _fingerprint(folder: Path) -> str:
    """What tells the weights in a folder from others."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]


def _tokenizer_of(folder: str) -> str:
    try:
        return tokenizer_fingerprint(AutoTokenizer.from_pretrained(folder))
    except (OSError, ValueError) as error:
        raise UserError(
            f"checkpoints {folder}: holds no tokenizer ({' '.join(str(error).split())})"
        ) from error


def _say(line: str) -> None:
    print(line, flush=True)


def measure_all(args: GradientArguments) -> list[dict[str, Any]]:
    """Make what is missing, and return all measurements: those of `Point` and of `Measurement`, flat.

    Raises:
        UserError: Anything that is wrong with data, checkpoints or the output folder.
    """
    study = GradientStudy(args)
    study.prepare()
    return study.run()


@dataclass
class GradientStudy:
    """The probe and its folder."""

    args: GradientArguments

    def __post_init__(self) -> None:
        self.base = self.args.pretraining()
        self.output_dir = Path(self.base.output_dir)
        self.points = plan(self.args)

    # ---------------------------------------------------------------- before

    def prepare(self) -> None:
        """The folder, the data and what the measurements have in common, checked."""
        self._check_folder(self._settings())
        self._make_folder()
        accelerator = Accelerator(mixed_precision="no")
        if accelerator.num_processes != 1:
            raise UserError(
                f"num_processes {accelerator.num_processes}: one is enough; start with python, not accelerate"
            )
        # Sums are taken in float64, which Apple's devices lack.
        self.device = torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device
        threads = set_threads()
        stages = build_stages(self.base)
        self.data = prepare_data(self.base, stages, accelerator)
        for store in self.data.stores:
            store.check(self.base.max_seq_length)
        self.masker = Masker(self.data.tokenizer, self.base)
        self._check_checkpoints()
        settings = self._settings() | self.data.fingerprints()
        self._check_folder(settings)
        write_json(self.output_dir / "settings.json", settings)
        self._announce(threads)

    def _settings(self) -> dict[str, Any]:
        """What all measurements have in common, data fingerprints aside."""
        options = self.base.to_dict()
        options |= options.pop("model") | {"num_batches": self.args.probe.num_batches}
        return _resolved(options)

    def _check_folder(self, settings: dict[str, Any]) -> None:
        file = self.output_dir / "settings.json"
        if file.exists():
            found = _resolved(json.loads(file.read_text()))
            different = [f"{n} is {v}, was {found.get(n)}" for n, v in settings.items() if v != found.get(n)]
            if different:
                raise UserError(
                    f"output_dir {self.output_dir}: holds measurements of other settings "
                    f"({'; '.join(different)}); choose another folder"
                )
        elif self.output_dir.is_dir() and any(f.name != "measurements" for f in self.output_dir.iterdir()):
            raise UserError(
                f"output_dir {self.output_dir}: holds files but no measurements; choose an empty folder"
            )

    def _make_folder(self) -> None:
        try:
            (self.output_dir / "measurements").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"{error.strerror}; give a folder that can be made"
            raise UserError(f"output_dir {self.output_dir}: {reason}") from error

    def _check_checkpoints(self) -> None:
        ours = tokenizer_fingerprint(self.data.tokenizer)
        for folder in self.args.probe.checkpoints:
            if _tokenizer_of(folder) != ours:
                raise UserError(
                    f"checkpoints {folder}: has another tokenizer than the data; "
                    f"give the options of its run, or --tokenizer_name {folder}"
                )

    def _announce(self, threads: str) -> None:
        base, probe = self.base, self.args.probe
        tokens = probe.num_batches * base.per_device_train_batch_size * base.max_seq_length
        missing = sum(not self._file(point).exists() for point in self.points)
        _say(
            f"{len(self.points)} measurements, {missing} to make: gradient averaged over "
            f"{probe.num_batches} batches of {base.per_device_train_batch_size} x {base.max_seq_length} "
            f"tokens = {tokens:,}, float32, dropout off; {threads}"
        )

    # ---------------------------------------------------------------- measuring

    def run(self) -> list[dict[str, Any]]:
        """Every measurement, from its file or made now, with the time left."""
        costs = [0.0 if self._file(point).exists() else self._cost(point) for point in self.points]
        start, results = time.perf_counter(), []
        for number, point in enumerate(self.points):
            if result := self._kept_or_made(point):
                results.append(asdict(point) | result)
            if costs[number]:
                elapsed, done = time.perf_counter() - start, sum(costs[: number + 1])
                left = elapsed * (sum(costs) - done) / done
                _say(f"{number + 1:>4}/{len(self.points)}  {point.name:<40} left {clock(left)}")
        return results

    def _file(self, point: Point) -> Path:
        return self.output_dir / "measurements" / f"{point.name}.json"

    def _cost(self, point: Point) -> float:
        """Relative: layers, and about two layers' worth for the output, over batches."""
        batches = self.args.probe.num_batches
        if point.kind == WARMUP:
            batches += self.base.max_steps
        return batches * (point.num_hidden_layers + 2)

    def _kept_or_made(self, point: Point) -> dict[str, Any] | None:
        """The measurement; None where the warm-up run diverged: there is one seed less then."""
        file = self._file(point)
        if not file.exists():
            try:
                write_json(file, asdict(self._measure(point)))
            except Diverged:
                _say(f"{point.name}: diverged during warm-up; not measured")
                return None
        return json.loads(file.read_text())

    def _measure(self, point: Point) -> Measurement:
        args = self._arguments(point)
        if point.kind == "theory":
            width, length = args.model["hidden_size"], args.max_seq_length
            model = simplified_model(point.norm_placement, point.num_hidden_layers, width, point.seed)
            blocks = args.per_device_train_batch_size
            batches = simplified_batches(self.args.probe.num_batches, blocks, length, width, point.seed)
        else:
            model, batches = self._model(point, args), self._batches(args)
        return measure(model.to(self.device), batches)

    def _arguments(self, point: Point) -> PretrainingArguments:
        return self.args.pretraining(
            norm_placement=point.norm_placement, num_hidden_layers=point.num_hidden_layers, seed=point.seed
        )

    def _model(self, point: Point, args: PretrainingArguments) -> PreTrainedModel:
        if point.checkpoint is not None:
            return load_model(point.checkpoint)
        if point.kind == WARMUP:
            return load_model(self._warm_up(point))
        tokenizer = self.data.tokenizer
        set_seed(point.seed)
        config = model_config(args, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
        if point.kind == "bert":
            config.initializer = "normal"  # whatever the placement brings
        model = build_model(args, config, torch.device("cpu"))
        INITS[point.kind](model)
        return model

    def _batches(self, args: PretrainingArguments) -> list[Batch]:
        """The first batches that a run with these options and this seed would train on."""
        return read_batches(args, self.data, self.masker, self.args.probe.num_batches)

    def _warm_up(self, point: Point) -> Path:
        """The model of a warm-up run that recipes/pretrain.py makes, continues, or finds finished."""
        folder = self.output_dir / "warmup" / point.name
        folder.parent.mkdir(exist_ok=True)
        options = self.args.values | {
            "norm_placement": point.norm_placement,
            "num_hidden_layers": point.num_hidden_layers,
            "seed": point.seed,
            "output_dir": str(folder),
        }
        config, log = folder.with_suffix(".yaml"), folder.with_suffix(".log")
        config.write_text(yaml.safe_dump(options))
        script = Path(__file__).with_name("pretrain.py")
        with log.open("a", encoding="utf-8") as stream:
            code = subprocess.run(
                [sys.executable, str(script), "--config", str(config)], stdout=stream, stderr=stream
            ).returncode
        if code == 3:
            raise Diverged(point.name)
        if code:
            lines = log.read_text().strip().splitlines() or ["no message"]
            raise UserError(f"warm-up run {folder}: failed with exit code {code} ({lines[-1]}); see {log}")
        return folder


def plan(args: GradientArguments) -> list[Point]:
    """What is to be measured, quick things first."""
    probe, base = args.probe, args.pretraining()
    seeds = range(base.seed, base.seed + probe.seeds)
    points = [
        Point(init, placement, depth, seed)
        for init in probe.inits
        for depth in probe.depths
        for placement in probe.norm_placements
        for seed in seeds
    ]
    if not probe.checkpoints:
        depth = base.model["num_hidden_layers"]
        return points + [Point(WARMUP, p, depth, s) for s in seeds for p in probe.norm_placements]
    for folder in probe.checkpoints:
        config = load_model(folder).config
        points += [
            Point(CHECKPOINT, config.norm_placement, config.num_hidden_layers, seed, folder) for seed in seeds
        ]
    return points


def load_model(folder: str | Path) -> BertLnForMaskedLM:
    """A model from a folder, in float32.

    Raises:
        UserError: The folder's weights do not load as a masked-language model of ours.
    """
    try:
        model = BertLnForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoints {folder}: {' '.join(str(error).split())}") from error
    # A way of running it that configs do not keep.
    model.config.sparse_prediction = True
    return model


def read_batches(
    args: PretrainingArguments, data: PreparedData, masker: Masker, num_batches: int
) -> list[Batch]:
    """The first micro-batches of a run with these options, masked."""
    stages = build_stages(args)
    batches = TrainingBatches(data.stores, data.weights, masker, args, stages, 0, 1)
    return [batches[step, 0] for step in range(num_batches)]


def _resolved(settings: dict[str, Any]) -> dict[str, Any]:
    """What measurements have in common, with every option of the model, given or not."""
    model = model_settings({name: value for name, value in settings.items() if name in MODEL_OPTIONS})
    return {name: value for name, value in (settings | model).items() if name not in NOT_COMMON}
