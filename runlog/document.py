"""Put text that is made from logs between the marks of a document."""

END = "<!-- end -->"


def replace(document, text, begin):
    """Return `document` with what stands between the mark `begin` and the next END replaced by `text`; ValueError without them."""
    before, found, rest = document.partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"replace: expected the marks {begin!r} and {END!r}, got a document without")
    return f"{before}{begin}\n{text}\n{END}{after}"
