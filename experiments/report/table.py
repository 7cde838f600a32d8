"""Print the result of a run of experiments.cifar10 as a table."""

from experiments.cifar10 import unusual
from experiments.report.figures import describe


def format_table(run):
    """Return the table, one row a line, of a finished run; bytes, entries and the hook's seconds are means over workers and steps."""
    options, result, total = run.options, run.result, run.result["statistics"]
    each = {name: value / (result["workers"] * result["step"]) for name, value in total.items()}
    others = [f"{name.replace('_', ' ')} {value}" for name, value in unusual(options).items() if options["method"] != "dense"]
    rows = {
        "data": run.data,
        "method": ", ".join([describe(run.configuration), *others]),
        "job": f"{result['workers']} workers x {options['batch_size']} images, {result['step']} steps, seed {run.seed}",
        "test accuracy": f"{result['accuracy']:.2%} of {result['test_images']:,} images",
        "training loss, last steps": f"{result['training_loss']:.4f}",
        "bytes sent per worker and step": f"{each['bytes_sent']:,.0f}",
        "dense ring all-reduce would send": f"{each['bytes_dense']:,.0f}",
        "bytes sent against dense": f"{each['bytes_sent'] / each['bytes_dense']:.3%}" if each["bytes_dense"] else "not applicable: one worker, or one host",
    }
    if options["method"] != "dense":
        step_seconds = result["training_seconds"] / result["step"]
        rows |= {
            "entries sent per worker and step": f"{each['sent_entries']:,.0f} of {each['entries']:,.0f}",
            "share of the step spent in the hook": f"{(each['compress_seconds'] + each['aggregate_seconds']) / step_seconds:.1%}",
            "share of the step waiting for payloads": f"{each['exchange_seconds'] / step_seconds:.1%}",
            "entries sent twice running": f"{total['repeated'] / total['sent_entries']:.2%} of those sent",
            "entries displaced": f"{total['displaced'] / total['sent_entries']:.3%} of those sent",
        }
    rows["median step"] = f"{result['median_step_seconds']:.3f} s"
    if "dense_step_seconds" in result:
        dense = result["dense_step_seconds"]
        rows["median step of a dense all-reduce"] = f"{dense:.3f} s, {dense / result['median_step_seconds']:.2f} times this one's"
    rows["training time without tests"] = f"{result['training_seconds']:.1f} s"
    rows["replicas identical, bit for bit"] = "yes"  # or there is no result
    return "\n".join(f"{label:<38}  {value}" for label, value in rows.items())
