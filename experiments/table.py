"""Print the result of a run as a table, drawn from its log alone."""

from experiments.record import read_log


def format_bytes(count):
    """Return a number of bytes in the decimal unit that fits, MB = 1e6 bytes."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count:.4g} B"


def make_rows(header, result):
    """Return the table's (label, value) pairs; counts, bytes and seconds of the hook are means over the workers."""
    options, ranks = header["options"], result["statistics"]
    workers, steps = len(ranks), options["steps"]

    def mean(key):
        return sum(statistics[key] for statistics in ranks) / workers

    sent, dense = mean("bytes_sent") / steps, mean("bytes_dense") / steps
    method = options["method"]
    if method != "dense":
        method += f", density {options['density']:g}"
    if method.startswith("regtopk"):
        method += f", mu {options['mu']:g}, distortion {options['distortion']}"
    rows = [
        ("data", header["data"]),
        ("method", method),
        ("job", f"{workers} workers x {options['batch_size']} images, {steps} steps, seed {header['seed']}"),
        ("test accuracy", f"{result['accuracy']:.2%} of {result['test_images']:,} images"),
        ("training loss, last steps", f"{result['training_loss']:.4f}"),
        ("bytes sent per worker and step", format_bytes(sent)),
        ("dense ring all-reduce would send", format_bytes(dense)),
        ("bytes sent against dense", f"{sent / dense:.3%}" if dense else "not applicable, one worker"),
    ]
    labels = (
        "entries sent per worker and step",
        "share of the step spent in the hook",
        "share of the step waiting for payloads",
        "entries sent twice running",
        "entries displaced",
    )
    values = ["not applicable"] * len(labels)
    if options["method"] != "dense":
        seconds, entries = result["training_seconds"], mean("sent_entries")
        values = [
            f"{entries / steps:,.0f} of {mean('entries') / steps:,.0f}",
            f"{(mean('compress_seconds') + mean('aggregate_seconds')) / seconds:.1%}",
            f"{mean('exchange_seconds') / seconds:.1%}",
            f"{mean('repeated') / entries:.2%} of those sent",
            f"{mean('displaced') / entries:.3%} of those sent",
        ]
    rows += zip(labels, values)
    rows += [
        ("median step", f"{result['median_step_seconds']:.3f} s"),
        ("training time without tests", f"{result['training_seconds']:.1f} s"),
        ("replicas identical, bit for bit", "yes" if result["replicas_identical"] else "no"),
    ]
    return rows


def format_table(path):
    """Return the table, one row a line, of the log or run folder `path`; raise ValueError for an unfinished run."""
    header, records = read_log(path)
    results = [record for record in records if record["event"] == "result"]
    if not results:
        raise ValueError(f"format_table: expected a finished run in {path}, got a log without a result")
    rows = make_rows(header, results[-1])
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)
