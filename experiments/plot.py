"""Draw figures from logs alone: python -m experiments.plot [RUN_DIR ...].

Without RUN_DIR every figure is drawn again from the logs in experiments/results into experiments/figures, as SVG and as
PNG; the same logs give the same files. With RUN_DIRs, the curves of those runs of the ResNet-18 job.
"""

import argparse
import sys
from pathlib import Path

from experiments import plot_cifar10, plot_regression
from experiments.evidence import RESULTS
from experiments.plot_curves import draw

FIGURES = Path(__file__).resolve().parent / "figures"


def draw_all(results=RESULTS, folder=FIGURES, suffixes=(".svg", ".png")):
    """Draw every figure whose logs there are into `folder`, once per suffix; return the paths."""
    return [path for subject in (plot_regression, plot_cifar10) for path in subject.draw_all(results, Path(folder), suffixes)]


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m experiments.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR", help="folder with a log.jsonl; several: one figure")
    parser.add_argument("--output", type=Path, help="image to write (curves.png in the first RUN_DIR; needed for several)")
    options = parser.parse_args(arguments)
    if options.output is None and len(options.runs) > 1:
        parser.error(f"--output: expected a path for a figure of several runs, got none for {len(options.runs)} runs")
    if options.output is not None and not options.runs:
        parser.error(f"--output: expected RUN_DIRs with it, got none; without them figures go into {FIGURES.name}/")
    try:
        paths = [draw(options.runs, options.output or options.runs[0] / "curves.png")] if options.runs else draw_all()
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    for path in paths:
        print(path)


if __name__ == "__main__":
    main()
