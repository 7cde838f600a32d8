"""Checkpoints of arbitrary content: an error that names the file and changes nothing, or a state that fits."""

import copy
import json
import math
import os
import shutil

import torch
from checkpointing import lone_rank, manifest_of, rewrite_file  # noqa: F401  (lone_rank is a fixture)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import same_state

import regtopk_torch as rt

FUZZ_SECONDS = float(os.environ.get("REGTOPK_FUZZ_SECONDS", 0))  # make fuzz: so many, and other content each time
fuzzed = settings(max_examples=150 + int(6 * FUZZ_SECONDS), derandomize=not FUZZ_SECONDS, deadline=None)


def copy_of(directory):
    return shutil.copytree(directory, directory.with_name("fuzzed"), dirs_exist_ok=True)


def load_and_check(state, ddp, directory, path):
    """Load what may not fit."""
    before = state.state_dict(ddp)
    try:
        rt.load(state, ddp, directory)
    except rt.CheckpointError as error:
        # What a manifest says wrongly of a file may show at either.
        assert str(path) in str(error) or str(directory / "regtopk-") in str(error), error
        assert same_state(state.state_dict(ddp), before)
    after = state.state_dict(ddp)
    assert all(entry["residual"].isfinite().all() for entry in after["parameters"].values() if "residual" in entry)
    state.load_state_dict(after, ddp)  # fits itself


@fuzzed
@given(
    of_manifest=st.booleans(),
    keep=st.floats(0, 2),
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=9)), max_size=4),
)
def test_any_other_bytes_are_an_error_that_changes_nothing_or_a_state_that_fits(lone_rank, of_manifest, keep, edits):  # noqa: F811
    ddp, state, _, directory = lone_rank
    directory = copy_of(directory)
    path = directory / ("regtopk.json" if of_manifest else manifest_of(directory)["files"][0]["name"])
    content = path.read_bytes()
    content = content[: int(keep * len(content))] if keep < 1 else content
    for place, replacement in edits:
        position = int(place * len(content))
        content = content[:position] + replacement + content[position + len(replacement) :]
    if of_manifest:
        path.write_bytes(content)
    else:
        rewrite_file(directory, 0, content)
    load_and_check(state, ddp, directory, path)


# Values of other types, shapes and ranges than a checkpoint has, that JSON or torch.load(weights_only=True) can bring.
PLAIN = [None, True, -2, 0, 2**70, 0.5, math.nan, "", "7", [], [1], [[1]], {}, {"shape": [1]}]
TENSORS = [
    lambda like: torch.zeros(()),
    lambda like: torch.zeros(3, 2),
    lambda like: torch.zeros_like(like, dtype=torch.complex64),
    lambda like: like.to(torch.float16),
    lambda like: like.to_sparse(),
    lambda like: torch.empty_like(like, device="meta"),
    lambda like: torch.full_like(like, -1),
    lambda like: torch.full_like(like, 2**40, dtype=torch.float64).to(like.dtype),
    lambda like: torch.full_like(like, math.nan, dtype=torch.float64).to(like.dtype),
    lambda like: like.flatten()[:0],
    lambda like: torch.zeros((), dtype=like.dtype).expand(like.shape),
]


def places(content):
    """Every (container, key) in nested dicts and lists."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from places(value)


def damage(content, data):
    """Put something odd in one to three places, or take them away."""
    for _ in range(data.draw(st.integers(1, 3))):
        found = list(places(content))
        if not found:
            return
        container, key = found[data.draw(st.integers(0, len(found) - 1))]
        value = container[key]
        replacements = [lambda like, plain=plain: copy.deepcopy(plain) for plain in PLAIN]
        if isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta:
            replacements += TENSORS
        choice = data.draw(st.integers(0, len(replacements) + 1))
        if choice < len(replacements):
            container[key] = replacements[choice](value)
        else:
            del container[key]
            if choice > len(replacements) and isinstance(container, dict):
                container[data.draw(st.sampled_from(["other", 3, None]))] = value


@fuzzed
@given(data=st.data())
def test_any_other_state_dict_is_an_error_that_changes_nothing_or_a_state_that_fits(lone_rank, data):  # noqa: F811
    ddp, state, _, directory = lone_rank
    directory = copy_of(directory)
    path = directory / manifest_of(directory)["files"][0]["name"]
    content = torch.load(path, weights_only=True)
    damage(content, data)
    torch.save(content, path)
    rewrite_file(directory, 0, path.read_bytes())
    load_and_check(state, ddp, directory, path)


@fuzzed
@given(data=st.data())
def test_any_other_manifest_is_an_error_that_changes_nothing_or_a_state_that_fits(lone_rank, data):  # noqa: F811
    ddp, state, _, directory = lone_rank
    directory = copy_of(directory)
    path = directory / "regtopk.json"
    manifest = manifest_of(directory)
    damage(manifest, data)
    path.write_text(json.dumps({str(key): value for key, value in manifest.items()}))
    load_and_check(state, ddp, directory, path)


@fuzzed
@given(data=st.data())
def test_any_other_state_of_a_local_exchange_is_an_error_that_changes_nothing_or_fits(data):
    exchange = rt.LocalExchange(2, 0.3, mu=1.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        exchange.step([[torch.randn(4, 5, generator=generator), torch.randn(7, generator=generator)] for _ in range(2)])
    before = exchange.state_dict()
    content = exchange.state_dict()
    damage(content, data)
    try:
        exchange.load_state_dict(content)
    except (TypeError, ValueError) as error:
        assert str(error).startswith("LocalExchange.load_state_dict: ") and ": expected " in str(error) and ", got " in str(error), error
        assert same_state(exchange.state_dict(), before)
    exchange.load_state_dict(exchange.state_dict())  # fits itself
