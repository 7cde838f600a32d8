"""Print the step times on hosts with slow links as a Markdown table, from the logs in results/hosts alone: python -m benchmarks.hosts

The logs of one link are in one file, LINK.jsonl, and make a column. Every cell is the median over the steps of one run, with quartiles.
`python -m benchmarks.network` makes such a log; `python -m benchmarks.local_steps` those in results/local_steps, of --of local-steps.
"""

import os
import re
import statistics
from pathlib import Path

from runlog.command import make_parser
from runlog.document import write_command
from runlog.record import read_logs

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- python -m benchmarks.hosts: begin -->"
BEGIN_LOCAL = "<!-- python -m benchmarks.hosts --of local-steps: begin -->"
METHODS = {  # in the order of the rows
    "none": "nothing", "dense": "all entries: DDP alone", "bf16": "bf16 hook", "powersgd": "PowerSGD hook", "chain": "Top-k in torch calls",
    "topk": "Top-k, this package", "regtopk": "RegTop-k, this package",
}  # fmt: skip

LOCAL_METHODS = {
    "none": "nothing", "ddp": "all entries of the gradients, each step: DDP alone", "dense": "all entries of what 5 steps did, in torch calls",
    "chain": "Top-k of it in torch calls, each tensor by itself, of equal bytes", "ours": "Top-k of it in two bits: `LocalSteps`",
}  # fmt: skip
# The methods, their logs and the marks of their table, and what a worker's batch and the log's settings are called.
TABLES = {
    "gradients": (METHODS, ROOT / "benchmarks" / "results" / "hosts", BEGIN),
    "local-steps": (LOCAL_METHODS, ROOT / "benchmarks" / "results" / "local_steps", BEGIN_LOCAL),
}


def bits_per_second(link):
    found = re.fullmatch(r"([\d.]+)([mg])bit", link)
    if found is None:
        raise ValueError(f"benchmarks.hosts: expected a log named after a rate, such as 100mbit or 1gbit, got {link!r}")
    return float(found[1]) * {"m": 1e6, "g": 1e9}[found[2]]


def format_seconds(seconds):
    low, middle, high = statistics.quantiles(seconds, n=4)
    return f"{middle:.2f} s ({low:.2f}…{high:.2f})"


def format_hosts(folder=TABLES["gradients"][1], relative_to=ROOT, methods=METHODS):
    """Return the table of all logs in `folder`, a method a row and the slowest link first, and below it how they were made."""
    links, made = {}, set()
    for path in sorted(Path(folder).glob("*.jsonl"), key=lambda path: bits_per_second(path.stem)):
        seconds = links.setdefault(path.stem, {})
        for header, records in read_logs(path):
            options, versions = header["options"], header["versions"]
            if "size" in options:
                ran = f"rounds of 5 steps of one run: a GPT of {options['size']} parameters", f"{options['batch_size']} window of random bytes"
            else:
                ran = f"steps of one run: density {options['density']:g}", f"{options['batch_size']} images"
            made.add((*ran, header["workers"], *header["processor"].values(), versions["torch"], header["commit"][:10]))
            for record in records:
                if record["event"] == "step":
                    seconds.setdefault(record.get("method") or options["method"], []).append(record["seconds"])
    if len(made) != 1:
        raise ValueError(f"benchmarks.hosts: expected logs of one commit, machine and setting, got {sorted(made)}")
    model, batch, workers, processor, cores, torch, commit = made.pop()
    rates = [re.sub(r"[mg]bit", lambda found: f" {found[0].capitalize()}/s", link) for link in links]
    lines = [f"| what is exchanged | {' | '.join(rates)} |", "|" + "---|" * (len(links) + 1)]
    for method, name in methods.items():
        if any(method in seconds for seconds in links.values()):
            cells = [format_seconds(seconds[method]) if method in seconds else "" for seconds in links.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    steps = {len(values) for seconds in links.values() for values in seconds.values()}
    n = "…".join(map(str, sorted({min(steps), max(steps)})))
    where = Path(os.path.relpath(folder, relative_to)).as_posix()
    return "\n".join([
        *lines, "", f"Median seconds per step (quartiles), n = {n} {model}, {workers} hosts with {batch} each, all on {cores} "
        f"cores of one {processor}, gloo, torch {torch}, [logs]({where}) of commit {commit}.",
    ])  # fmt: skip


def main():
    parser = make_parser("benchmarks.hosts", __doc__)
    parser.add_argument("--of", choices=TABLES, default="gradients", help="(%(default)s)")

    def make(options):
        methods, logs, _ = TABLES[options.of]
        return format_hosts(logs, ROOT if options.write is None else options.write.resolve().parent, methods)

    write_command(parser, make, lambda options: TABLES[options.of][2])


if __name__ == "__main__":
    main()
