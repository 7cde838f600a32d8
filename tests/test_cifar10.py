"""The training job: kill and resume, one process against torchrun, Ctrl-C, partitions, local steps and options."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import become_one_of_torchrun, run_workers

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # experiments is not installed

from experiments import batches, cifar10, data, models, workers  # noqa: E402
from experiments.run import digest  # noqa: E402
from runlog import record  # noqa: E402
from torchvision_here import needs_torchvision  # noqa: E402

SHORT = ["--model", "tiny", "--data", "digits", "--batch-size", "8", "--density", "0.1", "--mu", "1", "--evaluate-every", "4", "--record-every", "2",
         "--threads", "1", "--timeout", "180"]  # fmt: skip
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SCRIPT = str(ROOT / "experiments" / "cifar10.py")
TIMES = re.compile("seconds")


def train(folder, *options, num_workers=2, steps=10):
    """Run the command in this process and return the log's records without times."""
    cifar10.main([*SHORT, "--workers", str(num_workers), "--steps", str(steps), "--folder", str(folder), *options])
    return read_records(folder)


def without_times(record):
    return {key: without_times(value) if isinstance(value, dict) else value for key, value in record.items() if not TIMES.search(key)}


def read_records(folder):
    _, records = record.read_log(folder)
    return [without_times(line) for line in records if line["event"] != "resume"]


def environment():
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}


def run_torchrun(folder, *options):
    command = [*TORCHRUN, SCRIPT, *SHORT, "--folder", str(folder), *options]
    ended = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=480, env=environment())
    assert ended.returncode == 0, ended.stderr
    return ended


