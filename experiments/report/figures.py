"""Draw figures from logs alone, as SVG; the same logs give the same files: no date, no random identifiers."""

from functools import partial
from statistics import fmean

from experiments.report.claims import HETEROGENEOUS, MU, PROBLEMS, at_best_rate, by_sweep, language_sweeps, variants_of_each
from experiments.report.logs import at_common_seeds, select
from experiments.sweeps import RUN_KEYS

COLOURS = {"dense": "black", "genie": "tab:green", "topk": "tab:red", "regtopk": "tab:blue", "current": "tab:orange"}
NAMES = {"dense": "dense", "genie": "Top-k of the true aggregate", "topk": "Top-k", "regtopk": "RegTop-k"}
STYLES = {"dense": ":", "genie": "--", "topk": "--", "regtopk": "-"}
OPTIONS = {"density": "density (share of the entries that each worker sends)", "mu": "mu (no unit)"}
GAP = "log10 of the squared gap to the minimiser"
REGRESSION = "Linear regression, 20 workers, 2,500 steps: mean and range over seeds"


def new_figure(columns, title, size):
    """Return (figure, axes side by side); size in inches."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"svg.hashsalt": "regtopk_torch", "svg.fonttype": "none", "axes.grid": True, "grid.alpha": 0.3})
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def save(figure, path):
    """Write the figure to `path`, an SVG, and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    return path


def describe(configuration):
    """Return a label such as "RegTop-k, density 0.001, mu 5"."""
    method, density, mu, distortion = configuration
    parts = [f"{name} {value:g}" for name, value in (("density", density), ("mu", mu)) if value is not None]
    return ", ".join([NAMES[method], *parts, *(["as printed (current)"] if distortion == "current" else [])])


def by_configuration(runs):
    """Yield (configuration, its runs, style of its line); lines of one method grow paler from the first to the last."""
    found = {run.configuration: [] for run in runs}
    for run in runs:
        found[run.configuration].append(run)
    for configuration, own in found.items():
        method = "current" if configuration[3] == "current" else configuration[0]
        alike = [other for other in found if (other[0], other[3]) == (configuration[0], configuration[3])]
        pale = 1 - 0.7 * alike.index(configuration) / len(alike)
        yield configuration, own, {"color": COLOURS[method], "linestyle": STYLES[configuration[0]], "linewidth": 1.6, "alpha": pale}


def band(axes, along, series, **style):
    """Draw the mean of `series` (lists as long as `along`) as a line, and from least to greatest a band."""
    columns = list(zip(*series))
    axes.plot(along, list(map(fmean, columns)), **style)
    if len(series) > 1:
        axes.fill_between(along, list(map(min, columns)), list(map(max, columns)), color=style["color"], alpha=0.18, linewidth=0)


def draw_curves(axes, runs):
    """Draw each configuration's gap or loss against the step."""
    for configuration, own, style in by_configuration(runs):
        curves = [run.result.get("curve") or list(enumerate(run.result["losses"])) for run in own]
        curves = [[point for point in curve if point[1] is not None] for curve in curves]
        band(axes, [step for step, _ in curves[0]], [[value for _, value in curve] for curve in curves], label=describe(configuration), **style)
    axes.set(xlabel="step (updates of the weights)")
    axes.legend(fontsize=7, loc="lower left" if "curve" in runs[0].result else "center right")


def draw_against(option, name, axes, runs):
    """Draw the value `name` against an option: mean, and a bar from least to greatest; across the panel for runs without it."""
    place, lines = RUN_KEYS.index(option), {}
    for configuration, own, style in by_configuration(runs):
        rest = (*configuration[:place], None, *configuration[place + 1 :])
        lines.setdefault(rest, ({}, {**style, "alpha": 1}))[0][configuration[place]] = [run.value(name) for run in own]
    for rest, (groups, style) in lines.items():
        along = sorted(groups, key=lambda x: x or 0)
        means, least, greatest = zip(*((fmean(groups[x]), min(groups[x]), max(groups[x])) for x in along))
        if None in groups:
            axes.axhline(means[0], label=describe(rest), **style)
            axes.axhspan(least[0], greatest[0], color=style["color"], alpha=0.12, linewidth=0)
        else:
            axes.plot(along, means, label=describe(rest), marker="o", markersize=4, **style)
            axes.vlines(along, least, greatest, color=style["color"], linewidth=4 if rest[0] == "topk" else 1.6, alpha=0.5)
    axes.set(xlabel=OPTIONS[option])
    axes.legend(fontsize=7)
    numbers = [x for groups, _ in lines.values() for x in groups if x is not None]
    if max(numbers) >= 10 * min(numbers):
        scale_logarithmically(axes)


