"""The benchmark runs, and the figures in the documents are those of the committed logs."""

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from given import Given
from processes import become_one_of_torchrun, run_module, run_workers

import regtopk_torch as rt

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # benchmarks are not installed

from benchmarks import gpu, hosts, local_steps, network, plot, table  # noqa: E402
from runlog.document import replace, write_command  # noqa: E402
from runlog.record import read_logs  # noqa: E402

TABLED = ["buckets.jsonl", "inputs.jsonl", "dtypes.jsonl", "avx2.jsonl", "scalar.jsonl"]


def test_a_run_is_recorded_tabled_and_drawn(tmp_path):
    log = tmp_path / "ops.jsonl"
    status, printed, errors = run_module("benchmarks.ops", "--sizes", "5e3", "--densities", "0.01", "--seconds-per-case", "0", "--out", str(log))
    assert status == 0, errors
    assert "topk, 8 payloads" in printed
    lines = table.format_tables([log]).splitlines()
    assert len(lines) == 5  # names, rule, one case, a blank line, the origin
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[1:5] == ["float32", "5,000", "0.01", "normal"] and cells[-1] == "7" and all(float(cell) > 0 for cell in cells[5:])
    assert Path(plot.draw(log, tmp_path / "ops.png")).stat().st_size > 10_000


def test_every_form_on_the_wire_is_timed_against_payloads_as_they_are(tmp_path):
    log = tmp_path / "wire.jsonl"
    status, _, errors = run_module("benchmarks.ops", "--wire", "--sizes", "5e3", "--densities", "0.01", "--seconds-per-case", "0", "--out", str(log))
    assert status == 0, errors
    rows = [row for row in map(json.loads, log.read_text(encoding="utf-8").splitlines()) if row["event"] == "wire"]
    forms = {f"{values}, {code}" for values in ("float32", "bfloat16", "sign", "2bit") for code in ("offsets", "Elias-Fano")} - {"float32, offsets"}
    assert {row["candidate"] for row in rows} == forms | {"offsets"}
    assert all(row["to_offsets"]["median"] > 0 for row in rows)


def test_the_tables_in_the_documents_are_those_of_the_logs():
    operators, readme = ROOT / "benchmarks" / "README.md", ROOT / "README.md"
    made = table.format_tables([ROOT / "benchmarks/results/ops" / log for log in TABLED], operators.parent)
    usage, (methods, logs, begin_local) = ROOT / "docs" / "usage.md", hosts.TABLES["local-steps"]
    tables = [(readme, hosts.format_hosts(), hosts.BEGIN), (usage, hosts.format_hosts(logs, usage.parent, methods), begin_local)]
    for path, text, begin in ((operators, made, table.BEGIN), (operators, gpu.format_gpu(), gpu.BEGIN), *tables):
        document = path.read_text(encoding="utf-8")
        assert replace(document, text, begin) == document


def test_the_readmes_step_times_of_local_steps_are_those_of_the_log():
    taken = {}
    for _, records in read_logs(hosts.TABLES["local-steps"][1] / "100mbit.jsonl"):
        for record in records:
            taken.setdefault(record["method"], []).append(record["seconds"])
    ours, none, ddp = (f"{median(taken[method]):.2f} s" for method in ("ours", "none", "ddp"))
    sentence = f"Between 4 hosts with links of 100 Mbit/s a step of a GPT of 10 M parameters took {ours} so, {none} with nothing exchanged, and {ddp} under DDP"
    assert sentence in (ROOT / "README.md").read_text(encoding="utf-8")


