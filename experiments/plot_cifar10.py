"""Draw the runs of experiments.cifar10_workers from their logs, one figure per group, and one more where options vary."""

from experiments.evidence import by_configuration, cifar10_runs
from experiments.figure_style import COLOURS, NAMES, band, bars, new_figure, save

VARIED = {"density": 1, "mu": 2}  # place in a configuration; a figure against it is drawn from two values on
LINE_STYLES = {"dense": ":", "topk": "--", "regtopk": "-"}
BESIDE = {"topk": 0.96, "regtopk": 1.04}  # bars of equal height would hide each other
CHANCE = 10  # percent


def describe(configuration, varied=("density", "mu")):
    """Return a label such as "RegTop-k, density 0.001, mu 5"."""
    method, density, mu, distortion = configuration
    parts = [NAMES[method]]
    if density is not None and "density" in varied:
        parts.append(f"density {density:g}")
    if mu is not None and "mu" in varied:
        parts.append(f"mu {mu:g}")
    if distortion == "current":
        parts.append("current")
    return ", ".join(parts)


def describe_job(options):
    """Return what all runs of a group share, such as "resnet18 on CIFAR-10, 8 workers x 20 images"."""
    text = f"{options['model']}, {options['workers']} workers x {options['batch_size']} images, learning rate {options['learning_rate']:g}"
    if options["partition"] != "iid":
        text += {"labels": ", images sorted by label", "dirichlet": f", Dirichlet {options['concentration']:g}"}[options["partition"]]
    return text + (f", {options['local_steps']} local steps a round" if options["local_steps"] > 1 else "")


def choose_colours(configurations):
    """Return {configuration: colour}: by method, or by density or mu where one of them varies."""
    import matplotlib

    values = sorted({(c[1], c[2] if c[0] == "regtopk" else None) for c in configurations if c[1] is not None}, key=str)
    place = 1 if len({density for density, _ in values}) > 1 else 2
    levels = sorted({c[place] for c in configurations if c[place] is not None})
    if len(levels) < 2:
        return {c: COLOURS["current" if c[3] == "current" else c[0]] for c in configurations}
    shades = dict(zip(levels, matplotlib.colormaps["viridis"]([0.9 * i / (len(levels) - 1) for i in range(len(levels))])))
    return {c: shades[c[place]] if c[place] is not None else COLOURS[c[0]] for c in configurations}


def draw_group(runs):
    """Return the group's figure: test accuracy against steps and against bytes, and what was sent twice or displaced."""
    configurations = by_configuration(runs)
    colours = choose_colours(configurations)
    figure, (step_axes, byte_axes, share_axes) = new_figure(3, size=(14.5, 4.6))
    for configuration, seeds in configurations.items():
        runs_here = list(seeds.values())
        style = {"color": colours[configuration], "linestyle": LINE_STYLES[configuration[0]], "linewidth": 1.6}
        style["label"] = f"{describe(configuration)} (n = {len(runs_here)})"
        common = set.intersection(*({test["step"] for test in run.tests} for run in runs_here))
        tests = [[test for test in run.tests if test["step"] in common] for run in runs_here]
        accuracy = [[100 * test["accuracy"] for test in some] for some in tests]
        band(step_axes, sorted(common), accuracy, **style)
        sent = [sum(test["bytes_sent"] for test in column) / len(column) / 1e6 for column in zip(*tests)]
        band(byte_axes, sent[1:], [some[1:] for some in accuracy], **style)
        if configuration[0] == "dense":
            continue
        for name, width in (("repeated", 1.6), ("displaced", 0.8)):
            shares = [[100 * test[name] / test["sent_entries"] for test in some[1:]] for some in tests]
            if name == "repeated" or configuration[0] == "regtopk":
                label = f"{describe(configuration)}: {'sent twice running' if name == 'repeated' else 'displaced'}"
                band(share_axes, sorted(common)[1:], shares, **{**style, "label": label, "linewidth": width})
    rounds = "round" if runs[0].options["local_steps"] > 1 else "step"
    for axes, label in ((step_axes, rounds), (byte_axes, "sent per worker (MB, 1e6 bytes)")):
        axes.set(xlabel=label, ylabel="test accuracy (%), all test images", ylim=(0, None))
        axes.axhline(CHANCE, color="0.5", linewidth=1, linestyle=":")
        axes.annotate("chance", (0.01, CHANCE), xycoords=("axes fraction", "data"), xytext=(0, -3),
                      textcoords="offset points", va="top", fontsize=8, color="0.35")  # fmt: skip
    step_axes.set_xlim(left=0)
    logarithmic(byte_axes)
    share_axes.set(xlabel=rounds, ylabel="share of the entries sent so far (%)", ylim=(0, None), xlim=(0, None))
    share_axes.set_title("thick: sent twice running; thin: displaced", fontsize=9)
    step_axes.legend(fontsize=7, loc="best")
    figure.suptitle(f"{runs[0].header['data']}, {describe_job(runs[0].options)}: mean and range over seeds")
    return figure