@pytest.fixture(autouse=True)
def one_thread():
    """One thread, as each process under torchrun has here; and the interrupt handler that was there before."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, handler)


class Killed(BaseException):
    """What ends a run in the middle of a step: nothing in the command may catch it."""


def kill_at(step, monkeypatch, folder, *options):
    """Run until `step` (counted from 0) begins, then leave what a kill in the middle of a write leaves behind."""
    take_step = workers.LocalWorkers.step

    def interrupted(self, number):
        if number == step:
            raise Killed
        return take_step(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(workers.LocalWorkers, "step", interrupted)
        with pytest.raises(Killed):
            train(folder, *options)
    with open(folder / record.LOG_NAME, "a", encoding="utf-8") as log:
        log.write('{"event": "step", "st')
    (folder / "checkpoints" / "step-00000009").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "step-00000009" / "training.pt.partial").write_bytes(b"half a checkpoint")


@pytest.mark.parametrize("method, partition", [("dense", "iid"), ("topk", "labels"), ("regtopk", "iid")])
def test_a_killed_run_ends_with_the_log_and_the_bits_of_one_that_never_stopped(tmp_path, monkeypatch, method, partition):
    options = ("--method", method, "--partition", partition, "--save-every", "3", "--momentum", "0.9")
    expected = train(tmp_path / "whole", *options)
    for step in (2, 8, 9):  # before the first checkpoint, between checkpoints and tests, right after a checkpoint
        kill_at(step, monkeypatch, tmp_path / "killed", *options)
    assert train(tmp_path / "killed", *options) == expected
    assert expected[-1]["event"] == "result" and expected[-1]["step"] == expected[-1]["statistics"]["steps"] == 10
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()] == ["step-00000010"]


def test_more_steps_continue_a_finished_run_and_equal_a_long_one_in_log_and_table(tmp_path, capsys):
    tables = []
    for folder, steps in (("continued", 6), ("continued", 10), ("long", 10), ("long", 10)):
        result = train(tmp_path / folder, steps=steps)[-1]
        output = capsys.readouterr().out
        tables.append([line for line in output.splitlines() if "  " in line and not re.search("step [0-9]|share of|median|time", line)])
    assert "finished at step 10 already" in output
    assert tables[1] == tables[2] == tables[3] != tables[0]
    assert read_records(tmp_path / "continued")[-1] == result
    assert any(re.fullmatch(r"entries sent per worker and step +191 of 1,906", line) for line in tables[1]), tables[1]


def test_what_cannot_go_on_is_one_message(tmp_path, capsys):
    train(tmp_path, steps=4)
    for options, message in (
        (("--mu", "2"), f"--mu: expected 1.0, as in the checkpoint {tmp_path}/checkpoints/step-00000004, got 2.0; name another --folder"),
        (("--workers", "3"), "LocalExchange.load_state_dict: expected the state of 3 workers, got 2"),
        (("--steps", "2"), f"--steps: expected at least 4, as in the checkpoint in {tmp_path}/checkpoints, got 2; name another --folder"),
        (("--data", str(tmp_path)), f"--data: expected CIFAR-10 in {tmp_path}/cifar-10-batches-py, got a folder without it; give the folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            train(tmp_path, *options, steps=5)
        error = capsys.readouterr().err
        assert ended.value.code == 1 and error.startswith(message) and error.count("\n") == 1


def take_first_steps(rank, folder, options):
    """What torchrun would start, in a process that has imported torch already."""
    become_one_of_torchrun(rank, 2, folder.parent)
    cifar10.main([*SHORT, "--folder", str(folder), *options, "--steps", "3", "--save-every", "2"])


@pytest.mark.parametrize("method", [pytest.param("dense", marks=pytest.mark.long), "regtopk"])
def test_two_processes_under_torchrun_that_were_resumed_equal_one_process_bit_for_bit(tmp_path, method):
    options = ("--method", method, "--momentum", "0.9")
    alone = train(tmp_path / "alone", *options, steps=7)
    run_workers(take_first_steps, 2, tmp_path / "together", options)
    ended = run_torchrun(tmp_path / "together", *options, "--steps", "7", "--compare", "--workers", "2")
    assert "goes on from step 3" in ended.stdout and "Warning" not in ended.stderr
    assert alone[-1]["statistics"]["bytes_sent"] > 0 and read_records(tmp_path / "together")[-1] == alone[-1]
    assert re.search(r"^median step of a dense all-reduce +0\.\d+ s, [0-9.]+ times this one's$", ended.stdout, re.MULTILINE)
    assert (tmp_path / "together" / "curves.svg").read_text().rstrip().endswith("</svg>")
    assert str(tmp_path) not in json.dumps(record.read_log(tmp_path / "together")[0])


@pytest.mark.parametrize("launcher", [[], ["-m", "experiments.launch", "--standalone", "--nproc-per-node", "2"]], ids=["one process", "torchrun"])
def test_ctrl_c_ends_all_processes_without_a_traceback_and_says_where_the_job_goes_on(tmp_path, launcher):
    command = [sys.executable, *launcher, SCRIPT, *SHORT, "--steps", "100000", "--save-every", "5", "--evaluate-every", "5", "--folder", str(tmp_path / "run")]
    with open(tmp_path / "output", "w+") as output:
        job = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=environment(), start_new_session=True)
        try:
            deadline = time.monotonic() + 240
            while not list(tmp_path.glob("run/checkpoints/step-*/training.pt")):
                assert job.poll() is None and time.monotonic() < deadline, output.read()
                time.sleep(0.1)  # for the file system, not for luck
            os.killpg(job.pid, signal.SIGINT)
            assert job.wait(30) == 130
        finally:
            if job.poll() is None:
                job.terminate()  # torchrun ends its workers
                job.wait(40)
        output.seek(0)
        text = output.read()
    assert "Traceback" not in text and "Error" not in text, text[-3000:]
    (step,) = re.findall(r"^stopped; the same command goes on from step (\d+)$", text, re.MULTILINE)
    assert (tmp_path / "run" / "checkpoints" / f"step-{int(step):08d}").is_dir()


def test_dense_is_top_k_at_density_1_and_methods_differ_and_repeat_themselves(tmp_path):
    methods = ("dense", "topk", "regtopk")
    digests = [train(tmp_path / f"{method}-{n}", "--method", method, steps=6)[-1]["parameters_sha256"] for n in (1, 2) for method in methods]
    assert digests[:3] == digests[3:] and len(set(digests)) == 3
    assert train(tmp_path / "all", "--method", "topk", "--density", "1", steps=6)[-1]["parameters_sha256"] == digests[0]


def test_one_worker_with_local_steps_ends_where_its_own_steps_lead(tmp_path):
    rounds = train(tmp_path / "rounds", "--method", "dense", "--local-steps", "5", num_workers=1, steps=2)
    steps = train(tmp_path / "steps", "--method", "dense", num_workers=1, steps=10)
    # Not bit for bit: (w - a) - b is not w - (a + b).
    assert rounds[-1]["accuracy"] == pytest.approx(steps[-1]["accuracy"], abs=0.01)
    files = (tmp_path / "rounds/checkpoints/step-00000002/training.pt", tmp_path / "steps/checkpoints/step-00000010/training.pt")
    saved = [torch.load(path, weights_only=True)["training"]["model"] for path in files]
    for name, value in saved[0].items():
        assert torch.allclose(value.float(), saved[1][name].float(), atol=1e-5), name


@pytest.mark.parametrize("partition", ["dirichlet", "labels"])
def test_every_image_has_one_owner_and_few_labels_are_shared(partition):
    labels = torch.arange(1000) % 10
    if partition == "labels":
        owned = batches.partition_labels(labels, 5)
        assert all(len(labels[images].unique()) == 2 for images in owned)
    else:
        owned, again = (batches.partition_dirichlet(labels, 5, 0.1, seed=3) for _ in range(2))
        assert all(torch.equal(images, same) for images, same in zip(owned, again))
        assert len({len(images) for images in owned}) > 1
    assert torch.equal(torch.cat(owned).sort().values, torch.arange(1000))


def test_batches_use_every_image_once_an_epoch_in_an_order_that_the_seed_decides():
    digits = data.load_digits()
    digits.train_labels = torch.arange(len(digits.train_labels))  # the label now names the image
    images = torch.arange(100, 130)
    own = batches.Batches(digits, images, 10, seed=1, rank=0, world_size=4)
    epochs = [torch.cat([own[3 * epoch + step][1] for step in range(3)]) for epoch in (0, 1)]
    assert all(torch.equal(epoch.sort().values, images) for epoch in epochs) and not torch.equal(*epochs)
    assert torch.equal(own[0][1], epochs[0][:10])  # also after a later epoch
    seen = [batches.Batches(digits, None, 10, seed=1, rank=rank, world_size=2)[step][1] for rank in (0, 1) for step in range(71)]
    assert torch.cat(seen).unique().numel() == 2 * 71 * 10  # an epoch of 1437 images has 71 steps; no image comes twice
    one, again, other = (batches.Batches(digits, None, 10, seed=seed, rank=0, world_size=2)[75][1] for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    for own, message in ((images, "the 30 images of worker 4, got 31; choose another"), (None, "1437 images over all workers, got 1000 on each of 6")):
        with pytest.raises(ValueError, match=f"--batch-size: expected at most {message}"):
            batches.Batches(digits, own, 31 if own is not None else 1000, seed=1, rank=4, world_size=6)


@needs_torchvision
@pytest.mark.parametrize(
    "name, entries",
    [("resnet18", 11_181_642), ("resnet18_3x3", 11_173_962), ("vgg11_bn", 9_231_114), ("mobilenet_v2", 2_236_682), ("tiny", 1_906)],
)
def test_a_network_has_its_entries_and_start_weights_that_the_seed_decides(name, entries):
    one, again, other = (models.make_model(name, seed) for seed in (1, 1, 2))
    assert sum(parameter.numel() for parameter in one.parameters()) == entries
    assert digest(one) == digest(again) != digest(other)
    assert one(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--steps 0", "--steps: expected at least 1, got 0"),
        ("--batch-size 1", "--batch-size: expected at least 2, which BatchNorm needs, got 1"),
        ("--momentum 1", "--momentum: expected 0 <= momentum < 1, got 1.0"),
        ("--timeout nan", "--timeout: expected a number above 0, got nan"),
        ("--method dense --density 2", "--density: expected 0 < density <= 1, such as 0.001, which keeps one entry in 1000, got 2.0"),
        ("--seed -1", "--seed: expected at least 0, got -1"),
        ("--levels 2", "--levels: expected a job under torchrun, got 2 without; workers in one process have no hosts"),
        ("torchrun --levels two", "argument --levels: invalid ranks value: 'two'"),
        ("--momentum-correction 1", "--momentum-correction: expected 0 <= momentum_correction < 1, got 1.0"),
        ("--momentum-correction 0.9 --momentum 0.5", "--momentum-correction: expected no --momentum beside it, got 0.5"),
        ("--adaptive-power 1 --warmup-steps 5", "--adaptive-power: expected no --warmup-steps beside it, got 5"),
        ("--compare", "--compare: expected torchrun, got none: workers in one process wait for no network; start it with torchrun"),
        ("torchrun --workers 3", "--workers: expected torchrun's number of processes, 2, got 3; hand it to torchrun as --nproc-per-node"),
        ("torchrun --local-steps 2", "--local-steps: expected 1 under torchrun, got 2"),
    ],
)
def test_an_option_out_of_range_is_an_error(options, message, capsys, monkeypatch):
    if options.startswith("torchrun"):
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        cifar10.parse(options.removeprefix("torchrun").split())
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_is_named_after_what_sets_the_run_apart_and_paper_is_a_preset():
    parsed = [cifar10.parse(options.split()) for options in
              ("--method dense --mu 3", "--density 0.01 --mu 50 --seed 2 --paper --steps 7", "--partition dirichlet --distortion current --local-steps 40",
               "--chunk 4096 --adaptive-power 1 --dense auto --momentum-correction 0.9 --mask-momentum --clip-norm 2")]  # fmt: skip
    assert [options.folder.name for options in parsed] == [
        "resnet18-dense-n2-s0", "resnet18-regtopk-d0.01-mu50-n8-s2", "resnet18-regtopk-d0.001-mu5-current-dirichlet0.1-local40-n2-s0",
        "resnet18-regtopk-d0.001-mu5-chunk4096-adaptive1-denseauto-momentum0.9-mask-clip2-n2-s0",
    ]  # fmt: skip
    assert (parsed[1].learning_rate, parsed[1].test_images, parsed[1].steps) == (0.01, 10_000, 7)


@pytest.mark.parametrize(
    "gpus, here, local, wanted, expected",
    [
        (0, 2, 1, "auto", ("cpu", "gloo", "device: CPU; gradients go over gloo")),
        (2, 2, 1, "cpu", ("cpu", "gloo", "device: CPU; gradients go over gloo")),
        (2, 2, 1, "auto", ("cuda:1", "cpu:gloo,cuda:nccl", "device: a GPU for each worker (card); gradients go over NCCL")),
        (1, 4, 3, "cuda", ("cuda:0", "gloo", "device: 1 GPU for 4 workers of this host (card); gradients go over gloo")),
        (1, None, 0, "auto", ("cuda:0", "gloo", "device: card, for all workers")),
    ],
)
def test_a_process_takes_the_gpu_that_is_its_own_and_says_what_carries_its_gradients(monkeypatch, gpus, here, local, wanted, expected):
    from experiments.devices import choose

    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "card")
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setenv("LOCAL_RANK", str(local))
    assert choose(wanted, here is not None) == expected
    assert taken == ([expected[0]] if here is not None and expected[0] != "cpu" else [])


def test_cuda_without_a_gpu_is_one_message(monkeypatch):
    from experiments.devices import choose

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device: expected a GPU that torch can use, got none; choose cpu"):
        choose("cuda", False)