def test_step_times_are_medians_of_their_logs_from_the_slowest_link_to_the_fastest(tmp_path):
    def add(link, seconds, commit="c0ffee", **options):
        options = {"density": 0.01, "batch_size": 4, **options}
        header = {"event": "header", "workers": 2, "options": options, "processor": {"model": "P", "cores": 2}, "versions": {"torch": "2"}, "commit": commit}
        lines = [header, *({"event": "step", "method": method, "seconds": value} for method, values in seconds.items() for value in values)]
        with open(tmp_path / f"{link}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    add("1gbit", {None: [1.0, 3.0, 2.0]}, method="dense"), add("500mbit", {"regtopk": [0.5, 0.5, 0.5], "dense": [4.0, 4.0, 9.0]})
    rows = hosts.format_hosts(tmp_path, tmp_path).splitlines()
    assert rows[0] == "| what is exchanged | 500 Mbit/s | 1 Gbit/s |"
    dense, regtopk = (hosts.METHODS[method] for method in ("dense", "regtopk"))
    assert rows[2:4] == [f"| {dense} | 4.00 s (4.00…9.00) | 2.00 s (1.00…3.00) |", f"| {regtopk} | 0.50 s (0.50…0.50) |  |"]
    assert "n = 3 steps of one run: density 0.01, 2 hosts with 4 images each, all on 2 cores of one P, gloo, torch 2, [logs](.) of commit c0ffee" in rows[5]
    add("1gbit", {"regtopk": [1.0, 1.0]}, commit="another")
    with pytest.raises(ValueError, match="expected logs of one commit, machine and setting, got "):
        hosts.format_hosts(tmp_path, tmp_path)
    (tmp_path / "1gbit.jsonl").rename(tmp_path / "fast.jsonl")
    with pytest.raises(ValueError, match="expected a log named after a rate, such as 100mbit or 1gbit, got 'fast'"):
        hosts.format_hosts(tmp_path, tmp_path)


def run_network(rank, folder):
    become_one_of_torchrun(rank, 2, folder)
    network.main(["--model", "small", "--rounds", "2", "--density", "0.01", "--out", str(folder / "1gbit.jsonl")])


def test_step_times_of_every_method_are_measured(tmp_path):
    run_workers(run_network, 2, tmp_path)
    head, _, *rows, _, below = hosts.format_hosts(tmp_path, tmp_path).splitlines()
    assert head == "| what is exchanged | 1 Gbit/s |" and "n = 2 steps" in below
    assert [row.strip("| ").split(" | ")[0] for row in rows] == list(hosts.METHODS.values()) and all(row.endswith(") |") for row in rows)


def run_local_steps(rank, folder):
    become_one_of_torchrun(rank, 2, folder)
    local_steps.main(["--size", "0.4M", "--rounds", "2", "--out", str(folder / "1gbit.jsonl")])


def test_rounds_of_local_steps_are_measured_for_every_method(tmp_path):
    run_workers(run_local_steps, 2, tmp_path)
    head, _, *rows, _, below = hosts.format_hosts(tmp_path, tmp_path, hosts.LOCAL_METHODS).splitlines()
    assert head == "| what is exchanged | 1 Gbit/s |" and "n = 2 rounds of 5 steps of one run: a GPT of 0.4M parameters, 2 hosts with 1 window" in below
    assert [row.strip("| ").split(" | ")[0] for row in rows] == list(hosts.LOCAL_METHODS.values()) and all(row.endswith(") |") for row in rows)


def average_by_hand(rank):
    """[(what a round by hand has applied, what this package does with the same)]"""
    module, ours, found = Given(40), rt.LocalExchange(2, 0.1, method="topk", decay=0.95, wire_dtype=torch.bfloat16), []
    by_hand, (weights,) = local_steps.ByHand(module, 0.1), module.parts
    for number in range(4):
        moved = [torch.randn(40, generator=torch.Generator().manual_seed(10 * number + each)) for each in range(2)]
        before = weights.detach().clone()
        with torch.no_grad():
            weights -= moved[rank]
        for _ in range(local_steps.EVERY):
            by_hand.step()
        found.append((before - weights.detach(), *ours.step([[each] for each in moved])))
    return found


def test_top_k_by_hand_averages_what_the_package_does():
    for found in run_workers(average_by_hand, 2):
        for by_hand, ours in found:
            torch.testing.assert_close(by_hand, ours, rtol=0, atol=1e-6)
            assert 4 <= by_hand.count_nonzero() <= 8


def test_a_document_without_the_marks_is_an_error(tmp_path, capsys):
    with pytest.raises(ValueError, match="expected the marks .* got a document without"):
        replace("no marks here", "text", table.BEGIN)
    for name in ("none.md", "empty.md"):
        (tmp_path / "empty.md").touch()
        with pytest.raises(SystemExit):
            write_command(argparse.ArgumentParser(), lambda options: "text", gpu.BEGIN, ["--write", str(tmp_path / name)])
        assert f"error: --write: expected a document with the marks '{gpu.BEGIN}'" in capsys.readouterr().err