def draw_panels(title, panels):
    """Return a figure of panels side by side, each of (title, what its vertical axis shows, runs, draw(axes, runs))."""
    figure, all_axes = new_figure(len(panels), title, size=(4.8 * len(panels) + 1, 4.6))
    for axes, (name, ylabel, runs, draw) in zip(all_axes, panels):
        draw(axes, runs)
        axes.set(title=name, ylabel=ylabel)
    return figure


def scale_logarithmically(axes):
    """Give the horizontal axis a logarithmic scale with readable numbers, however narrow or wide its range."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 300 * low else (1.0,)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def smooth(values, reach=2):
    """Return the means of each value and as many neighbours on either side, up to `reach`: no lag, no kink at the ends."""
    reaches = [min(reach, index, len(values) - 1 - index) for index in range(len(values))]
    return [sum(values[index - r : index + r + 1]) / (2 * r + 1) for index, r in enumerate(reaches)]


def draw_runs(runs):
    """Return the figure of training runs: loss and accuracy against steps, accuracy against bytes, what was sent twice or displaced."""
    options = runs[0].options
    part = {"iid": "", "labels": ", images sorted by label", "dirichlet": f", Dirichlet {options['concentration']:g}"}[options["partition"]]
    title = f"{options['model']} on {runs[0].data}, {options['workers']} workers x {options['batch_size']} images{part}"
    figure, (loss_axes, step_axes, byte_axes, share_axes) = new_figure(4, f"{title}: mean and range over seeds", size=(17, 4.4))
    for configuration, own, style in by_configuration(runs):
        band(loss_axes, [step for step, _ in own[0].losses], [smooth([loss for _, loss in run.losses]) for run in own], **style)
        steps = sorted(set.intersection(*({test["step"] for test in run.tests} for run in own)))
        tests = [[test for test in run.tests if test["step"] in steps] for run in own]
        accuracy = [[100 * test["accuracy"] for test in some] for some in tests]
        band(step_axes, steps, accuracy, label=f"{describe(configuration)} (n = {len(own)})", **style)
        sent = [fmean(test["bytes_sent"] for test in column) / 1e6 for column in zip(*tests)]
        band(byte_axes, sent[1:], [some[1:] for some in accuracy], **style)
        for name, width in {"topk": [("repeated", 1.6)], "regtopk": [("repeated", 1.6), ("displaced", 0.8)]}.get(configuration[0], []):
            shares = [[100 * test[name] / test["sent_entries"] for test in some[1:]] for some in tests]
            band(share_axes, steps[1:], shares, **{**style, "linewidth": width})
    unit = runs[0].length.split()[1].removesuffix("s")
    images = sorted({test["images"] for run in runs for test in run.tests})
    ylabel = f"test accuracy (%), {f'first {images[0]:,}, at the end ' if len(images) > 1 else ''}all {images[-1]:,} images"
    loss_axes.set(xlabel=unit, ylabel="training loss of all workers (nats)")
    step_axes.set(xlabel=unit, ylabel=ylabel)
    byte_axes.set(xlabel="sent per worker (MB, 1e6 bytes)", ylabel=ylabel)
    share_axes.set(xlabel=unit, ylabel="of the entries sent so far (%)", title="thick: sent twice running; thin: displaced")
    step_axes.legend(fontsize=7, loc="lower right")
    if byte_axes.dataLim.xmin > 0:  # one worker sends nothing
        scale_logarithmically(byte_axes)
    return figure


def draw_bytes(runs):
    """Return the figure of training runs with accuracy against bytes alone, for a narrow page."""
    figure = draw_runs(runs)
    loss_axes, step_axes, byte_axes, share_axes = figure.axes
    figure.legend(*step_axes.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3)
    loss_axes.remove(), step_axes.remove(), share_axes.remove()
    byte_axes.set_subplotspec(figure.add_gridspec(1, 1)[0])
    figure.set_size_inches(7, 4.2)
    return figure


def draw_by_option(runs, option):
    """Return accuracy after the last step, and what was displaced, against an option; drawn are the seeds that all have."""
    groups = at_common_seeds([own for _, own, _ in by_configuration(runs)])
    runs = [run for own in groups for run in own]
    title = f"{runs[0].options['model']} on {runs[0].data}, {runs[0].length}: mean and range over n = {len(groups[0])} seeds"
    accuracy = ("", "test accuracy on all images (%)", runs, partial(draw_against, option, "accuracy"))
    displaced = ("", "displaced, of what was sent (%)", select(runs, method="regtopk"), partial(draw_against, option, "displaced"))
    return draw_panels(title, [accuracy, displaced])


def draw_gains(option, by, axes, runs):
    """Draw what every value of an option but the first adds to the accuracy of that one, a point per seed, in colours `by` another."""
    _, *places = dict.fromkeys(run.options[option] for run in runs)  # of all groups, which need not have the same ones
    for number, (group, of_group) in enumerate(variants_of_each(runs, by)):
        usual, *others = variants_of_each(of_group, option)
        for name, own in others:
            pairs = zip(*at_common_seeds([own, usual[1]]), strict=True)
            gains = [run.value("accuracy") - before.value("accuracy") for run, before in pairs]
            colour = ("tab:red", "tab:blue", "tab:green")[number]
            axes.plot([places.index(name) + 0.2 * (number - 1)] * len(gains), gains, "o", color=colour, markersize=3, label=None if name != others[0][0] else group)
    axes.set_xticks(range(len(places)), places)
    axes.axhline(0, color="black", linewidth=0.8)
    if max(map(abs, axes.get_ylim())) > 1:
        axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize=7)


def draw_language(runs):
    """Return the figure of the language model's validation loss against steps and bytes, each row at its best learning rate."""
    from matplotlib import colormaps

    settings = runs[0].options
    title = f"A GPT of {settings['size']} parameters, {settings['workers']} workers x {settings['batch_size']} windows, {settings['steps']:,} steps"
    figure, (step_axes, byte_axes) = new_figure(2, title, size=(12, 4.6))
    for number, (row, own) in enumerate(at_best_rate(runs).items()):
        style = {"color": "black", "linestyle": ":"} if row == "dense" else {"color": colormaps["tab20"](number)}
        steps, curves = [step for step, _ in own[0].value("losses")], [[loss for _, loss in run.value("losses")] for run in own]
        band(step_axes, steps, curves, label=f"{row} (n = {len(own)})", **style)
        band(byte_axes, [step * own[0].value("bytes_per_step") / 1e6 for step in steps], curves, **style)
    step_axes.set(xlabel="step of each worker", ylabel="validation loss (nats per byte)")
    byte_axes.set(xlabel="sent per worker (MB, 1e6 bytes)")
    scale_logarithmically(byte_axes)
    step_axes.legend(fontsize=7, ncols=2)
    return figure


