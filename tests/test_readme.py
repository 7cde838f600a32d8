"""What the README says exists: the tests that keep its promises, the files it links to and the folders of its map."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_promise_is_kept_by_a_test_that_exists():
    section = TEXT.split("## What is promised\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"\[(test_\w+)\]\((tests/test_\w+\.py)\)", row)
        assert named, f"expected a test in the row {row!r}"
        for name, path in named:
            assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"expected {name} in {path}"


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_folder_map_is_true():
    folders = re.findall(r"^([a-z_/]+/) {2,}\S", TEXT, re.MULTILINE)
    assert len(folders) >= 7
    assert all((ROOT / folder).is_dir() for folder in folders)
    mapped = {folder.split("/")[0] for folder in folders}
    tracked = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert tracked - {"build", "runs", "data", "results", "regtopk_torch.egg-info", "__pycache__"} <= mapped
