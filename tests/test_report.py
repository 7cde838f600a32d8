"""What is said of the experiments is what the committed logs show: the table, the short answer, the figures, the commands."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # experiments is not installed

from benchmarks.table import replace  # noqa: E402
from experiments import (  # noqa: E402
    cifar10_workers,
    claim,
    claims,
    claims_cifar10,
    claims_summary,
    collect,
    data,
    evidence,
    figure_style,
    paired_test,
    plot,
    plot_regression,
    record,
)
from torchvision_here import TORCHVISION_PROBLEM  # noqa: E402

DOCUMENT = ROOT / "experiments" / "README.md"
COMMANDS = sorted(set(re.findall(r"`(python -m experiments\.(?:toy_logistic|linear_regression|cifar10_workers) [^`]+)`", DOCUMENT.read_text(encoding="utf-8"))))
ON_A_GPU = [command for command in COMMANDS if "--device cuda" in command]


# Documents and figures against the committed logs


@pytest.mark.parametrize("document, make", [("experiments/README.md", claims.format_table), ("README.md", claims_summary.format_summary)])
def test_a_document_says_what_the_committed_logs_show(document, make):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert replace(text, make(claim.read_evidence()), claims.BEGIN) == text


def test_the_short_answer_has_at_most_ten_lines_and_links_to_rows():
    lines = claims_summary.format_summary(claim.read_evidence()).splitlines()
    assert 0 < len(lines) <= 10
    rows = {row.name for row in claims.all_claims()}
    for line in lines:
        linked = re.findall(r"\(experiments/README\.md#([^)]+)\)", line)
        assert linked and set(linked) <= rows, line


def test_every_row_links_to_logs_and_figures_that_exist():
    for row in claims.all_claims():
        cells = claims.format_row(row, row.find(claim.read_evidence()))
        for target in re.findall(r"\]\(([^)#]+)\)", " ".join(cells)):
            assert (ROOT / "experiments" / target).exists(), (row.name, target)
    assert len({row.name for row in claims.all_claims()}) == len(claims.all_claims())


def test_every_figure_is_drawn_again_from_the_committed_logs(tmp_path):
    drawn = {path.stem: path for path in plot.draw_all(folder=tmp_path, suffixes=(".svg",))}
    committed = {path.stem: path for path in (ROOT / "experiments" / "figures").glob("*.svg")}
    assert drawn.keys() == committed.keys() == {path.stem for path in (ROOT / "experiments" / "figures").glob("*.png")}
    import matplotlib

    for name, path in drawn.items():
        text = path.read_text(encoding="utf-8")
        assert "</svg>" in text and "<dc:date>" not in text
        if f"matplotlib=={matplotlib.__version__}\n" in (ROOT / "requirements.txt").read_text():  # another version draws otherwise
            assert text == committed[name].read_text(encoding="utf-8"), f"expected the figure {name} of the committed logs; run python -m experiments.plot"


# Commands


def arguments_of(command):
    """Return (module, arguments) of `python -m MODULE ARGUMENTS`."""
    words = shlex.split(command)
    return importlib.import_module(words[2]), words[3:]


def test_the_document_has_the_commands_of_its_rows_and_of_the_runs_on_a_gpu():
    assert len(ON_A_GPU) == 7 and len(COMMANDS) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_document_parses(command):
    module, arguments = arguments_of(command)
    options = module.parse(arguments)
    assert options.steps >= 1
    if "cifar10_workers" not in command:
        assert options.out.parts[0] == "runs"  # where collect looks


@pytest.mark.parametrize("command", [command for command in COMMANDS if "cifar10_workers" not in command])
def test_a_command_without_a_network_runs_for_a_few_steps(command, tmp_path, capsys):
    module, arguments = arguments_of(command)
    short = ["--steps", "3"] + (["--workers", "2", "--seed", "0", "--threads", str(torch.get_num_threads())] if "linear" in command else [])
    if "linear" not in command:
        short = ["--steps", "50"]
    module.main([*arguments, *short, "--out", str(tmp_path / "log.jsonl")])
    assert re.fullmatch(r"(log10_gap|final_loss)=\S+", capsys.readouterr().out.splitlines()[-1])


def options_of(command):
    module, arguments = arguments_of(command)
    return module.parse(arguments)


@pytest.mark.parametrize("command", ON_A_GPU)
def test_a_command_for_a_gpu_takes_a_step_on_the_cpu(command, tmp_path, monkeypatch):
    options = options_of(command)
    # Each network once, with the first of its commands; the others' options are tested with the small network.
    first = next(other for other in ON_A_GPU if options_of(other).model == options.model and options_of(other).local_steps == 1)
    model = options.model if command == first else "tiny"
    if model != "tiny" and TORCHVISION_PROBLEM:
        pytest.skip(TORCHVISION_PROBLEM)
    digits = data.load_digits()
    digits.test_images, digits.test_labels = digits.test_images[:4], digits.test_labels[:4]
    monkeypatch.setattr(cifar10_workers, "load_dataset", lambda options: digits)
    monkeypatch.setattr(cifar10_workers.Run, "_save", lambda self: None)  # more than 100 MB
    short = ["--device", "cpu", "--model", model, "--steps", "1", "--local-steps", str(min(2, options.local_steps)), "--workers", "2"]
    short += ["--batch-size", "2", "--data", "digits", "--threads", str(torch.get_num_threads()), "--folder", str(tmp_path)]
    cifar10_workers.main([*arguments_of(command)[1], *short])
    run = evidence.read_run(tmp_path)
    assert run.result["step"] == 1 and run.options["partition"] == options.partition


# Claims from logs that are made up


def write_run(folder, method, seed, accuracy, *, finished=True, density=0.001, mu=5.0, steps=100, dirty=False, displaced=5, dataset="CIFAR-10"):
    """Write the log of a run whose accuracy rises in a line to `accuracy`."""
    options = {"method": method, "density": density, "mu": mu, "distortion": "previous", "model": "tiny", "workers": 8, "batch_size": 20,
               "learning_rate": 0.01, "partition": "iid", "concentration": 0.1, "local_steps": 1, "steps": steps}  # fmt: skip
    path = folder / f"{method}-d{density:g}-mu{mu:g}-s{seed}" / record.LOG_NAME
    path.parent.mkdir(parents=True)
    with record.Recorder(path, seed=seed, data=dataset, options=options) as recorder:
        for step in (0, steps // 2, steps):
            numbers = {"bytes_sent": 61.0 * step, "bytes_dense": 4000.0 * step, "sent_entries": 10.0 * step, "repeated": step, "displaced": 0.0}
            recorder.write("test", step=step, accuracy=0.1 + (accuracy - 0.1) * step / steps, images=10, **numbers)
        if finished:
            statistics = {"entries": 1000, "sent_entries": 100, "repeated": 10, "displaced": displaced, "bytes_sent": 61, "bytes_dense": 4000}
            recorder.write("result", step=steps, accuracy=accuracy, training_loss=2 - accuracy, test_images=10, statistics=statistics)
    lines = path.read_text().splitlines()
    header = {**json.loads(lines[0]), "commit": "0" * 40, "dirty": dirty}
    path.write_text("\n".join([json.dumps(header), *lines[1:]]) + "\n")


def collected(tmp_path):
    copied, left = collect.collect(tmp_path / "runs", tmp_path / "results")
    return copied, left, claim.read_evidence(tmp_path / "results")


def row_of(name, found):
    (row,) = [row for row in claims.format_table(found).splitlines() if f'id="{name}"' in row]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_claims_without_logs_say_not_run_yet(tmp_path):
    found = claim.read_evidence(tmp_path)
    for row in claims.format_table(found).splitlines()[2:]:
        assert row.endswith(f"| {claims.NOT_RUN} | 0 | {claims.NOT_RUN} |  |  |")
    assert claims.NOT_RUN in claims_summary.format_summary(found)
    assert plot.draw_all(tmp_path, tmp_path / "figures") == []


def test_a_comparison_is_of_finished_runs_of_both_methods_at_the_same_seeds(tmp_path):
    folder = tmp_path / "runs" / "cifar10" / "density-0.001"
    for seed, finished in ((0, True), (1, True), (2, False)):
        write_run(folder, "topk", seed, 0.5 + seed / 100, finished=finished)
    write_run(folder, "regtopk", 2, 0.9)  # its partner has not finished
    _, left, found = collected(tmp_path)
    assert [line.split(": ")[1] for line in left] == ["not finished"]
    assert row_of("density-0.001", found)[3] == claims.NOT_RUN
    write_run(folder, "regtopk", 1, 0.52)
    found = collected(tmp_path)[2]
    assert row_of("density-0.001", found)[3:6] == ["after 100 steps RegTop-k 52.00 %, Top-k 51.00 %", "1", "none with one seed; difference 1.00 points"]
    assert "one seed, so no test" in claims_summary.format_summary(found)
    write_run(folder, "regtopk", 0, 0.51)
    cells = row_of("density-0.001", collected(tmp_path)[2])
    assert cells[4] == "2" and "every difference is 1.00 points" in cells[5]


def test_the_paper_s_gain_is_held_against_the_interval(tmp_path):
    folder = tmp_path / "runs" / "cifar10" / "density-0.001"
    for seed, (topk, regtopk) in enumerate(((0.50, 0.501), (0.52, 0.519), (0.51, 0.511))):
        write_run(folder, "topk", seed, topk)
        write_run(folder, "regtopk", seed, regtopk)
    found = collected(tmp_path)[2]
    cells = row_of("density-0.001", found)
    assert cells[3] == "after 100 steps RegTop-k 51.03 ± 0.90 %, Top-k 51.00 ± 1.00 %" and cells[4] == "3"
    assert cells[5].endswith("8 points lie outside the interval")
    assert "no difference shown; the paper's gain of more than 8 points is outside the interval" in claims_summary.format_summary(found)
    figures = plot.draw_all(tmp_path / "results", tmp_path / "figures")
    assert [path.name for path in figures] == ["cifar10_density-0.001.svg", "cifar10_density-0.001.png"]


def test_densities_are_compared_one_by_one_and_p_is_corrected_for_their_number(tmp_path):
    folder = tmp_path / "runs" / "cifar10" / "tiny-density"
    for seed in range(3):
        for density in (0.1, 0.3):
            write_run(folder, "topk", seed, 0.5 + 0.01 * seed, density=density)
            write_run(folder, "regtopk", seed, 0.5 + 0.012 * seed + density / 10, density=density, displaced=20)
    cells = row_of("tiny-density", collected(tmp_path)[2])
    assert "0.1: 1.20 (displaced 20.0 %); 0.3: 3.20 (displaced 20.0 %)" in cells[3]
    smallest, corrected = map(float, re.fullmatch(r"2 paired t-tests: smallest p (\S+), corrected for their number (\S+)", cells[5]).groups())
    assert corrected == pytest.approx(2 * smallest, rel=0.05)


def test_where_labels_are_unevenly_shared_out_the_training_loss_is_stated_too(tmp_path):
    folder = tmp_path / "runs" / "cifar10" / "partition-labels"
    for method, accuracy in (("topk", 0.30), ("regtopk", 0.31), ("dense", 0.40)):
        write_run(folder, method, 0, accuracy)
    found = row_of("partition-labels", collected(tmp_path)[2])[3]
    assert found == "after 100 steps RegTop-k 31.00 %, Top-k 30.00 %, dense 40.00 %; training loss RegTop-k 1.69, Top-k 1.70, dense 1.60"


def test_densities_in_groups_of_their_own_are_compared_where_the_shortest_run_ended(tmp_path):
    folder = tmp_path / "runs" / "cifar10"
    for seed in range(2):  # at step 100 the longer runs are half way from 10 % to their accuracy
        write_run(folder / "density-0.001", "dense", seed, 0.7, steps=200)
        write_run(folder / "density-0.001", "topk", seed, 0.5, steps=200)
        write_run(folder / "density-0.001", "regtopk", seed, 0.54, steps=200)
    write_run(folder / "density-0.001-long", "topk", 0, 0.9, steps=400)  # differs in more than the density
    write_run(folder / "density-0.1", "regtopk", 0, 0.35, density=0.1)
    write_run(folder / "density-0.1", "regtopk", 0, 0.99, density=0.1, mu=50)
    assert row_of("density-0.1", collected(tmp_path)[2])[3] == claims.NOT_RUN
    write_run(folder / "density-0.1", "topk", 0, 0.3, density=0.1)
    found = collected(tmp_path)[2]
    cells = row_of("density-0.1", found)
    assert cells[3] == "after 100 steps RegTop-k 35.00 %, Top-k 30.00 %, dense 40.00 %"
    assert cells[6] == "[density-0.001](results/cifar10/density-0.001), [density-0.1](results/cifar10/density-0.1)"
    # The made-up records at half time displace nothing; the result of the run that ends there does.
    assert row_of("resnet18-density", found)[3].endswith("0.001: 2.00 (displaced 0.0 %); 0.1: 5.00 (displaced 5.0 %)")
    assert "[at 0.1](experiments/README.md#density-0.1) 5.00 (5.0 %)" in claims_summary.format_summary(found)
    drawn = {path.stem for path in plot.draw_all(tmp_path / "results", tmp_path / "figures", suffixes=(".svg",))}
    assert {"cifar10_resnet18-density", "cifar10_resnet18-density_by_density"} <= drawn
    with pytest.raises(ValueError, match=r"expected a test at step 60, got \[0, 100, 200\]"):
        evidence.cut(found.cifar10["density-0.001"][0], 60)


def test_a_finished_run_that_goes_on_is_not_finished(tmp_path):
    folder = tmp_path / "runs" / "cifar10" / "density-0.001"
    write_run(folder, "topk", 0, 0.5)
    (log,) = folder.glob("*/log.jsonl")
    with record.Recorder.resume(log, log.stat().st_size, step=100, steps=200) as recorder:
        recorder.write("step", step=110, loss=1.0)
    assert evidence.read_run(log) is None


def test_runs_of_other_lengths_are_not_compared(tmp_path):
    folder = tmp_path / "runs" / "cifar10" / "mobilenet_v2"
    write_run(folder, "topk", 0, 0.5, steps=100)
    write_run(folder, "regtopk", 0, 0.6, steps=200)
    assert row_of("mobilenet_v2", collected(tmp_path)[2])[3] == claims.NOT_RUN
    assert claims_cifar10.pair_up([]) == []


def test_runs_of_changed_sources_or_of_another_data_set_are_left_out(tmp_path):
    folder = tmp_path / "runs" / "cifar10" / "vgg11_bn"
    write_run(folder, "topk", 0, 0.5, dirty=True)
    write_run(folder, "topk", 1, 0.5, dataset=data.DIGITS_NAME)
    copied, left, _ = collected(tmp_path)
    assert copied == []
    assert [line.split("log.jsonl: ")[1] for line in left] == ["not of a clean commit", f"of {data.DIGITS_NAME}"]


# The test over seeds


def test_the_paired_test_is_scipy_s_and_uses_common_seeds_alone():
    from scipy import stats

    first, second = {0: 1.0, 1: 2.5, 2: 3.0, 9: 50.0}, {0: 0.5, 1: 1.0, 2: 2.8, 7: -50.0}
    result = paired_test.compare(first, second)
    reference = stats.ttest_rel([1.0, 2.5, 3.0], [0.5, 1.0, 2.8])
    assert result.n == 3 and result.mean == pytest.approx((0.5 + 1.5 + 0.2) / 3)
    assert result.p == pytest.approx(reference.pvalue)
    assert (result.low, result.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    assert not result.shown and result.excludes(8.0) and not result.excludes(1.0)


def test_without_a_spread_there_is_no_test():
    one, equal = paired_test.compare({0: 2.0}, {0: 1.0}), paired_test.compare({0: 2.0, 1: 3.0}, {0: 1.0, 1: 2.0})
    assert one.p is None and one.describe() == "none with one seed; difference 1.00"
    assert equal.p is None and not equal.shown and equal.describe() == "none: every difference is 1.00"
    assert paired_test.compare({0: 1.0}, {1: 1.0}) is None


def test_numbers_have_a_true_minus_sign_and_no_negative_zero():
    assert paired_test.number(-0.004, 2) == "0.00" and paired_test.number(-1.5, 1) == "−1.5"
    assert paired_test.spread([1.0]) == "1.00" and paired_test.spread([1.0, 3.0], 1) == "2.0 ± 1.4"


def test_the_same_figure_is_the_same_file(tmp_path):
    for name in ("one.svg", "two.svg"):
        figure, (axes,) = figure_style.new_figure(1, size=(3, 2))
        figure_style.band(axes, [0, 1], [[1, 2], [2, 4]], color="black", label="line")
        axes.legend()
        figure_style.save(figure, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert plot_regression.draw_toy(tmp_path) is None
