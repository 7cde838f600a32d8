"""Print logs of benchmarks.ops as Markdown tables, from the logs alone: python -m benchmarks.table FILE.jsonl ... [--write README.md]

Every figure is the median over the rounds of one run of a ratio taken within each round.
"""

import os
from pathlib import Path

from runlog.command import make_parser
from runlog.document import write_command
from runlog.record import read_log

BEGIN = "<!-- python -m benchmarks.table: begin -->"
COLUMNS = ("variant", "dtype", "entries", "density", "input", "Top-k", "RegTop-k", "8 payloads", "chain / Top-k", "chain / RegTop-k", "n")


def format_rows(records):
    """Return the table's lines for the records of one log, one per case in the log's order."""
    cases = {}
    for row in records:
        key = (row["variant"] if row["device"] == "cpu" else row["device"], row["dtype"], row["size"], row["density"], row["input"])
        cases.setdefault(key, {})[row["candidate"]] = row
    lines = []
    for (variant, dtype, size, density, name), rows in cases.items():
        to_floor = [f"{rows[candidate]['to_floor']['median']:.2f}" for candidate in ("topk", "regtopk", "topk, 8 payloads")]
        chain = [f"{rows[candidate]['chain_to']['median']:.1f}" for candidate in ("topk", "regtopk")]
        cells = [variant, dtype, f"{size:,}", f"{density:g}", name, *to_floor, *chain, str(rows["topk"]["seconds"]["n"])]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def format_tables(logs, relative_to="."):
    """Return the Markdown text for `logs`: one table, and below it how each log was made, with links from a folder."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    origins = []
    for log in logs:
        header, records = read_log(log)
        lines += format_rows(records)
        commit = (header["commit"] or "no commit")[:10] + (" with changes" if header["dirty"] else "")
        origins.append(
            f"[{Path(log).name}]({Path(os.path.relpath(log, relative_to)).as_posix()}): torch {header['torch']}, {header['threads']} threads, "
            f"{header['processor']['model']}, commit {commit}"
        )
    return "\n".join([*lines, "", *(f"{origin}  " for origin in origins)]).rstrip()


def main():
    parser = make_parser("benchmarks.table", __doc__, "FILE.jsonl ...")
    parser.add_argument("logs", nargs="+", metavar="FILE.jsonl", help="logs, in the order of the table's rows")
    write_command(parser, lambda options: format_tables(options.logs, options.write.parent if options.write else "."), BEGIN)


if __name__ == "__main__":
    main()
