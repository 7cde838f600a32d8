"""The soak runs, counts, and notices what is wrong."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soak
from processes import run_workers

ROOT = Path(__file__).resolve().parent.parent


def test_a_short_soak_finds_nothing_wrong():
    command = [sys.executable, "tests/soak.py", "--workers", "3", "--minutes", "0.15", "--seed", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    counts = {name: int(count.replace(",", "")) for name, count in re.findall(r"^(\w[\w ]+?) {2,}([\d,]+)$", done.stdout, re.MULTILINE)}
    assert counts["violations"] == 0
    assert min(counts[name] for name in ("legs", "steps", "overflows", "bytes checked")) > 0, counts


@pytest.fixture
def one_leg(tmp_path):
    """A soak after one leg without a kill, with what that leg's check gets to see."""
    chain = soak.Soak(2, 0, tmp_path / "chain")
    seen = []
    check = chain._check_replicas
    chain._check_replicas = lambda leg, results: (seen.append((leg, results)), check(leg, results))
    while not seen or seen[-1][0].entry == "attach":
        chain.run_leg()
    assert chain.counts["violations"] == 0
    return chain, *seen[-1]


def test_the_soak_notices_what_is_lost_or_differs(one_leg):
    chain, leg, results = one_leg
    step = next(iter(results[0]["digests"]))
    results[0]["digests"][step], digest = "other", results[0]["digests"][step]
    with pytest.raises(AssertionError, match=f"replicas differ after step {step}"):
        soak.Soak._check_replicas(chain, leg, results)
    results[0]["digests"][step] = digest
    chain._check_books(leg, results)
    residual = next(iter(results[1]["residuals"].values()))
    residual[0] += 0.5
    with pytest.raises(AssertionError):
        chain._check_books(leg, results)
    residual[0] -= 0.5
    results[0]["applied"][0][0] += 0.5
    with pytest.raises(AssertionError, match="not close"):
        chain._check_books(leg, results)


@pytest.mark.parametrize("kind", ["unused now and then, bucket view", "unused by all, skipped"])
def test_a_leg_goes_on_bit_for_bit_where_its_first_step_leaves_parameters_unused(kind, tmp_path):
    # Step 1 uses the branch on no rank; what step 0 sent of it still has momentum.
    whole = soak.Leg(
        number=0, world_size=2, first_step=0, steps=4, method="regtopk", distortion="previous", density=0.3, entry="attach", kind=kind,
        bucket_cap_mb=soak.ONE_BUCKET_MB, set_to_none=False, regroup_at=None, autocast=None, growth=None, overflows={}, save_every=9, kill=None,
    )  # fmt: skip
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = dataclasses.replace(whole, steps=1)
    rest = dataclasses.replace(whole, number=1, first_step=1, steps=3)
    never_stopped, _, gone_on = (
        run_workers(soak.train_leg, 2, leg, folder) for leg, folder in ((whole, tmp_path / "a"), (first, tmp_path / "b"), (rest, tmp_path / "b"))
    )
    for whole_rank, rest_rank in zip(never_stopped, gone_on, strict=True):
        assert rest_rank["resumed_at"] == 1
        assert rest_rank["digests"] == {step: whole_rank["digests"][step] for step in (1, 2, 3)}


def test_bad_options_are_errors():
    for arguments, message in ((["--workers", "1"], "--workers: expected at least 2, got 1"), (["--minutes", "0"], "--minutes: expected a number above 0")):
        done = subprocess.run([sys.executable, "tests/soak.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and message in done.stderr
