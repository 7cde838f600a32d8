"""Make and save figures so that the same logs give the same files: no date, no random identifiers."""

from pathlib import Path

COLOURS = {"dense": "black", "genie": "tab:green", "topk": "tab:red", "regtopk": "tab:blue", "current": "tab:orange"}
NAMES = {"dense": "dense", "genie": "Top-k of the true aggregate", "topk": "Top-k", "regtopk": "RegTop-k"}


def new_figure(columns, size):
    """Return (figure, list of axes side by side); size in inches."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "regtopk_torch"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    for panel in axes[0]:
        panel.grid(alpha=0.3)
    return figure, list(axes[0])


def save(figure, *paths):
    """Write the figure into each of `paths`, in the format that its suffix names, and close it."""
    import matplotlib.pyplot as plt

    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def band(axes, along, series, **style):
    """Draw the mean of `series` (lists as long as `along`) as a line, and from least to greatest a band."""
    columns = list(zip(*series))
    axes.plot(along, [sum(column) / len(column) for column in columns], **style)
    if len(series) > 1:
        axes.fill_between(along, list(map(min, columns)), list(map(max, columns)), color=style["color"], alpha=0.18, linewidth=0)


def bars(axes, along, groups, **style):
    """Draw per value of `along` the mean of its group of values, and a bar from least to greatest."""
    means = [sum(group) / len(group) for group in groups]
    below = [mean - min(group) for mean, group in zip(means, groups)]
    above = [max(group) - mean for mean, group in zip(means, groups)]
    axes.errorbar(along, means, yerr=[below, above], capsize=3, marker="o", markersize=4, **style)
