"""What a person reads of gpu-check.jsonl: python -m tests.gpu_check.summary FILE"""

import json
import sys


def microseconds(value):
    return f"{1e6 * value:,.1f}" if value < 1e-3 else f"{1e6 * value:,.0f}"


def times_table(lines):
    rows = [line for line in lines if line["event"] == "times"]
    if not rows:
        return []
    text = ["", "us, medians; x: against the copy of equal bytes"]
    text.append(f"{'entries':>13} {'density':>8} {'dtype':>9} {'Top-k':>9} {'x':>5} {'RegTop-k':>9} {'copy':>9} {'floor':>9} {'topk()':>9} {'chain':>9}  n")
    for row in rows:
        of = {name: value["median"] for name, value in row["seconds"].items()}
        cells = [microseconds(of[name]) if name in of else "-" for name in ("topk", "regtopk", "copy", "floor", "torch.topk", "chain")]
        cells.insert(1, f"{row['to_copy']['topk']:.2f}")
        text.append(
            f"{row['numel']:>13,} {row['density']:>8g} {row['dtype']:>9} {cells[0]:>9} {cells[1]:>5} "
            + " ".join(f"{cell:>9}" for cell in cells[2:]) + f" {row['seconds']['topk']['n']:>2}"
        )  # fmt: skip
    targets = [(row, name, target) for row in rows for name, target in row["targets"].items()]
    if targets:
        text += ["", "targets"]
    for row, name, target in targets:
        verdict = "met" if target["met"] else "MISSED"
        text.append(f"  {row['numel']:>13,} {name}: {target['value']:.2f}, asked for {target['target']:g}: {verdict}")
    return text


def of(path):
    """(text, whether anything failed). A missed target is no failure: it is a result."""
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]
    facts = lines[0] if lines else {}
    text = ["", f"gpu-check: {facts.get('card')}, torch {facts.get('torch')}, CUDA {facts.get('cuda')}, commit {facts.get('commit')}, sources {facts.get('sources')}"]
    parts = [line for line in lines if line["event"] == "part"]
    for part in parts:
        reasons = [part.get("reason", "")] + [line["reason"] for line in lines if line["event"] == "not run" and line["part"] == part["name"]]
        text.append(f"  {part['name']:<11} {part['result']:<8} {part['seconds']:>6.1f} s  {'; '.join(reason for reason in reasons if reason)}".rstrip())
        for line in lines:
            if line["part"] != part["name"]:
                continue
            if line["event"] == "failure":
                text.append(f"    - {line['what'][:300]}")
            if line["event"] in ("left out", "note", "compared", "pytest", "repeated", "replayed", "sanitized", "memory", "variants", "built", "trained", "lost", "share", "workers", "profiled", "in the hook", "hook", "learned"):
                values = {key: value for key, value in line.items() if key not in ("event", "part", "card", "torch", "cuda", "commit", "sources")}
                text.append(f"    {line['event']}: " + ", ".join(f"{key} {shown(value)}" for key, value in values.items()))
    text += times_table(lines)
    failed = [part["name"] for part in parts if part["result"] == "failed"]
    text += ["", f"failed: {', '.join(failed)}" if failed else "no part failed"]
    return "\n".join(text), bool(failed)


def shown(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(each)}" for key, each in value.items()) + "}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print(of(sys.argv[1])[0])
