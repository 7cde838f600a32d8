"""The paper's Fig. 3 on this GPU: 8 workers of ResNet-18 on CIFAR-10, beside the committed run on a CPU."""

import shutil
import signal
import subprocess
import sys

from tests.gpu_check.log import ROOT

COMMITTED = ROOT / "experiments" / "results" / "cifar10" / "density-0.001.jsonl"
WITHIN = 5.0  # points of accuracy, of a run of the same seed whose sums are rounded otherwise; seeds differ by 1


def figure(log):
    """As many of the experiment's steps as there is time for: each method has a third. The same command goes on where it was stopped."""
    if log.data is None:
        raise log.NotRun("no --data, the folder that holds cifar-10-batches-py")
    from experiments.report.logs import finished_run
    from runlog.record import LOG_NAME, read_logs

    committed = [finished_run(header, records, COMMITTED) for header, records in read_logs(COMMITTED)]
    tiny = ["--model", "tiny", "--steps", "4", "--evaluate-every", "2", "--record-every", "2", "--test-images", "50", "--device", "cpu", "--threads", "1"]
    methods = ("regtopk",) if log.emulated else ("regtopk", "topk", "dense")
    for number, method in enumerate(methods):
        # A later check in the same checkout goes on from there.
        folder = (log.folder if log.emulated else ROOT / "build" / "gpu-check") / f"figure-{method}"
        command = [sys.executable, "-m", "experiments.cifar10", "--paper", "--method", method, "--data", str(log.data), "--folder", str(folder)]
        status = run(command + (tiny if log.emulated else ["--device", "cuda", "--save-every", "300"]), log.seconds_left() / (len(methods) - number))
        records = []
        if (folder / LOG_NAME).exists():
            ((_, records),) = read_logs(folder)
            shutil.copy(folder / LOG_NAME, log.folder / f"figure-{method}.jsonl")
        tests, rates = [record for record in records if record["event"] == "test" and record["step"] > 0], [record["seconds"] for record in records if record["event"] == "step"]
        if not log.check(status in (0, 128 + signal.SIGINT) and tests and rates, f"{method}: expected tests of a run, got {len(tests)} and status {status}"):
            continue
        last, there = tests[-1], {}
        if not log.emulated:
            (beside,) = [run for run in committed if run.options["method"] == method and run.seed == 0]
            at_step = [test for test in beside.tests if test["step"] == last["step"]]
            if not log.check(at_step, f"{method}: expected a test of the committed run at step {last['step']}, got those at {[test['step'] for test in beside.tests]}"):
                continue
            there = {"on a CPU": 100 * at_step[0]["accuracy"]}
        accuracy = 100 * last["accuracy"]
        log.write("learned", method=method, step=last["step"], accuracy=accuracy, **there, steps_per_second=1 / sorted(rates)[len(rates) // 2])
        for expected in there.values():
            log.check(abs(accuracy - expected) < WITHIN, f"{method}: expected about {expected:.1f} % after {last['step']} steps, got {accuracy:.1f} %")


def run(command, seconds):
    """The status of a command that is interrupted after that time, as by Ctrl-C."""
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        return process.wait(max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()
