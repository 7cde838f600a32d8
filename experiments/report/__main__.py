"""Draw the figures and fill the documents' tables from logs alone.

Without RUN_DIRs, all of it again from the logs in experiments/results: experiments/figures, the table in
experiments/README.md and the lines in docs/findings.md. With RUN_DIRs, the tables of those runs of experiments.cifar10, and their
curves in one figure, curves.svg in the first of them.
"""

import sys
from pathlib import Path

from experiments.report.claims import fill
from experiments.report.figures import draw_runs, make_figures, save
from experiments.report.logs import Evidence, read_run
from experiments.report.table import format_table
from runlog.command import make_parser

ROOT = Path(__file__).resolve().parents[2]


def draw_all(evidence, folder=ROOT / "experiments" / "figures"):
    """Draw every figure that there are logs for into `folder`; return the paths."""
    return [save(figure, Path(folder) / f"{name}.svg") for name, figure in make_figures(evidence)]


def main(arguments=None):
    parser = make_parser("experiments.report", __doc__, "[RUN_DIR ...]")
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR", help="folder with a log.jsonl of a finished run")
    options = parser.parse_args(arguments)
    try:
        if options.runs:
            runs = list(map(read_run, options.runs))
            print("\n\n".join(map(format_table, runs)))
            print(f"figure: {save(draw_runs(runs), options.runs[0] / 'curves.svg')}")
            return
    except (OSError, ValueError) as error:
        sys.exit(str(error))
    evidence, documents = Evidence(), (ROOT / "experiments" / "README.md", ROOT / "docs" / "findings.md")
    for path in documents:
        path.write_text(fill(path.read_text(encoding="utf-8"), evidence), encoding="utf-8")
    print(*documents, *draw_all(evidence), sep="\n")


if __name__ == "__main__":
    main()
