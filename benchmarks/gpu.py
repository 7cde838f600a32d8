"""Print what make gpu-check found on a GPU as Markdown tables, from the logs in results/gpu alone: python -m benchmarks.gpu

A log is the gpu-check.jsonl of one commit, or several of them one after the other, and has the commit's name. Times are medians over the calls
of one run, by events, with buckets that take turns so that no cache helps; ratios are those of medians.
"""

import json
from pathlib import Path

from runlog.command import make_parser
from runlog.document import write_command

LOGS = Path(__file__).resolve().parent / "results" / "gpu"
BEGIN = "<!-- python -m benchmarks.gpu: begin -->"
KERNELS = ("sample", "accumulate", "finish", "check", "aggregate")


def read(folder):
    """Return [(commit, its lines)], the earliest first: in the order of the file COMMITS."""
    commits = (Path(folder) / "COMMITS").read_text(encoding="utf-8").split()
    return [(commit, [json.loads(line) for line in (Path(folder) / f"{commit}.jsonl").read_text(encoding="utf-8").splitlines()]) for commit in commits]


def last_with(logs, event):
    """The lines of that event of the last commit that has any."""
    found = [[line for line in lines if line["event"] == event] for _, lines in logs]
    return next((lines for lines in reversed(found) if lines), [])


def format_parts(logs):
    """A row per part and a column per commit: passed, or what failed."""
    names = list(dict.fromkeys(line["name"] for _, lines in logs for line in lines if line["event"] == "part"))
    rows = [f"| part | {' | '.join(commit for commit, _ in logs)} |", "|" + "---|" * (len(logs) + 1)]
    for name in names:
        cells = []
        for _, lines in logs:
            results = [line["result"] for line in lines if line["event"] == "part" and line["name"] == name]
            compared = sum(line["cases"] for line in lines if line["event"] == "compared" and line["part"] == name)
            cells.append("" if not results else results[0] + (f", {compared} cases" if compared else ""))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return rows


def format_times(logs):
    """Microseconds of compress and aggregate of 8 workers, and how many times the copy of equal bytes."""
    timed = [(commit, {(row["numel"], row["density"], row["dtype"]): row for row in lines if row["event"] == "times"}) for commit, lines in logs]
    timed = [(commit, found) for commit, found in timed if found]
    last = timed[-1][1]
    cases = sorted((case for case in last if case[2] == "float32" or case[1] == 1e-3), key=lambda case: (case[2] != "float32", case[1], case[0]))
    names = [f"{commit}: us (x copy)" for commit, _ in timed]
    rows = [f"| entries | density | dtype | {' | '.join(names)} | RegTop-k / Top-k | chain / Top-k |", "|" + "---|" * (len(names) + 5)]
    for case in cases:
        cells = [f"{case[0]:,}", f"{case[1]:g}", case[2]]
        for _, found in timed:
            row = found.get(case)
            cells.append("" if row is None else f"{1e6 * row['seconds']['topk']['median']:,.0f} ({row['to_copy']['topk']:.2f})")
        of = {name: last[case]["seconds"][name]["median"] for name in ("topk", "regtopk", "chain")}
        cells += [f"{of['regtopk'] / of['topk']:.2f}", f"{of['chain'] / of['topk']:.1f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def format_profile(logs):
    """Microseconds of each kernel of the last commit that was profiled, RegTop-k of two workers, and its share of the memory's rate."""
    rows = last_with(logs, "profiled")
    table = [f"| entries | {' | '.join(KERNELS)} |", "|" + "---|" * (1 + len(KERNELS))]
    for numel in sorted({row["numel"] for row in rows}):
        of = {row["kernel"]: row for row in rows if row["numel"] == numel}
        table.append(f"| {numel:,} | " + " | ".join(f"{of[name]['us']:.1f} ({100 * of[name]['dram']:.0f} %)" for name in KERNELS) + " |")
    return table


def format_targets(logs):
    """What was asked for, and what the last commit that was timed has found."""
    table = ["| entries | asked for | found | |", "|---|---|---|---|"]
    for line in sorted((line for line in last_with(logs, "times") if line["targets"]), key=lambda line: line["numel"]):
        for name, target in line["targets"].items():
            bound = "at least" if name == "x faster than the chain" else "at most"
            table.append(f"| {line['numel']:,} | {bound} {target['target']:g} {name} | {target['value']:.2f} | {'met' if target['met'] else '**missed**'} |")
    for line in last_with(logs, "share"):
        if line["target"] is None:
            table.append(f"| ResNet-50 | {line['method']}, for comparison | {100 * line['share']:.1f} | |")
            continue
        table.append(f"| ResNet-50 | {line['method']} at most {100 * line['target']:g} % of a step | {100 * line['share']:.1f} | {'met' if line['share'] <= line['target'] else '**missed**'} |")
    return table


def format_rest(logs):
    """The rate of 8 workers in one process, what they learned, and the memory that the operators need: each of the last commit that has it."""
    found = [
        f"* {line['workers']} workers of {line['network']} in one process, {line['method']}: {line['steps_per_second']:.1f} steps a second"
        for line in last_with(logs, "workers")
    ]  # fmt: skip
    found += [
        f"* Fig. 3, {line['method']}, seed 0: {line['accuracy']:.1f} % after {line['step']:,} steps" + (f", on a CPU {line['on a CPU']:.1f} %" if "on a CPU" in line else "")
        for line in last_with(logs, "learned")
    ]  # fmt: skip
    found += [
        f"* {line['numel']:,} entries, density {line['density']:g}: the workspace is {100 * line['of the residual']:.1f} % of the residual"
        for line in last_with(logs, "memory")
    ]  # fmt: skip
    return found


def format_gpu(folder=LOGS):
    logs = read(folder)
    cards = {(line["card"], line["torch"], line["cuda"]) for _, lines in logs for line in lines if line["card"] != "none"}
    made = "; ".join(f"{card}, torch {torch}, CUDA {cuda}" for card, torch, cuda in sorted(cards))
    return "\n".join([*format_parts(logs), "", *format_times(logs), "", *format_profile(logs), "", *format_targets(logs), "", *format_rest(logs), "", f"{made}; [logs](results/gpu) by commit, one run each."])


def main():
    write_command(make_parser("benchmarks.gpu", __doc__, ""), lambda options: format_gpu(), BEGIN)


if __name__ == "__main__":
    main()
