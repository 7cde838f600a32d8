"""The benchmark runs, and the figures in the documents are those of the committed logs."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # benchmarks are not installed

from benchmarks import plot, table  # noqa: E402
from runlog.document import replace  # noqa: E402

DOCUMENTS = {"README.md": ["buckets.jsonl"], "benchmarks/README.md": ["buckets.jsonl", "inputs.jsonl", "dtypes.jsonl", "avx2.jsonl", "scalar.jsonl"]}


def test_a_run_is_recorded_tabled_and_drawn(tmp_path):
    log = tmp_path / "ops.jsonl"
    command = [sys.executable, "-m", "benchmarks.ops", "--sizes", "5e3", "--densities", "0.01", "--seconds-per-case", "0", "--out", str(log)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "topk, 8 payloads" in done.stdout
    lines = table.format_tables([log]).splitlines()
    assert len(lines) == 5  # names, rule, one case, a blank line, the origin
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells[1:5] == ["float32", "5,000", "0.01", "normal"] and cells[-1] == "7" and all(float(cell) > 0 for cell in cells[5:])
    assert Path(plot.draw(log, tmp_path / "ops.png")).stat().st_size > 10_000


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_tables_in_the_documents_are_those_of_the_logs(document):
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    made = table.format_tables([ROOT / "benchmarks/results/ops" / log for log in DOCUMENTS[document]], path.parent)
    assert replace(text, made, table.BEGIN) == text


def test_a_document_without_the_marks_is_an_error():
    with pytest.raises(ValueError, match="expected the marks .* got a document without"):
        replace("no marks here", "text", table.BEGIN)
