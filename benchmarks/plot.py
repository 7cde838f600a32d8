"""Draw a log of benchmarks.ops from the log alone: python -m benchmarks.plot FILE.jsonl FIGURE.png."""

from runlog.command import make_parser
from runlog.record import read_log

COLOURS = {
    "floor": "black",
    "topk": "tab:blue",
    "regtopk": "tab:green",
    "topk, 8 payloads": "tab:cyan",
    "torch.topk": "tab:orange",
    "chain": "tab:red",
}


def draw(log, figure_path):
    """Write one panel per variant, size, dtype and input: time over the floor of the same round, against density.

    Marks are medians and bars reach from quartile to quartile. Returns `figure_path`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    header, records = read_log(log)
    panels = {}
    for row in records:
        key = (row["variant"] if row["device"] == "cpu" else row["device"], row["size"], row["dtype"], row["input"])
        panels.setdefault(key, {}).setdefault(row["candidate"], []).append(row)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.8 * lines), layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, ((variant, size, dtype, name), candidates) in zip(axes.flat, panels.items()):
        for candidate, rows in candidates.items():
            rows.sort(key=lambda row: row["density"])
            medians = [row["to_floor"]["median"] for row in rows]
            quartiles = [row["to_floor"]["quartiles"] for row in rows]
            bars = [[median - low for median, (low, _) in zip(medians, quartiles)], [high - median for median, (_, high) in zip(medians, quartiles)]]
            densities = [row["density"] for row in rows]
            axis.errorbar(densities, medians, yerr=bars, color=COLOURS[candidate], marker="o", markersize=4, capsize=2, label=candidate)
        axis.set(xscale="log", yscale="log", xlabel="density", ylabel="time / floor")
        axis.set_title(f"{size:,} x {dtype}, {name}, {variant}", fontsize=9)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    commit = (header["commit"] or "no commit")[:10] + (" (dirty)" if header["dirty"] else "")
    figure.suptitle(f"torch {header['torch']}, {header['threads']} threads, {header['processor']['model']}, {commit}", fontsize=9)
    figure.savefig(figure_path, dpi=130)
    return figure_path


if __name__ == "__main__":
    parser = make_parser("benchmarks.plot", __doc__, "FILE.jsonl FIGURE")
    parser.add_argument("log", metavar="FILE.jsonl")
    parser.add_argument("figure", metavar="FIGURE", help="an image in the format that its suffix names")
    arguments = parser.parse_args()
    print(draw(arguments.log, arguments.figure))
