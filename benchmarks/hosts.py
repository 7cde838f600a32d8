"""Print the step times on hosts with slow links as a Markdown table, from the logs in results/hosts alone: python -m benchmarks.hosts

The logs of one link are in one file, LINK.jsonl, and make a column. Every cell is the median over the steps of one run, with quartiles.
`python -m benchmarks.network` makes such a log.
"""

import re
import statistics
from pathlib import Path

from runlog.command import make_parser
from runlog.document import write_command
from runlog.record import read_logs

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "benchmarks" / "results" / "hosts"
BEGIN = "<!-- python -m benchmarks.hosts: begin -->"
METHODS = {  # in the order of the rows
    "none": "nothing", "dense": "all entries: DDP alone", "bf16": "bf16 hook", "powersgd": "PowerSGD hook", "chain": "Top-k in torch calls",
    "topk": "Top-k, this package", "regtopk": "RegTop-k, this package",
}  # fmt: skip


def bits_per_second(link):
    found = re.fullmatch(r"([\d.]+)([mg])bit", link)
    if found is None:
        raise ValueError(f"benchmarks.hosts: expected a log named after a rate, such as 100mbit or 1gbit, got {link!r}")
    return float(found[1]) * {"m": 1e6, "g": 1e9}[found[2]]


def format_seconds(seconds):
    low, middle, high = statistics.quantiles(seconds, n=4)
    return f"{middle:.2f} s ({low:.2f}…{high:.2f})"


def format_hosts(folder=LOGS, relative_to=ROOT):
    """Return the table of all logs in `folder`, a method a row and the slowest link first, and below it how they were made."""
    links, made = {}, set()
    for path in sorted(Path(folder).glob("*.jsonl"), key=lambda path: bits_per_second(path.stem)):
        seconds = links.setdefault(path.stem, {})
        for header, records in read_logs(path):
            options, versions = header["options"], header["versions"]
            made.add((header["workers"], options["batch_size"], f"{options['density']:g}", *header["processor"].values(), versions["torch"], header["commit"][:10]))
            for record in records:
                if record["event"] == "step":
                    seconds.setdefault(record.get("method") or options["method"], []).append(record["seconds"])
    if len(made) != 1:
        raise ValueError(f"benchmarks.hosts: expected logs of one commit, machine and setting, got {sorted(made)}")
    workers, batch, density, processor, cores, torch, commit = made.pop()
    rates = [re.sub(r"[mg]bit", lambda found: f" {found[0].capitalize()}/s", link) for link in links]
    lines = [f"| what is exchanged | {' | '.join(rates)} |", "|" + "---|" * (len(links) + 1)]
    for method, name in METHODS.items():
        if any(method in seconds for seconds in links.values()):
            cells = [format_seconds(seconds[method]) if method in seconds else "" for seconds in links.values()]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    steps = {len(values) for seconds in links.values() for values in seconds.values()}
    n = "…".join(map(str, sorted({min(steps), max(steps)})))
    where = Path(folder).relative_to(relative_to).as_posix()
    return "\n".join([
        *lines, "", f"Median seconds per step (quartiles), n = {n} steps of one run: density {density}, {workers} hosts with {batch} images each, all on {cores} "
        f"cores of one {processor}, gloo, torch {torch}, [logs]({where}) of commit {commit}.",
    ])  # fmt: skip


def main():
    def make(options):
        return format_hosts(relative_to=ROOT if options.write is None else options.write.resolve().parent)

    write_command(make_parser("benchmarks.hosts", __doc__, ""), make, BEGIN)


if __name__ == "__main__":
    main()
