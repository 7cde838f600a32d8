"""Which cases of a product are run every time."""

import itertools

import pytest


def in_turn(*lists, all_of_them=False):
    """The product of lists of tuples; every second case is long, unless all are asked for: any two values of two lists still meet."""
    cases = []
    for places in itertools.product(*(range(len(values)) for values in lists)):
        values = [value for of_list, place in zip(lists, places, strict=True) for value in of_list[place]]
        cases.append(pytest.param(*values, marks=[pytest.mark.long] if sum(places) % 2 and not all_of_them else []))
    return cases


def of_one(values):
    return [(value,) for value in values]
