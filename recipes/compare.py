"""Compare pre-training runs: validation loss against step, honestly.

A study, which is one YAML of arms and seeds (recipes/configs/compare_small.yaml is one), run and reported.
Started again it keeps what is finished and resumes the rest. Options of pre-training replace its base's:

    python recipes/compare.py --config recipes/configs/compare_small.yaml
    python recipes/compare.py --config recipes/configs/compare_cpu.yaml --parallel_runs 2 --train_file corpus/

Runs that are there already; those that differ in their seed only are one arm:

    python recipes/compare.py output/pretrain output/post

With the scores of their checkpoints, fine-tuned by `glue_eval/run.py --run_dir output/pretrain,output/post`:

    python recipes/compare.py output/pretrain output/post --glue_results output/glue/results.json

Runs against the shipped curves of a study, inside or outside their band:

    python recipes/compare.py --against compare_small output/mine

The report is OUTPUT_DIR/report/index.html, and the same as report.md with its figures; --against draws one
figure into RUN/report, or into OUTPUT_DIR where that is given. Exit codes: 0 done (a
run that diverged is a result), 1 a run of the study failed, 2 a mistake in options, data or folders, 130
interrupted.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from recipes.command_line import Parser, add_options, option_names, refuse_unknown
from recipes.errors import UserError
from recipes.glue_results import read_tracks
from recipes.reference import compare_with_reference, draw_verdict, read_reference, write_reference
from recipes.report import write_report
from recipes.study import SET_BY_STUDY, read_study
from recipes.study_results import read_run, read_runs, read_study_curves
from recipes.study_runner import check_runs, run_study


def main() -> int:
    """Parse, call, done."""
    try:
        given, options = parse_command_line()
        if given.against:
            compare_against(given)
            return 0
        return compare(given, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        return 130


def parse_command_line(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """What was asked for, and the options of pre-training among it.

    Raises:
        UserError: Words that do not go together, or are no option.
    """
    parser = Parser(
        prog="recipes/compare.py",
        usage="%(prog)s (--config STUDY.yaml [--name value ...] | RUN ... [--against REFERENCE])",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_own(parser)
    own = set(vars(parser.parse_args([])))
    add_options(parser.add_argument_group("options of pre-training, in place of the base's"), SET_BY_STUDY)
    given, unknown = parser.parse_known_args(argv)
    refuse_unknown(unknown, [*own, *option_names()])
    options = {name: value for name, value in vars(given).items() if name not in own}
    _check_together(given, options)
    return given, options


def _add_own(parser: Parser) -> None:
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument("--config", type=Path, help="YAML file of the study")
    parser.add_argument("--output_dir", type=Path, help="[output/NAME_OF_THE_STUDY, or output/comparison]")
    parser.add_argument("--seeds", type=int, nargs="+", help="replace those of the study")
    parser.add_argument("--parallel_runs", type=int, default=1, help="runs of the study at a time [1]")
    parser.add_argument("--report_only", action="store_true", help="train nothing; report what there is")
    parser.add_argument("--against", metavar="REFERENCE", help="name or file of reference curves")
    parser.add_argument(
        "--glue_results",
        type=Path,
        metavar="FILE",
        help="results of glue_eval/run.py --run_dir, which join the report",
    )
    parser.add_argument("--write_reference", type=Path, metavar="FILE", help="keep the curves as a reference")


def _check_together(given: argparse.Namespace, options: dict[str, Any]) -> None:
    if bool(given.runs) == bool(given.config):
        raise UserError("give either --config STUDY.yaml or the folders of runs")
    if options and not given.config:
        raise UserError(f"{next(iter(options))}: only together with --config: finished runs are not changed")
    if given.against and not given.runs:
        raise UserError(f"against {given.against}: needs the folders of the runs to compare with it")
    if given.against and given.glue_results:
        raise UserError("glue_results: not together with against; give one")
    if given.against and given.write_reference:
        raise UserError("write_reference: not together with against; give one")
    for name in ("seeds", "report_only"):
        if getattr(given, name) and not given.config:
            raise UserError(f"{name}: only together with --config")
    if given.write_reference and given.write_reference.exists():
        read_reference(given.write_reference)  # nothing but a reference is replaced
    if given.parallel_runs < 1:
        raise UserError(f"parallel_runs {given.parallel_runs}: must be at least 1")


def compare(given: argparse.Namespace, options: dict[str, Any]) -> int:
    """Run the study if there is one, and report; returns the exit code."""
    failed = []
    if given.config:
        study = read_study(given.config, options, given.seeds, given.output_dir)
        check_runs(study)
        if not given.report_only:
            failed = run_study(study, given.parallel_runs)
        output_dir, curves = study.output_dir, read_study_curves(study)
    else:
        output_dir, curves = given.output_dir or Path("output/comparison"), read_runs(given.runs)
    tracks = (
        read_tracks(given.glue_results, [run.folder for run in curves.runs]) if given.glue_results else []
    )
    for file in write_report(curves, output_dir / "report", tracks):
        if file.suffix in (".html", ".md"):
            print(f"wrote {file}")
    if given.write_reference:
        source = f"--config {given.config}" if given.config else " ".join(map(str, given.runs))
        write_reference(curves, given.write_reference, f"python recipes/compare.py {source}")
        print(f"wrote {given.write_reference}")
    for line in failed:
        print(line, file=sys.stderr)
    return 1 if failed else 0


def compare_against(given: argparse.Namespace) -> None:
    """Say of each run whether it lies inside the band of a reference."""
    reference = read_reference(given.against)
    for folder in given.runs:
        verdict = compare_with_reference(reference, read_run(folder))
        print(*verdict.lines, sep="\n")
        print(f"wrote {draw_verdict(verdict, given.output_dir or folder / 'report')}")


if __name__ == "__main__":
    sys.exit(main())
