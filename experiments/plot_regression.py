"""Draw the toy logistic regression and the linear regression from their logs."""

from experiments.evidence import regression_rows, select, toy_rows
from experiments.figure_style import COLOURS, NAMES, band, bars, new_figure, save

GAP = "log10 of the squared gap to the minimiser"
MU = 4.0  # the authors' for the linear regression
# Colour, name and what selects the rows of each line.
LINES = (
    ("dense", NAMES["dense"], {"method": "dense"}),
    ("genie", NAMES["genie"], {"method": "genie"}),
    ("topk", NAMES["topk"], {"method": "topk"}),
    ("regtopk", f"RegTop-k, mu {MU:g}", {"method": "regtopk", "mu": MU, "distortion": "previous"}),
    ("current", f"RegTop-k as printed (current), mu {MU:g}", {"method": "regtopk", "mu": MU, "distortion": "current"}),
)
# The problems that the figures tell apart, as settings of a sweep.
PROBLEMS = (
    ("heterogeneous workers, fp64", {"homogeneous": False, "dtype": "float64"}),
    ("homogeneous workers, fp64", {"homogeneous": True, "dtype": "float64"}),
    ("heterogeneous workers, fp32", {"homogeneous": False, "dtype": "float32"}),
)


def draw_toy(results):
    """Return the figure of the toy's losses, None without its log."""
    rows = toy_rows(results)
    if not rows:
        return None
    figure, (axes,) = new_figure(1, size=(6.6, 4.2))
    for colour, _, wanted in LINES:
        wanted = {key: value for key, value in wanted.items() if key != "mu"}
        for row in select(rows, **wanted):
            label = NAMES[row["method"]].replace("-k", "-1")
            if row["method"] == "regtopk":
                label += f", mu {row['mu']:g}" + (", as printed (current)" if row["distortion"] == "current" else "")
            line = "--" if row["method"] == "dense" else "-"
            axes.plot(row["losses"], line, color=COLOURS[colour], label=label, linewidth=1.6, zorder=3 if line == "--" else 2)
    axes.set(xlabel="step (updates of the weights)", ylabel="training loss (nats)", ylim=(0, None), xlim=(0, None))
    axes.set_title("Logistic regression, 2 workers, learning rate 0.9, fp64")
    axes.legend(loc="center right")
    return figure


def _finished(rows):
    return [row for row in rows if row["log10_gap"] is not None]


def draw_gap_curves(results, densities=(0.4, 0.5, 0.6)):
    """Return the paper's Fig. 2, gap against step with a band over seeds; None without rows."""
    rows = select(_finished(regression_rows(results)), **PROBLEMS[0][1])
    if not rows:
        return None
    figure, panels = new_figure(len(densities), size=(13.5, 4.6))
    for axes, density in zip(panels, densities):
        for colour, label, wanted in LINES:
            found = select(rows, **wanted, density=None if wanted["method"] == "dense" else density)
            curves = [[point for point in row["curve"] if point[1] is not None] for row in found]
            if not curves:
                continue
            steps = [step for step, _ in curves[0]]
            style = {"linestyle": "--"} if colour in ("dense", "genie") else {}
            band(axes, steps, [[gap for _, gap in curve] for curve in curves], color=COLOURS[colour], label=label, **style)
        axes.set(xlabel="step (updates of the weights)", ylabel=GAP, title=f"density {density:g}")
        axes.set_xlim(left=0)
    lines = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    panels[0].legend(lines.values(), lines.keys(), fontsize=8, loc="center right", bbox_to_anchor=(1, 0.68))
    seeds = sorted({row["seed"] for row in rows})
    figure.suptitle(f"Linear regression, 20 heterogeneous workers, fp64: mean and range over {len(seeds)} seeds")
    return figure


def draw_gap_by_density(results):
    """Return the final gap against density, one panel per problem; None without rows."""
    rows = _finished(regression_rows(results))
    problems = [(title, select(rows, **settings)) for title, settings in PROBLEMS if select(rows, **settings)]
    if not problems:
        return None
    figure, panels = new_figure(len(problems), size=(4.4 * len(problems) + 1, 4.6))
    for axes, (title, found) in zip(panels, problems):
        densities = sorted({row["density"] for row in found if row["density"] is not None})
        for colour, label, wanted in LINES:
            own = select(found, **wanted)
            if not own:
                continue
            if wanted["method"] == "dense":
                axes.axhline(sum(row["log10_gap"] for row in own) / len(own), color=COLOURS[colour], linestyle="--", label=label)
                continue
            along = [density for density in densities if select(own, density=density)]
            groups = [[row["log10_gap"] for row in select(own, density=density)] for density in along]
            bars(axes, along, groups, color=COLOURS[colour], label=label, linestyle="--" if colour == "genie" else "-")
        axes.set(xlabel="density (share of the entries that each worker sends)", ylabel=GAP, title=title, xticks=densities)
        axes.margins(x=0.12)
    low = min(axes.get_ylim()[0] for axes in panels)
    for axes in panels:
        axes.set_ylim(low, 2)
    lines = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    panels[-1].legend(lines.values(), lines.keys(), fontsize=8, loc="center right", bbox_to_anchor=(1, 0.35))
    figure.suptitle(f"Linear regression after {found[0]['steps']} steps: mean and range over seeds")
    return figure


def draw_gap_by_mu(results):
    """Return the final gap against mu, one panel per density at which mu was varied; None without such rows."""
    rows = select(_finished(regression_rows(results)), **PROBLEMS[0][1])
    densities = [
        density for density in sorted({row["density"] for row in rows if row["density"] is not None})
        if len({row["mu"] for row in select(rows, density=density, method="regtopk")}) > 2
    ]  # fmt: skip
    if not densities:
        return None
    figure, panels = new_figure(len(densities), size=(5.2 * len(densities) + 2, 4.4))
    for axes, density in zip(panels, densities):
        here = select(rows, density=density)
        for colour, label, distortion in (("regtopk", "RegTop-k", "previous"), ("current", "RegTop-k as printed (current)", "current")):
            own = select(here, method="regtopk", distortion=distortion)
            along = sorted({row["mu"] for row in own})
            if along:
                bars(axes, along, [[row["log10_gap"] for row in select(own, mu=mu)] for mu in along], color=COLOURS[colour], label=label)
        topk = [row["log10_gap"] for row in select(here, method="topk")]
        if topk:
            axes.axhline(sum(topk) / len(topk), color=COLOURS["topk"], label="Top-k")
            axes.axhspan(min(topk), max(topk), color=COLOURS["topk"], alpha=0.18, linewidth=0)
        axes.set(xscale="log", xlabel="mu (no unit)", ylabel=GAP, title=f"density {density:g}")
    panels[-1].legend(fontsize=8)
    figure.suptitle("Linear regression, 20 heterogeneous workers, fp64: mean and range over seeds")
    return figure


FIGURES = {
    "toy_logistic": draw_toy,
    "linear_regression_curves": draw_gap_curves,
    "linear_regression_density": draw_gap_by_density,
    "linear_regression_mu": draw_gap_by_mu,
}


def draw_all(results, folder, suffixes):
    """Draw each figure whose logs there are into `folder`, once per suffix; return the paths."""
    paths = []
    for name, draw in FIGURES.items():
        figure = draw(results)
        if figure is not None:
            new = [folder / f"{name}{suffix}" for suffix in suffixes]
            save(figure, *new)
            paths += new
    return paths