def make_figures(evidence):
    """Yield (name, figure) of all that there are logs for."""
    if evidence.toy:
        panels = [("", "training loss (nats)", evidence.toy, draw_curves)]
        yield "toy_logistic", draw_panels("Logistic regression, 2 workers, k = 1, learning rate 0.9, fp64", panels)
    usual = [run for run in evidence.regression if run.options["mu"] in (None, MU)]
    varied = [run for run in evidence.regression if run.options["method"] in ("topk", "regtopk")]

    def at(runs, densities, draw):
        runs = select(runs, **HETEROGENEOUS)
        return [(f"density {density:g}", GAP, [run for run in runs if run.options["density"] in (density, None)], draw) for density in densities]

    if usual:
        by_density, by_mu = (partial(draw_against, option, "log10_gap") for option in OPTIONS)
        yield "linear_regression_curves", draw_panels(REGRESSION, at(usual, (0.4, 0.5, 0.6), draw_curves))
        panels = [(name, GAP, select(usual, **settings), by_density) for name, settings in zip(("heterogeneous, fp64", "homogeneous, fp64", "heterogeneous, fp32"), PROBLEMS)]
        yield "linear_regression_density", draw_panels(REGRESSION, panels)
        yield "linear_regression_mu", draw_panels(REGRESSION, at(varied, (0.5, 0.6), by_mu))
    if evidence.endings:
        models = dict.fromkeys(run.options["model"] for run in evidence.endings)
        panels = [(model, "points more than nothing (test accuracy)", select(evidence.endings, model=model), partial(draw_gains, "ending", "optimizer")) for model in models]
        yield "end_of_training", draw_panels("What to do at the end of training, every seed", panels)
    if evidence.equal_bytes:
        sweeps = {}
        for (stem, _), runs in by_sweep(evidence).items():
            sweeps.setdefault(stem, []).extend(runs)
        panels = [(f"{stem}; colours: density", "points more than fixed (test accuracy)", runs, partial(draw_gains, "rule", "density")) for stem, runs in sweeps.items()]
        yield "equal_bytes", draw_panels("Ways to spend equal bytes, every seed", panels)
    for sweep, runs in language_sweeps(evidence).items():
        yield f"language_model_{sweep}", draw_language(runs)
    for group, runs in evidence.cifar10.items():
        yield f"cifar10_{group}", draw_runs(runs)
        if group == "density-0.001":  # the figure in README.md
            yield f"cifar10_{group}_bytes", draw_bytes(runs)
        for option in OPTIONS:
            if len({run.options[option] for run in runs} - {None}) > 1:
                yield f"cifar10_{group}_by_{option}", draw_by_option(runs, option)
