"""What is said of the experiments is what the committed logs show: the table, the short answer, the figures, the commands."""

import importlib
import json
import re
import shlex
import sys
from functools import cache
from pathlib import Path
from statistics import fmean

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # experiments is not installed

from experiments import cifar10, data, run  # noqa: E402
from experiments.report import __main__ as report  # noqa: E402
from experiments.report import claims, figures, logs, paired_test, table  # noqa: E402
from runlog import record  # noqa: E402
from torchvision_here import TORCHVISION_PROBLEM  # noqa: E402

DOCUMENT = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
FINDINGS = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`(python -m experiments\.(?:toy_logistic|linear_regression|cifar10) [^`]+)`", DOCUMENT)))
ON_A_GPU = [command for command in COMMANDS if "--device cuda" in command]


@cache
def committed():
    return logs.Evidence()


# Documents and figures against the committed logs


def test_the_documents_say_what_the_committed_logs_show():
    assert claims.fill(DOCUMENT, committed()) == DOCUMENT
    assert claims.fill(FINDINGS, committed()) == FINDINGS


def test_every_claim_has_a_row_and_every_end_of_training_a_line_in_the_findings():
    names = sorted(claims.claims_of(committed()))
    assert sorted(re.findall(r'^\| <a id="([^"]+)">', DOCUMENT, re.MULTILINE)) == names
    lines = re.findall(r"^\* \[[^]]+\]\(\S+#([^)]+)\): .*\d", FINDINGS, re.MULTILINE)
    ends = [name for name in names if name.startswith("end-")]
    assert len(ends) >= 3 and sorted(name for name in lines if name.startswith("end-")) == ends
    rules = [name for name in names if name.startswith("equal-")]
    assert len(rules) >= 2 and set(rules) < set(lines)
    language = [name for name in names if name.startswith("language-")]
    assert len(language) >= 1 and set(language) < set(lines)
    assert len(lines) == len(set(lines)) == 10 + len(ends) + len(rules) + len(language)


def test_the_readme_s_sentences_are_what_the_committed_logs_show():
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "a thousandth of the entries per step ResNet-18 came within a point of the accuracy of training that sends all of them, 58 % after 1,500 steps" in readme
    assert "| 0.01, then 0.001 if you still wait | both came within a point of [dense](docs/glossary.md#dense) training with ResNet-18, " \
        "0.0001 lost four (three seeds at 0.001, one at the others) |" in readme
    lost = {}
    for density, group in ((0.01, logs.BY_DENSITY), (0.001, "density-0.001"), (0.0001, logs.BY_DENSITY)):
        runs = committed().cifar10[group]
        dense, topk = logs.pair(runs, {"method": "dense"}, {"method": "topk", "density": density})
        assert len(topk) == (3 if density == 0.001 else 1)
        lost[density] = fmean(run.value("accuracy") for run in dense) - fmean(run.value("accuracy") for run in topk)
    assert abs(lost[0.01]) < 1 and abs(lost[0.001]) < 1 and round(lost[0.0001]) == 4
    ends = [run for run in committed().cifar10["density-0.001"] if run.options["method"] in ("dense", "topk")]
    assert {run.options["steps"] for run in ends} == {1500} and all(57 < run.value("accuracy") < 60 for run in ends)
    assert "dense training needs more than a hundred times the bytes" in readme
    sent = {run.options["method"]: run.result["statistics"]["bytes_sent"] for run in committed().cifar10["density-0.001"]}
    assert sent["dense"] > 100 * sent["topk"] == 100 * sent["regtopk"]
    assert "RegTop-k was better on no network that was tried**: no difference showed, but after local steps of a small GPT, where it lost a hundredth of a nat" in readme
    compared = [(group, pair) for group, runs in committed().cifar10.items() for pair in claims.pairs_of(runs).values()]
    assert len({run.options["model"] for _, (runs, _) in compared for run in runs}) >= 4
    for group, (regtopk, topk) in compared:
        assert not claims.compare(claims.values("accuracy", regtopk), claims.values("accuracy", topk)).shown, group
    assert "At a [budget](docs/glossary.md#budget) of a hundredth and a half of dense training's bytes, with 4 workers and a small GPT, this came closest to it, in two bits or one " \
        "([three seeds](experiments/README.md#language-800)); Top-k of the gradients was far behind, in fp32 and without decay" in readme and "TopKState(0.19, decay=0.95, wire_dtype=\"2bit\")" in readme
    rows = claims.at_best_rate(claims.language_sweeps(committed())["800"])
    assert set(list(rows)[:3]) == {"dense", "h5-2bit-d95", "h5-sign-d95"} and {len(rows[row]) for row in ("dense", "h5-2bit-d95", "topk")} == {3}
    shares = [rows[row][0].value("of_dense") for row in rows if row not in ("dense", "diloco15")]
    assert 0.0149 < min(shares) and max(shares) < 0.0152 and len(shares) >= 4
    losses = {row: fmean(claims.values("loss", runs)) for row, runs in rows.items()}
    assert losses["topk"] - losses["dense"] > 4 * (losses["h5-2bit-d95"] - losses["dense"])
    assert "After 800 steps the validation loss was within 0.13 of dense training's" in readme and losses["h5-2bit-d95"] - losses["dense"] < 0.13
    assert "the best of three rates for dense training was as good as any" in readme
    rate = rows["dense"][0].options["learning_rate"]
    at_that_rate = [run for run in claims.language_sweeps(committed())["800"] if run.options["row"] == "h5-2bit-d95" and run.options["learning_rate"] == rate]
    assert len(at_that_rate) == 3 and fmean(claims.values("loss", at_that_rate)) - losses["h5-2bit-d95"] < 0.005
    findings = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    assert "was worse than Top-k at both rates, in one bit and in two, by 0.005 to 0.024 nats in the mean of three seeds" in findings
    lost = {}
    for row in ("h5-2bit-d95", "h5-sign-d95"):
        for rate in (0.003, 0.01):
            topk, regtopk = (
                claims.values("loss", claims.select(claims.language_sweeps(committed())["800"], row=name, learning_rate=rate)) for name in (row, f"{row}-regtopk")
            )
            assert len(topk) == len(regtopk) == 3
            lost[row, rate] = fmean(regtopk) - fmean(topk)
    assert round(min(lost.values()), 3) == 0.005 and round(max(lost.values()), 3) == 0.024 and round(fmean(lost.values()), 2) == 0.01, lost
    assert "After 3,000 steps the validation loss was within 0.05 of dense training's" in readme
    longer = claims.at_best_rate(claims.language_sweeps(committed())["3000"])
    assert list(longer) == ["dense", "h5-2bit-d95"] and all(len(runs) == 3 for runs in longer.values())
    dense, best = (fmean(claims.values("loss", runs)) for runs in longer.values())
    assert best - dense < 0.05 and longer["h5-2bit-d95"][0].value("of_dense") < 1 / 60
    # Decisive: a squared distance of less than a tenth.
    least = float(re.search(r"there only at a \[density\]\(\S+\) of ([\d.]+) or more", readme)[1])
    found = {density: claims.find_gap(committed(), density).comparison for density in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)}
    assert all((comparison.shown and comparison.mean < -1) == (density >= least) for density, comparison in found.items())


def test_every_committed_log_is_of_a_clean_commit_and_of_the_data_set_and_finished():
    found = sorted((ROOT / "experiments" / "results").rglob("*.jsonl"))
    assert len(found) >= 19
    for path in found:
        for header, records in record.read_logs(path):
            parts = [header, *(line for line in records if line["event"] == "resume")]
            assert all(part["commit"] and part["dirty"] is False for part in parts), path
            if path.parent.name == "cifar10":
                assert header["data"] == data.CIFAR10_NAME and logs.finished_run(header, records, path)
    for group, runs in committed().cifar10.items():
        assert len({run.result["step"] for run in runs}) == 1, group


def without_names(figure):
    """A figure whose clipping paths are named in the order of their use: matplotlib's names depend on the last bits of the layout's solver."""
    names = {}
    return re.sub(r"\bp[0-9a-f]{10}\b", lambda found: names.setdefault(found[0], f"p{len(names)}"), figure)


def test_every_figure_is_drawn_again_from_the_committed_logs(tmp_path):
    drawn = {path.stem: path for path in report.draw_all(committed(), tmp_path)}
    folder = ROOT / "experiments" / "figures"
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in drawn.values())
    import matplotlib

    for name, path in drawn.items():
        text = path.read_text(encoding="utf-8")
        assert "</svg>" in text and "<dc:date>" not in text
        if f"matplotlib=={matplotlib.__version__}\n" in (ROOT / "requirements.txt").read_text():  # another version draws otherwise
            committed_text = (folder / path.name).read_text(encoding="utf-8")
            assert without_names(text) == without_names(committed_text), f"expected the figure {name} of the committed logs; run python -m experiments.report"


# Commands


def options_of(command):
    words = shlex.split(command)
    module = importlib.import_module(words[2])
    return module, words[3:], module.parse(words[3:])


def test_the_commands_of_the_document_parse():
    assert len(ON_A_GPU) == 7 and len(COMMANDS) > 20
    for command in COMMANDS:
        module, _, options = options_of(command)
        folder = options.folder if module is cifar10 else options.out
        assert options.steps >= 1 and folder.parts[0] == "runs"
        if module is cifar10:
            assert options.workers == 8 and options.learning_rate == 0.01 and options.test_images == 10_000


@pytest.mark.parametrize("command", [command for command in COMMANDS if "cifar10" not in command])
def test_a_command_without_a_network_runs_for_a_few_steps(command, tmp_path, capsys):
    module, arguments, _ = options_of(command)
    short = ["--steps", "3", "--workers", "2", "--seed", "0", "--threads", str(torch.get_num_threads())] if "linear" in command else ["--steps", "50"]
    module.main([*arguments, *short, "--out", str(tmp_path / "log.jsonl")])
    assert re.fullmatch(r"(log10_gap|final_loss)=\S+", capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("command", ON_A_GPU)
def test_a_command_for_a_gpu_takes_a_step_on_the_cpu(command, tmp_path, monkeypatch):
    options = options_of(command)[2]
    # Each network once, with the first of its commands; the others' options are tested with the small network.
    first = next(other for other in ON_A_GPU if (parsed := options_of(other)[2]).model == options.model and parsed.local_steps == 1)
    model = options.model if command == first else "tiny"
    if model != "tiny" and TORCHVISION_PROBLEM:
        pytest.skip(TORCHVISION_PROBLEM)
    digits = data.load_digits()
    digits.test_images, digits.test_labels = digits.test_images[:4], digits.test_labels[:4]
    monkeypatch.setattr(run, "load_dataset", lambda options: digits)
    monkeypatch.setattr(run.Run, "_save", lambda self: None)  # more than 100 MB
    short = ["--device", "cpu", "--model", model, "--steps", "1", "--local-steps", str(min(2, options.local_steps)), "--workers", "2"]
    short += ["--batch-size", "2", "--data", "digits", "--threads", str(torch.get_num_threads()), "--folder", str(tmp_path)]
    cifar10.main([*options_of(command)[1], *short])
    assert logs.read_run(tmp_path).options["partition"] == options.partition


# Claims from logs that are made up


def write_run(folder, method, seed, accuracy, *, finished=True, density=0.001, mu=5.0, steps=100, displaced=5):
    """Add the log of a run whose accuracy rises in a line to `accuracy` to a group of results."""
    options = {"method": method, "density": density, "mu": mu, "distortion": "previous", "model": "tiny", "workers": 8, "batch_size": 20,
               "learning_rate": 0.01, "partition": "iid", "concentration": 0.1, "local_steps": 1, "steps": steps}  # fmt: skip
    lines = [{"event": "header", "seed": seed, "data": "CIFAR-10", "options": options}]
    for step in (0, steps // 2, steps):
        numbers = {"bytes_sent": 61.0 * step, "bytes_dense": 4000.0 * step, "sent_entries": 10.0 * step, "repeated": step, "displaced": 0.0}
        lines.append({"event": "test", "step": step, "accuracy": 0.1 + (accuracy - 0.1) * step / steps, "images": 10, **numbers})
        lines.append({"event": "step", "step": step, "loss": 2.3 - step / steps})
    statistics = {"entries": 1000, "sent_entries": 100, "repeated": 10, "displaced": displaced, "bytes_sent": 61, "bytes_dense": 4000}
    statistics |= {"compress_seconds": 1.0, "exchange_seconds": 2.0, "aggregate_seconds": 0.5}
    result = {"event": "result", "step": steps, "workers": 2, "accuracy": accuracy, "training_loss": 2 - accuracy, "test_images": 10,
              "training_seconds": 10.0, "median_step_seconds": 0.1, "statistics": statistics}  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in [*lines, *([result] if finished else [])])


def cells_of(name, results):
    """Return (found, n, test, log, figure) of a row."""
    row = claims.fill(f'| <a id="{name}"></a>claim | `command` | expected |', logs.Evidence(results))
    assert row.startswith(f'| <a id="{name}"></a>claim | `command` | expected | ') and row.endswith(" |")
    return row.removesuffix(" |").split(" | ")[claims.STATED :]


def line_of(name, results):
    return claims.fill(f"* [claim](README.md#{name}): earlier", logs.Evidence(results))


def test_without_logs_nothing_is_drawn_and_a_claim_is_an_error(tmp_path):
    assert report.draw_all(logs.Evidence(tmp_path), tmp_path / "figures") == []
    for name in claims.CLAIMS:
        with pytest.raises((LookupError, ValueError)):
            cells_of(name, tmp_path)


def test_a_comparison_is_of_both_methods_at_the_same_seeds(tmp_path):
    folder = tmp_path / "cifar10" / "density-0.001"
    for seed in (0, 1):
        write_run(folder, "topk", seed, 0.5 + seed / 100)
    write_run(folder, "regtopk", 2, 0.9)  # without a partner
    with pytest.raises(KeyError, match="0.001, 5.0"):
        cells_of("density-0.001", tmp_path)
    write_run(folder, "regtopk", 1, 0.52)
    expected = ["after 100 steps RegTop-k 52.00 %, Top-k 51.00 %", "1", "none with one seed; difference 1.00 points", "[density-0.001](results/cifar10/density-0.001.jsonl)"]
    assert cells_of("density-0.001", tmp_path) == [*expected, "[figure](figures/cifar10_density-0.001.svg)"]
    write_run(folder, "regtopk", 0, 0.51)
    found, n, test, *_ = cells_of("density-0.001", tmp_path)
    assert n == "2" and test.startswith("none: every difference is 1.00 points")
    assert "51.50 ± 0.71" in found
    write_run(folder, "topk", 2, 0.5, finished=False)
    with pytest.raises(ValueError, match="expected a finished run in cifar10/density-0.001.jsonl, got a log that does not end with a result"):
        logs.Evidence(tmp_path)


def test_an_end_of_training_is_held_against_none_at_the_seeds_that_all_ends_have(tmp_path):
    folder = tmp_path / "end_of_training"
    folder.mkdir()
    for model, optimizer, better in (("mlp", "sgd", 0.0), ("resnet18", "adamw", 0.2)):
        with record.Recorder(folder / f"{model}.jsonl", seed=None, settings={"model": model}) as recorder:
            for seed, nothing, gain in ((0, 0.50, 0.02), (1, 0.54, 0.03), (2, 0.52, 0.025), (3, 0.1, 0.8)):
                nothing += better
                recorder.write("run", optimizer=optimizer, ending="nothing", seed=seed, accuracy=nothing)
                if seed < 3:
                    recorder.write("run", optimizer=optimizer, ending="flush", seed=seed, accuracy=nothing + gain)
                    recorder.write("run", optimizer=optimizer, ending="dense", seed=seed, accuracy=nothing + gain * (seed - 1))
    for name, nothing in (("end-mlp-sgd", "52.00"), ("end-resnet18-adamw", "72.00")):
        found, n, test, log, figure = cells_of(name, tmp_path)
        assert found == f"nothing {nothing} ± 2.00 %; points more than it: flush 2.50, dense 0.17" and n == "3"
        assert test == "2 paired t-tests, uncorrected: p < 0.05 at flush"
        model = name.split("-")[1]
        assert log == f"[{model}](results/end_of_training/{model}.jsonl)" and figure == "[figure](figures/end_of_training.svg)"
    assert claims.claims_of(logs.Evidence(tmp_path)).keys() - claims.CLAIMS.keys() == {"end-mlp-sgd", "end-resnet18-adamw"}
    (drawn,) = report.draw_all(logs.Evidence(tmp_path), tmp_path / "figures")
    assert drawn.name == "end_of_training.svg" and all(f">{text}<" in drawn.read_text() for text in ("mlp", "resnet18", "sgd", "adamw", "flush", "dense"))


def test_rows_of_the_language_model_stand_at_the_rate_that_was_best_for_each_over_the_seeds_of_all_its_rates(tmp_path):
    folder = tmp_path / "language_model"
    folder.mkdir()
    losses = {("dense", 0.01): (1.5, 1.6), ("dense", 0.1): (1.4, 1.9), ("h5", 0.01): (1.9, 2.0), ("h5", 0.1): (1.7, 1.9, 0.1)}
    with record.Recorder(folder / "8.jsonl", seed=None, settings={"steps": 8, "size": "tiny", "workers": 2, "batch_size": 4}) as recorder:
        for (row, rate), own in losses.items():
            for seed, loss in enumerate(own):
                share = {"dense": 1.0, "h5": 0.02}[row]
                recorder.write(
                    "run", row=row, learning_rate=rate, seed=seed, loss=loss, of_dense=share, bytes_per_step=1e6 * share,
                    losses=[[4, 2 * loss], [8, loss]],
                )  # fmt: skip
    found, n, test, log, figure = cells_of("language-8", tmp_path)
    assert found == "dense 1.550 ± 0.071 at 0.01; h5 1.800 ± 0.141 at 0.1 (0.0200)"
    assert n == "2" and test == "1 paired t-tests, uncorrected: p < 0.05 at none"
    assert log == "[8](results/language_model/8.jsonl)" and figure == "[figure](figures/language_model_8.svg)"
    (drawn,) = report.draw_all(logs.Evidence(tmp_path), tmp_path / "figures")
    assert drawn.name == "language_model_8.svg" and all(f">{text}<" in drawn.read_text() for text in ("dense (n = 2)", "h5 (n = 2)"))


def test_rules_for_k_are_held_against_a_fixed_one_at_their_density(tmp_path):
    folder = tmp_path / "equal_bytes"
    folder.mkdir()
    with record.Recorder(folder / "mnist.jsonl", seed=None, settings={"steps": 10}) as recorder:
        for density in (0.5, 0.001):
            for seed in range(3):
                for rule, gain in (("fixed", 0.0), ("power-1", 0.01 * seed), ("threshold", 0.02 + 0.001 * seed)):
                    sent = 1000 + round(100 * gain)
                    recorder.write("run", density=density, rule=rule, seed=seed, accuracy=density + gain, loss=1 - gain, bytes_sent=sent)
    found, n, test, log, figure = cells_of("equal-mnist-0.5", tmp_path)
    assert found == (
        "fixed 50.00 ± 0.00 %; points more than it: power-1 1.00, threshold 2.10; test loss fixed 1.0000, power-1 0.9900, threshold 0.9790; "
        "bytes 1.000…1.002 times those of fixed"
    )
    assert n == "3" and test == "2 paired t-tests, uncorrected: p < 0.05 at threshold"
    assert log == "[mnist](results/equal_bytes/mnist.jsonl)" and figure == "[figure](figures/equal_bytes.svg)"
    (drawn,) = report.draw_all(logs.Evidence(tmp_path), tmp_path / "figures")
    assert drawn.name == "equal_bytes.svg" and all(f">{text}<" in drawn.read_text() for text in ("0.5", "0.001", "power-1", "threshold"))


def test_the_paper_s_gain_is_held_against_the_interval(tmp_path):
    folder = tmp_path / "cifar10" / "density-0.001"
    for seed, (topk, regtopk) in enumerate(((0.50, 0.501), (0.52, 0.519), (0.51, 0.511))):
        write_run(folder, "topk", seed, topk)
        write_run(folder, "regtopk", seed, regtopk)
    found, n, test, *_ = cells_of("density-0.001", tmp_path)
    assert found == "after 100 steps RegTop-k 51.03 ± 0.90 %, Top-k 51.00 ± 1.00 %" and n == "3"
    assert test.endswith("8 points lie outside the interval")
    assert line_of("density-0.001", tmp_path).startswith(f"* [claim](README.md#density-0.001): {found}; no difference shown (paired t: ")
    drawn = report.draw_all(logs.Evidence(tmp_path), tmp_path / "figures")
    assert [path.name for path in drawn] == ["cifar10_density-0.001.svg", "cifar10_density-0.001_bytes.svg"]


def test_densities_are_compared_one_by_one_and_p_is_corrected_for_their_number(tmp_path):
    for seed in range(3):
        for density in (0.1, 0.3):
            write_run(tmp_path / "cifar10" / "tiny-density", "topk", seed, 0.5 + 0.01 * seed, density=density)
            write_run(tmp_path / "cifar10" / "tiny-density", "regtopk", seed, 0.5 + 0.012 * seed + density / 10, density=density, displaced=20)
    found, _, test, *_ = cells_of("tiny-density", tmp_path)
    assert "0.1: 1.20 (displaced 20.0 %); 0.3: 3.20 (displaced 20.0 %)" in found
    smallest, corrected = map(float, re.fullmatch(r"2 paired t-tests: smallest p (\S+), corrected for their number (\S+)", test).groups())
    assert corrected == pytest.approx(2 * smallest, rel=0.05)


def test_where_labels_are_unevenly_shared_out_the_training_loss_is_stated_too(tmp_path):
    for method, accuracy in (("topk", 0.30), ("regtopk", 0.31), ("dense", 0.40)):
        write_run(tmp_path / "cifar10" / "partition-labels", method, 0, accuracy, density=0.01)
    expected = "after 100 steps RegTop-k 31.00 %, Top-k 30.00 %, dense 40.00 %; training loss RegTop-k 1.69, Top-k 1.70, dense 1.60"
    assert cells_of("partition-labels", tmp_path)[0] == expected


def test_densities_in_groups_of_their_own_are_compared_where_the_shortest_run_ended(tmp_path):
    folder = tmp_path / "cifar10"
    for seed in range(2):  # at step 100 the longer runs are half way from 10 % to their accuracy
        for method, accuracy in (("dense", 0.7), ("topk", 0.5), ("regtopk", 0.54)):
            write_run(folder / "density-0.001", method, seed, accuracy, steps=200)
    write_run(folder / "density-0.001-long", "topk", 0, 0.9, steps=400)  # differs in more than the density
    write_run(folder / "density-0.1", "regtopk", 0, 0.35, density=0.1)
    write_run(folder / "density-0.1", "regtopk", 0, 0.99, density=0.1, mu=50)
    with pytest.raises(KeyError, match="0.1, 5.0"):
        cells_of("density-0.1", tmp_path)
    write_run(folder / "density-0.1", "topk", 0, 0.3, density=0.1)
    found, _, _, links, _ = cells_of("density-0.1", tmp_path)
    assert found == "after 100 steps RegTop-k 35.00 %, Top-k 30.00 %, dense 40.00 %"
    assert links == "[density-0.001](results/cifar10/density-0.001.jsonl), [density-0.1](results/cifar10/density-0.1.jsonl)"
    # The made-up records at half time displace nothing; the result of the run that ends there does.
    assert cells_of("resnet18-density", tmp_path)[0].endswith("0.001: 2.00 (displaced 0.0 %); 0.1: 5.00 (displaced 5.0 %)")
    with pytest.raises(ValueError, match=r"expected a test at step 60, got \[0, 100, 200\]"):
        logs.Evidence(tmp_path).cifar10["density-0.001"][0].cut(60)


# The test over seeds, the figures and the table


def test_the_paired_test_is_scipy_s():
    from scipy import stats

    first, second = [1.0, 2.5, 3.0], [0.5, 1.0, 2.8]
    result, reference = paired_test.compare(first, second), stats.ttest_rel(first, second)
    assert result.n == 3 and result.mean == pytest.approx((0.5 + 1.5 + 0.2) / 3)
    assert result.p == pytest.approx(reference.pvalue) and not result.shown
    assert (result.low, result.high) == pytest.approx(tuple(reference.confidence_interval(0.95)))
    one, equal = paired_test.compare([2.0], [1.0]), paired_test.compare([2.0, 3.0], [1.0, 2.0])
    assert one.p is None and one.describe() == "none with one seed; difference 1.00"
    assert equal.p is None and not equal.shown and equal.describe() == "none: every difference is 1.00"


def test_numbers_have_a_true_minus_sign_and_no_negative_zero():
    assert paired_test.number(-0.004, 2) == "0.00" and paired_test.number(-1.5, 1) == "−1.5"
    assert paired_test.spread([1.0]) == "1.00" and paired_test.spread([1.0, 3.0], 1) == "2.0 ± 1.4"


def test_a_smoothed_line_neither_lags_nor_bends_at_its_ends():
    straight = [float(n) for n in range(20)]
    assert figures.smooth(straight) == straight
    assert figures.smooth([0.0, 3.0, 0.0]) == [0.0, 1.0, 0.0]


def test_the_command_prints_the_table_of_a_run_and_draws_it_and_names_one_that_has_not_finished(tmp_path, capsys):
    write_run(tmp_path / "log", "regtopk", 0, 0.6, density=0.01)
    report.main([str(tmp_path)])
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert rows == table_rows(tmp_path) and (tmp_path / "curves.svg").exists()
    assert rows["data"] == "CIFAR-10" and rows["method"] == "RegTop-k, density 0.01, mu 5"
    assert rows["job"] == "2 workers x 20 images, 100 steps, seed 0" and rows["test accuracy"] == "60.00% of 10 images"
    assert rows["bytes sent against dense"] == "1.525%" and rows["entries sent per worker and step"] == "0 of 5"
    assert rows["share of the step spent in the hook"] == "7.5%" and rows["share of the step waiting for payloads"] == "10.0%"
    assert rows["entries sent twice running"] == "10.00% of those sent" and rows["entries displaced"] == "5.000% of those sent"
    (tmp_path / "log.jsonl").unlink()
    write_run(tmp_path / "log", "regtopk", 0, 0.6, finished=False)
    with pytest.raises(SystemExit, match="finished_run: expected a finished run in .*, got a log that does not end with a result"):
        report.main([str(tmp_path)])


def table_rows(folder):
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in table.format_table(logs.read_run(folder)).splitlines())
