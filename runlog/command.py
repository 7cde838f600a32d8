"""Make command lines of one shape, `python -m MODULE [options]`, and say in one line which option is out of range."""

import argparse


def make_parser(module, description, positional=""):
    """Return the parser of `python -m MODULE`; `description` is the module's docstring, printed as it is."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", usage=f"%(prog)s {positional}{' ' if positional else ''}[options]",
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip


def check(parser, options, *rules):
    """Exit with a message for the first of `rules`, (name, test of the value, what is expected), that an option breaks.

    None is an option that was not given: it breaks no rule.
    """
    for name, accepted, condition in rules:
        value = getattr(options, name)
        if value is not None and not accepted(value):
            parser.error(f"--{name.replace('_', '-')}: expected {condition}, got {value}")
