"""Write what the committed logs show, one row per claim: python -m experiments.claims [--write README.md] [--summary README.md].

What has no finished runs says so. Every number comes from the logs in experiments/results.
"""

import argparse
from pathlib import Path

from experiments import claims_cifar10, claims_regression
from experiments.claim import read_evidence
from experiments.claims_summary import format_summary

NOT_RUN = "not run yet"
COLUMNS = ("claim", "command", "expected", "found", "n", "test", "log", "figure")
BEGIN = "<!-- python -m experiments.claims: begin -->"

def all_claims():
    return [*claims_regression.CLAIMS, *claims_cifar10.CLAIMS]


def format_row(claim, finding):
    first = f'<a id="{claim.name}"></a>{claim.claim}'
    if finding is None:
        return [first, claim.command, claim.expected, NOT_RUN, "0", NOT_RUN, "", ""]
    logs = ", ".join(f"[{Path(log).stem if log.endswith('.jsonl') else Path(log).name}](results/{log})" for log in finding.logs)
    return [first, claim.command, claim.expected, finding.found, str(finding.n), finding.test, logs, f"[figure](figures/{claim.figure}.png)"]


def format_table(evidence, claims=None):
    """Return the Markdown table of `claims`, all of them unless given."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for claim in claims or all_claims():
        lines.append("| " + " | ".join(format_row(claim, claim.find(evidence))) + " |")
    return "\n".join(lines)


def write(document, text):
    from benchmarks.table import replace

    document.write_text(replace(document.read_text(encoding="utf-8"), text, BEGIN), encoding="utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m experiments.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="put the table between the document's marks instead of printing")
    parser.add_argument("--summary", type=Path, metavar="DOCUMENT", help="put the short answer between the document's marks")
    options = parser.parse_args(arguments)
    evidence = read_evidence()
    if options.write:
        write(options.write, format_table(evidence))
    if options.summary:
        write(options.summary, format_summary(evidence))
    if not (options.write or options.summary):
        print(format_summary(evidence), format_table(evidence), sep="\n\n")


if __name__ == "__main__":
    main()
