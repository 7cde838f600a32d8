"""Draw the curves of runs of the ResNet-18 job, several in one figure."""

import itertools
from pathlib import Path

from experiments.figure_style import new_figure, save
from experiments.record import read_log

LOSS_WINDOW = 50
LOGARITHMIC_FROM = 10  # bytes of one run over bytes of another
COLOURS = ("tab:blue", "tab:red", "black", "tab:green", "tab:orange", "tab:purple")


def running_mean(values, window):
    """Return the mean of each value and the up to `window` - 1 before it."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def name_method(header):
    """Return the method with what sets it apart, such as "regtopk, density 0.001"."""
    options = header["options"]
    return options["method"] if options["method"] == "dense" else f"{options['method']}, density {options['density']:g}"


def draw(logs, output):
    """Draw the logs (files or run folders; one figure, one colour each) into the image `output` and return its path.

    Left: training loss of rank 0's batches (nats) against the step. Middle and right: test accuracy (%) against the
    step and against the megabytes (1e6 bytes) each worker has sent. A filled marker is the test on all test images.
    """
    figure, (loss_axes, step_axes, byte_axes) = new_figure(3, size=(13.5, 4.3))
    runs = [read_log(log) for log in logs]
    sent = [max((record["bytes_sent"] for record in records if record["event"] == "test"), default=0) for _, records in runs]
    logarithmic = max(sent) > LOGARITHMIC_FROM * min(sent) > 0
    for (header, records), colour in zip(runs, itertools.cycle(COLOURS)):
        steps = [record for record in records if record["event"] == "step"]
        tests = [record for record in records if record["event"] == "test"]
        label = f"{name_method(header)}, seed {header['seed']}" + (f": {tests[-1]['accuracy']:.1%}" if tests else "")
        axis, losses = [record["step"] for record in steps], [record["loss"] for record in steps]
        if len(runs) == 1:
            loss_axes.plot(axis, losses, color=colour, alpha=0.25, linewidth=0.7)
        loss_axes.plot(axis, running_mean(losses, LOSS_WINDOW), color=colour, linewidth=1.8)
        for axes, key, unit in ((step_axes, "step", 1), (byte_axes, "bytes_sent", 1e6)):
            points = tests[1:] if axes is byte_axes and logarithmic else tests  # the first test has sent nothing
            along, accuracy = [record[key] / unit for record in points], [100 * record["accuracy"] for record in points]
            style = {"color": colour, "linewidth": 1.6, "marker": "o", "markersize": 4, "markerfacecolor": "white"}
            axes.plot(along, accuracy, label=label, **style)
            if any(record["event"] == "result" for record in records):
                axes.plot(along[-1:], accuracy[-1:], color=colour, marker="o", markersize=7)
        if len(runs) == 1 and tests and sent[0] < tests[-1]["bytes_dense"]:
            _note(byte_axes, f"a dense ring all-reduce would have sent {tests[-1]['bytes_dense'] / 1e6:,.0f} MB")
    images = sorted({record["images"] for _, records in runs for record in records if record["event"] == "test"})
    if images:
        _note(step_axes, f"first {images[0]:,} test images" + (f"; filled: all {images[-1]:,}" if len(images) > 1 else ""))
    _label([header for header, _ in runs], loss_axes, step_axes, byte_axes)
    if logarithmic:
        byte_axes.set_xlim(auto=True)
        byte_axes.set_xscale("log")
        byte_axes.autoscale(axis="x")
    save(figure, output)
    return Path(output)


def _note(axes, text):
    axes.text(0.98, 0.02, text, transform=axes.transAxes, ha="right", va="bottom", fontsize=8, color="0.35")


def _label(headers, loss_axes, step_axes, byte_axes):
    """Name data set, method, workers, axes and units."""
    first = headers[0]
    workers = ", ".join(sorted({str(header["workers"]) for header in headers}))
    data = ", ".join(sorted({header["data"] for header in headers}))
    method = f"{name_method(first)}, " if len(headers) == 1 else ""
    batch = first["options"]["batch_size"]
    loss_axes.figure.suptitle(f"ResNet-18 on {data}: {method}{workers} workers x {batch} images per step")
    loss_axes.set(xlabel="step", ylabel="training loss (nats)", title=f"Training loss, rank 0 (mean of {LOSS_WINDOW} steps)")
    step_axes.set(xlabel="step", ylabel="test accuracy (%)", title="Test accuracy against steps")
    byte_axes.set(xlabel="sent per worker (MB)", ylabel="test accuracy (%)", title="Test accuracy against bytes")
    step_axes.legend(loc="lower right", bbox_to_anchor=(1, 0.2), fontsize=9)
    for axes in (loss_axes, step_axes, byte_axes):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    for axes in (step_axes, byte_axes):
        axes.axhline(10, color="0.5", linewidth=1, linestyle=":")
        axes.annotate("chance", (0.01, 10), xycoords=("axes fraction", "data"), xytext=(0, -3),
                      textcoords="offset points", va="top", fontsize=8, color="0.35")  # fmt: skip
        axes.set_ylim(0, max(axes.get_ylim()[1], 30))
