"""Sum up a gallery: every placement and every norm at its best learning rate, without warm-up, and its cost.

recipes/compare.py runs the study; this command reads its folder, and measures speed and memory, for which the
machine should do nothing else (three rounds of 21 methods take twenty minutes on 2 CPU cores):

    python recipes/compare.py --config recipes/configs/gallery.yaml --parallel_runs 2
    python recipes/gallery.py output/gallery

Once more, with the speed and memory that were measured before:

    python recipes/gallery.py output/gallery --repeats 0

It writes gallery.json (all values), gallery.md (tables) and gallery.png into STUDY/report, or into
--output_dir. The study's file, --config, says which runs there should be; those that are missing are named.
Exit codes: 0 done, 2 a mistake in options or folders, 130 interrupted.
"""

import argparse
import sys
from pathlib import Path

from recipes.command_line import Parser, refuse_unknown
from recipes.errors import UserError
from recipes.gallery_costs import measure_all
from recipes.gallery_report import kept_costs, summarise, write_gallery
from recipes.study import read_study
from recipes.study_results import read_study_curves

CONFIG = Path(__file__).parent / "configs" / "gallery.yaml"


def main() -> int:
    """Parse, call, done."""
    try:
        given = parse_command_line()
        folder = given.output_dir or given.study / "report"
        curves = read_study_curves(read_study(given.config, {}, output_dir=given.study))
        costs = measure_all(curves, given.repeats) if given.repeats else kept_costs(folder)
        for file in write_gallery(summarise(curves) | {"costs": costs}, folder):
            print(f"wrote {file}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def parse_command_line(argv: list[str] | None = None) -> argparse.Namespace:
    """The folder of the study, and what to do with it.

    Raises:
        UserError: A word that is no option, or a value that is not allowed.
    """
    parser = Parser(
        prog="recipes/gallery.py",
        usage="%(prog)s STUDY [--name value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("study", type=Path, metavar="STUDY", help="output_dir of the study")
    parser.add_argument("--config", type=Path, default=CONFIG, help="YAML file of the study [gallery.yaml]")
    parser.add_argument(
        "--repeats", type=int, default=3, help="rounds of measuring; 0: keep what is there [3]"
    )
    parser.add_argument("--output_dir", type=Path, help="of the report [STUDY/report]")
    given, unknown = parser.parse_known_args(argv)
    refuse_unknown(unknown, ["config", "repeats", "output_dir"])
    if given.repeats < 0:
        raise UserError(f"repeats {given.repeats}: must be at least 0")
    if not (given.study / "runs").is_dir():
        raise UserError(f"study {given.study}: holds no runs; give the output_dir of a study")
    return given


if __name__ == "__main__":
    sys.exit(main())
