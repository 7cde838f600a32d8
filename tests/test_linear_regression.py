"""The paper's linear regression: its problem, the genie, what each method reaches, and sweeps that are cut off."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from processes import run_module

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # experiments is not installed

from experiments import linear_regression, sweeps  # noqa: E402
from runlog.record import read_log  # noqa: E402

SMALL = {"workers": 4, "steps": 40}


def make_run(method, density=0.6, mu=4.0, distortion="previous", seed=0):
    return sweeps.list_runs([method], [density], [mu], [distortion], [seed])[0]


def test_a_homogeneous_problem_has_one_model_and_a_heterogeneous_one_many():
    for homogeneous in (True, False):
        problem = linear_regression.make_problem(3, seed=1, homogeneous=homogeneous)
        own = torch.linalg.solve(problem.curvature, problem.offset)  # each worker's own minimiser
        apart = (own - problem.minimiser).abs().max().item()
        assert (apart < 0.2) if homogeneous else (apart > 0.5), apart  # the labels' noise alone moves a minimiser by about 0.03
        assert torch.allclose(problem.curvature.mean(0) @ problem.minimiser, problem.offset.mean(0))


def test_top_k_and_the_genie_at_density_1_equal_dense():
    dense = linear_regression.train(make_run("dense"), **SMALL)["curve"]
    assert linear_regression.train(make_run("topk", 1.0), **SMALL)["curve"] == dense
    assert linear_regression.train(make_run("genie", 1.0), **SMALL)["curve"] == dense


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("method", linear_regression.METHODS)
def test_a_run_repeats_itself(method, dtype):
    run = make_run(method)
    assert linear_regression.train(run, **SMALL, dtype=dtype) == linear_regression.train(run, **SMALL, dtype=dtype)


def test_the_genie_sends_what_is_largest_in_the_mean_of_all_workers():
    workers, steps, kept = 4, 40, 30
    problem = linear_regression.make_problem(workers, seed=0)
    weights, residual = torch.zeros(100, dtype=torch.float64), torch.zeros(workers, 100, dtype=torch.float64)
    for _ in range(steps):
        accumulated = residual + problem.curvature @ weights - problem.offset
        chosen = accumulated.mean(0).abs().topk(kept).indices
        sent = torch.zeros_like(accumulated)
        sent[:, chosen] = accumulated[:, chosen]
        residual = accumulated - sent
        weights = weights - linear_regression.LEARNING_RATE * sent.mean(0)
    gap = torch.log10(((weights - problem.minimiser) ** 2).sum()).item()
    found = linear_regression.train(make_run("genie", kept / 100), workers=workers, steps=steps)["log10_gap"]
    assert found == pytest.approx(gap, abs=1e-4)  # the rows are rounded to 4 digits


def test_at_density_0_6_regtop_k_goes_on_where_top_k_and_the_printed_form_stop():
    workers, steps = 8, 400  # of the paper's 20 and 2500
    gaps = {
        distortion: linear_regression.train(make_run("regtopk", distortion=distortion), workers=workers, steps=steps)
        for distortion in ("previous", "current")
    }
    topk = linear_regression.train(make_run("topk"), workers=workers, steps=steps)
    assert gaps["previous"]["log10_gap"] < -4 and gaps["previous"]["displaced"] > 0
    assert gaps["current"]["log10_gap"] > -3.5 and topk["log10_gap"] > -3.5
    assert topk["displaced"] == 0


def test_where_one_worker_after_the_other_chooses_for_all_top_k_goes_on_at_a_density_of_0_05():
    workers, steps = 8, 400  # of the paper's 20 and 2500
    led, own = (linear_regression.train(make_run("topk", 0.05), workers=workers, steps=steps, support=support) for support in ("leader", "own"))
    assert led["log10_gap"] < -4 and own["log10_gap"] > -1


def command(*options):
    status, printed, errors = run_module("experiments.linear_regression", *options)
    assert status == 0, errors
    return printed.splitlines()


def test_the_command_ends_with_the_gap():
    lines = command("--method", "topk", "--density", "0.5", "--seed", "3", "--workers", "4", "--steps", "40")
    gap = linear_regression.train(make_run("topk", 0.5, seed=3), **SMALL)["log10_gap"]
    assert lines == [f"topk density=0.5 seed=3 log10_gap={gap}", f"log10_gap={gap}"]


def test_a_sweep_runs_each_combination_once():
    runs = sweeps.list_runs(["dense", "topk", "regtopk"], [0.1, 0.2], [1.0, 2.0], ["previous", "current"], [7, 8])
    described = [sweeps.describe(run) for run in runs]
    assert len(set(described)) == len(runs) == 2 * (1 + 2 + 2 * 2 * 2)
    assert described[:3] == ["dense seed=7", "topk density=0.1 seed=7", "topk density=0.2 seed=7"]


def read_sweep(path):
    header, records = read_log(path)
    return header, [line for line in records if line["event"] == "run"]


def write_sweep(path, monkeypatch, computed):
    """Run a short sweep through the command; append each run that is computed, not read, to `computed`."""
    train = linear_regression.train

    def counted(run, **settings):
        computed.append(sweeps.describe(run))
        return train(run, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(linear_regression, "train", counted)
        options = ["--method", "dense", "topk", "regtopk", "--seed", "0", "1", "--workers", "2", "--steps", "3", "--out", str(path)]
        linear_regression.main([*options, "--threads", str(torch.get_num_threads())])


def test_a_sweep_that_is_cut_off_at_any_byte_goes_on_to_the_same_rows(tmp_path, monkeypatch):
    path, computed = tmp_path / "sweep.jsonl", []
    write_sweep(path, monkeypatch, computed)
    content, everything = path.read_bytes(), list(computed)
    assert len(everything) == 6
    _, rows = read_sweep(path)
    ends = [match.end() for match in re.finditer(b"\n", content)]
    for cut in sorted({0, 1, *ends, *(end - 1 for end in ends), *(end + 10 for end in ends[:-1])}):
        path.write_bytes(content[:cut])
        computed.clear()
        write_sweep(path, monkeypatch, computed)
        whole = max(0, sum(end <= cut for end in ends) - 1)  # rows that were complete; the first line is the header
        assert computed == everything[whole:], cut
        header, again = read_sweep(path)
        assert again == rows and header["settings"]["steps"] == 3


def test_a_complete_sweep_is_not_touched_and_a_wider_one_adds_to_it(tmp_path, monkeypatch):
    path, computed = tmp_path / "sweep.jsonl", []
    write_sweep(path, monkeypatch, computed)
    content = path.read_bytes()
    write_sweep(path, monkeypatch, computed)
    assert path.read_bytes() == content and len(computed) == 6
    lines = command("--method", "topk", "--seed", "0", "2", "--workers", "2", "--steps", "3", "--out", str(path))
    assert len(lines) == 3
    assert path.read_bytes().startswith(content)
    added = [json.loads(line) for line in path.read_bytes()[len(content) :].splitlines()]
    assert [line["event"] for line in added] == ["resume", "run"] and added[1]["seed"] == 2


def test_a_log_of_other_settings_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "sweep.jsonl"
    write_sweep(path, monkeypatch, [])
    with pytest.raises(SystemExit, match="sweep: expected steps 3, as in the log .*sweep.jsonl, got 4; name another log"):
        linear_regression.main(["--workers", "2", "--steps", "4", "--out", str(path), "--threads", str(torch.get_num_threads())])
    with pytest.raises(SystemExit, match="sweep: expected support own, as in the log .*sweep.jsonl, got leader; name another log"):
        options = ["--workers", "2", "--steps", "3", "--support", "leader", "--out", str(path)]
        linear_regression.main([*options, "--threads", str(torch.get_num_threads())])