def logarithmic(axes):
    """Give the horizontal axis of what is drawn a logarithmic scale with readable numbers, however narrow or wide its range."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_by_option(runs, option):
    """Return accuracy after the last step, and what was displaced, against `option`, "density" or "mu".

    Drawn are the seeds that all configurations have: means over other seeds would differ for that alone.
    """
    configurations, place = by_configuration(runs), VARIED[option]
    common = set.intersection(*map(set, configurations.values()))
    if common:
        configurations = {c: {seed: seeds[seed] for seed in sorted(common)} for c, seeds in configurations.items()}
    figure, (accuracy_axes, share_axes) = new_figure(2, size=(10.5, 4.4))
    for method in ("topk", "regtopk"):
        lines = {}  # other options -> value -> runs
        for configuration, seeds in configurations.items():
            if configuration[0] == method and configuration[place] is not None:
                rest = (*configuration[:place], None, *configuration[place + 1 :])
                lines.setdefault(rest, {})[configuration[place]] = list(seeds.values())
        for rest, values in lines.items():
            style = {"color": COLOURS[method], "label": describe(rest), "linestyle": LINE_STYLES[method]}
            along = [value * BESIDE[method] for value in values]
            bars(accuracy_axes, along, [[100 * run.result["accuracy"] for run in group] for group in values.values()], **style)
            name = "repeated" if method == "topk" else "displaced"
            shares = [[100 * run.share(name) for run in group] for group in values.values()]
            style["label"] += ": sent twice running" if method == "topk" else ": displaced"
            bars(share_axes, along, shares, **style)
    for method, style in (("dense", ":"), ("topk", "--")):
        for configuration, seeds in configurations.items():
            if configuration[0] == method and configuration[place] is None:
                values = [100 * run.result["accuracy"] for run in seeds.values()]
                accuracy_axes.axhline(sum(values) / len(values), color=COLOURS[method], linestyle=style, label=describe(configuration))
                accuracy_axes.axhspan(min(values), max(values), color=COLOURS[method], alpha=0.12, linewidth=0)
    unit = "density (share of the entries that each worker sends)" if option == "density" else "mu (no unit)"
    accuracy_axes.set(xlabel=unit, ylabel="test accuracy (%), all test images")
    share_axes.set(xlabel=unit, ylabel="share of the entries sent (%)")
    logarithmic(accuracy_axes)
    logarithmic(share_axes)
    accuracy_axes.legend(fontsize=8)
    share_axes.legend(fontsize=8)
    steps = next(iter(next(iter(configurations.values())).values())).result["step"]
    seeds = "one seed" if len(common) == 1 else f"mean and range over {len(common) or 'different'} seeds"
    figure.suptitle(f"{runs[0].header['data']}, {describe_job(runs[0].options)}, {steps} steps: {seeds}", fontsize=11)
    return figure


def draw_all(results, folder, suffixes):
    """Draw the figures of every group into `folder`, once per suffix; return the paths."""
    paths = []

    def write(name, figure):
        new = [folder / f"{name}{suffix}" for suffix in suffixes]
        save(figure, *new)
        paths.extend(new)

    for group, runs in cifar10_runs(results).items():
        write(f"cifar10_{group}", draw_group(runs))
        for option, place in VARIED.items():
            if len({c[place] for c in by_configuration(runs) if c[place] is not None}) > 1:
                write(f"cifar10_{group}_by_{option}", draw_by_option(runs, option))
    return paths
