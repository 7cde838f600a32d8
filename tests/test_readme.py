"""What the documents say exists: tests that keep promises, files and places that links lead to, words, versions, folders."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {"build", "runs", "data", "results", "regtopk_torch.egg-info", "__pycache__"}
FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in NOT_OURS and not path.name.startswith(".")]
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in folder.rglob("*.md"))])
GLOSSARY = "docs/glossary.md"
PROSE = [name for name in DOCUMENTS if name == "README.md" or name.startswith("docs/") and name != GLOSSARY]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def without_code(text):
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors_of(text):
    """The places of a document that a link can name: its own marks, and its headings as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {*re.findall(r'<a id="([^"]+)">', text), *(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)}


def dead_links(name, text):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists() or anchor and anchor not in anchors_of(text if not path else file.read_text(encoding="utf-8")):
            yield target


def test_all_documents_are_found():
    assert {"README.md", "experiments/README.md", "benchmarks/README.md", GLOSSARY, "docs/promises.md"} <= set(DOCUMENTS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name):
    text = read(name)
    assert list(dead_links(name, text)) == []
    wrong = ["docs/none.md", "#none", f"{os.path.relpath(ROOT / 'README.md', (ROOT / name).parent)}#none"]
    assert list(dead_links(name, text + "".join(f"[a]({target})" for target in wrong))) == wrong


def test_every_document_is_linked_from_the_readme():
    assert {name for name in DOCUMENTS if f"]({name})" not in read("README.md")} == {"README.md"}


def test_every_promise_is_kept_by_a_test_that_exists():
    rows = re.findall(r"^\* .+", read("docs/promises.md"), re.MULTILINE)
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"\[(test_\w+)\]\(\.\./(tests/test_\w+\.py)\)", row)
        assert named, f"expected a test in the line {row!r}"
        for name, path in named:
            assert f"def {name}(" in read(path), f"expected {name} in {path}"


# Words


def glossary_rows():
    """(word, the cell that says where it is in the code, or "") of every row."""
    rows = re.findall(r'^\| <a id="([^"]+)"></a>(\S+) \| [^|]+ \|(?: ([^|]+) \|)?$', read(GLOSSARY), re.MULTILINE)
    assert all(anchor == word.lower() for anchor, word, _ in rows)
    return [(word, place) for _, word, place in rows]


def test_every_word_of_our_own_is_in_the_code():
    ours = [(word, re.findall(r"`(\w+)`", place)) for word, place in glossary_rows() if place]
    assert len(ours) >= 10
    sources = [path for folder in ("csrc", "regtopk_torch") for path in (ROOT / folder).rglob("*") if path.suffix in {".h", ".cpp", ".py"}]
    # Comments, and the language's own word, are no use of a word.
    code = " ".join(re.sub(r"//.*|#.*|\bvoid\b", "", path.read_text(encoding="utf-8")) for path in sources)
    for word, names in ours:
        assert names and all(word in name.lower() and re.search(rf"\b{name}\b", code) for name in names), word


@pytest.mark.parametrize("name", PROSE)
def test_the_first_use_of_a_word_leads_to_the_glossary(name):
    text = re.sub(r"<!--.*?-->|^#.*$|!\[[^]]*\]", "", without_code(read(name)), flags=re.MULTILINE)
    for word, _ in glossary_rows():
        first = re.search(rf"(?<![\w-]){word}s?(?![\w-])", text, re.IGNORECASE)
        link = rf"\*?\[[^]]*\]\([^)]*glossary\.md#{re.escape(word.lower())}\)"
        inside = first and any(at.start() <= first.start() < at.end() for at in re.finditer(link, text))
        assert not first or inside, f"{name}: expected the first {first[0]!r} to be a link to the glossary: {text[max(0, first.start() - 60) : first.end() + 20]!r}"


# Facts that stand elsewhere


def test_the_readme_is_short_and_says_first_what_it_runs_on():
    lines = read("README.md").splitlines()
    assert len(lines) <= 150
    first = " ".join(lines[2:5])
    project = read("pyproject.toml")
    python, torch = re.search(r'requires-python = ">=([\d.]+)"', project)[1], re.search(r'"torch>=([\d.]+)"', project)[1]
    for fact in ("CPU", "gloo", "Linux", f"Python {python} or newer", f"torch {torch} or newer", "**one GPU**"):
        assert fact in first, fact
    assert re.search(r"some \d+ GB", read("Makefile"))[0] in read("README.md")


def test_the_folder_map_is_true():
    folders = re.findall(r"^([a-z_/]+/) {2,}\S", read("README.md"), re.MULTILINE)
    assert len(folders) >= 7
    assert all((ROOT / folder).is_dir() for folder in folders)
    mapped = {folder.split("/")[0] for folder in folders}
    assert {folder.name for folder in FOLDERS} <= mapped
