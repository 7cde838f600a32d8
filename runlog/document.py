"""Put text that is made from logs between the marks of a document."""

from pathlib import Path

END = "<!-- end -->"


def replace(document, text, begin):
    """Return `document` with what stands between the mark `begin` and the next END replaced by `text`; ValueError without them."""
    before, found, rest = document.partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"replace: expected the marks {begin!r} and {END!r}, got a document without")
    return f"{before}{begin}\n{text}\n{END}{after}"


def write_command(parser, make, begin, arguments=None):
    """Parse a command that prints the text of make(options) or, with --write DOCUMENT, puts it between that document's marks: `begin`, or
    begin(options), and END."""
    parser.add_argument("--write", type=Path, metavar="DOCUMENT", help="replace what stands between its marks instead of printing")
    options = parser.parse_args(arguments)
    if options.write is None:
        print(make(options))
        return
    begin = begin(options) if callable(begin) else begin
    try:
        options.write.write_text(replace(options.write.read_text(encoding="utf-8"), make(options), begin), encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(f"--write: expected a document with the marks {begin!r} and {END!r}, got {options.write}: {error}")
