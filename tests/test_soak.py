"""The soak runs, counts, and notices what is wrong."""

import dataclasses
import re

import pytest
import soak
import torch
from books import booked_hook
from processes import run_workers

import regtopk_torch as rt
from regtopk_torch import states


def test_a_short_soak_finds_nothing_wrong(capsys):
    with pytest.raises(SystemExit) as ended:
        soak.main(["--workers", "3", "--minutes", "0.1", "--seed", "19"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0, printed[-5000:]
    counts = {name: int(count.replace(",", "")) for name, count in re.findall(r"^(\w[\w ]+?) {2,}([\d,]+)$", printed, re.MULTILINE)}
    assert counts["violations"] == 0
    assert min(counts[name] for name in ("legs", "steps", "bytes checked")) > 0, counts  # which events come is chance; see below for each


@pytest.fixture
def one_leg(tmp_path):
    """A soak after one leg without a kill, with what that leg's check gets to see."""
    chain = soak.Soak(2, 0, tmp_path / "chain")
    seen = []
    check = chain._check_replicas
    chain._check_replicas = lambda leg, results: (seen.append((leg, results)), check(leg, results))

    def tells_all(leg):
        # With a decay, momentum or clipping the books alone say what is lost; where one of several optimizers has stepped they know nothing.
        parts = leg.options["decay"] == 1 and not leg.options["momentum"] and leg.options["clip_norm"] is None
        return parts and leg.entry != "attach" and not leg.alone and not leg.side

    while not seen or not tells_all(seen[-1][0]):
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
    residual = next(iter(results[1]["members"][0]["residuals"].values()))
    residual[0] += 0.5
    with pytest.raises(AssertionError):
        chain._check_books(leg, results)
    residual[0] -= 0.5
    results[0]["members"][0]["applied"][0][0] += 0.5
    with pytest.raises(AssertionError, match="not close"):
        chain._check_mass(leg, results)


LEG = soak.Leg(
    number=0, world_size=2, first_step=0, steps=8, method="regtopk", distortion="previous", density=0.05, entry="register_comm_hook",
    kind="plain", bucket_cap_mb=soak.ONE_BUCKET_MB, set_to_none=True, regroup_at=None, autocast=None, growth=2.0, overflows={}, save_every=9,
    kill=None,
)  # fmt: skip
OVERFLOWS = {3: (1, 1, 0), 5: (0, 0, 2)}  # one in each model
EVENTS = {
    "idle steps": dataclasses.replace(LEG, kind="idle for a while", reads=True),
    "overflows, shared scaler": dataclasses.replace(LEG, side=True, overflows=OVERFLOWS),
    "overflows applied in part": dataclasses.replace(LEG, side=True, overflows=OVERFLOWS, optimizers="across"),
    "layers replaced": dataclasses.replace(LEG, fresh={3: "branch", 5: "model.layers.4"}),
    "calls on one rank": dataclasses.replace(LEG, alone=(4, 1, "reset")),
    "narrow values": dataclasses.replace(LEG, options={"wire_dtype": torch.bfloat16}),
    "coded indices": dataclasses.replace(LEG, options={"wire_dtype": "2bit", "index_code": "elias-fano"}),
    "led steps": dataclasses.replace(LEG, options={"support": "leader"}, overflows={3: (1, 0, 0)}),
    "steps of chunks": dataclasses.replace(LEG, options={"chunk": 256, "wire_dtype": "sign"}),
    "steps with momentum": dataclasses.replace(LEG, options={"momentum": 0.9, "mask_momentum": True}, overflows={3: (1, 0, 0)}),
    "clipped steps": dataclasses.replace(LEG, options={"clip_norm": 0.01}, overflows={3: (1, 0, 0)}),
    "steps of two levels": dataclasses.replace(LEG, options={"levels": 2}, world_size=4, fresh={3: "branch"}),
    "dense buckets": dataclasses.replace(LEG, options={"dense": soak.is_small}, overflows={3: (1, 0, 0)}),
    "decaying steps": dataclasses.replace(LEG, options={"decay": 0.9}),
    "scheduled steps": dataclasses.replace(LEG, density=rt.WarmupDensity(0.5, 0.01, 8)),
}


def counts_of(leg, train, folder, monkeypatch):
    monkeypatch.setattr(soak, "draw_leg", lambda *_: leg)
    monkeypatch.setattr(soak, "train_leg", train)
    chain = soak.Soak(2, 0, folder / "chain")
    chain.run_leg()
    return chain.counts


@pytest.mark.parametrize("entry, bucket_cap_mb", [("register_comm_hook", soak.ONE_BUCKET_MB), ("attach", soak.BUCKET_CAP_MB / 4)])
@pytest.mark.parametrize("event", EVENTS)
def test_each_event_is_counted_and_loses_nothing(event, entry, bucket_cap_mb, tmp_path, monkeypatch):
    leg = dataclasses.replace(EVENTS[event], entry=entry, bucket_cap_mb=bucket_cap_mb)
    counts = counts_of(leg, soak.train_leg, tmp_path, monkeypatch)
    assert counts["violations"] == 0 and counts[event] > 0, counts


def with_gradient_for_the_idle(rank, leg, folder):
    def hook(state_and_books, bucket):
        for gradient in bucket.gradients():
            gradient.masked_fill_(gradient == 0, 1e-30)
        return booked_hook(state_and_books, bucket)

    soak.booked_hook = hook
    return soak.train_leg(rank, leg, folder)


def with_clocks_of_their_own(rank, leg, folder):
    class NeverShared(dict):
        def setdefault(self, _, clock):
            return clock

    states._clocks = NeverShared()
    return soak.train_leg(rank, leg, folder)


def without_a_note_of_optimizers(rank, leg, folder):
    states.TopKState._note = lambda *_: None
    return soak.train_leg(rank, leg, folder)


def with_inherited_residuals(rank, leg, folder):
    replace = soak.Member.replace

    def replace_and_inherit(self, *arguments):
        before = self.state.state_dict(self.module)
        replace(self, *arguments)
        self.state.load_state_dict(before, self.module)

    soak.Member.replace = replace_and_inherit
    return soak.train_leg(rank, leg, folder)


def with_a_silent_reset(rank, leg, folder):
    states.TopKState.reset = lambda state: state._exchange.import_pieces({}, state._exchange.last_step())
    return soak.train_leg(rank, leg, folder)


@pytest.mark.parametrize(
    "event, train, said",
    [
        ("idle steps", with_gradient_for_the_idle, "_check_idle: an idle residual changed"),
        ("overflows, shared scaler", with_clocks_of_their_own, "_check_mass: Tensor-likes are not close"),
        ("overflows applied in part", without_a_note_of_optimizers, "_check_mass: Tensor-likes are not close"),
        ("layers replaced", with_inherited_residuals, "_check_mass: Tensor-likes are not close"),
        ("calls on one rank", with_a_silent_reset, "after rank 1 called reset(): no error"),
    ],
)
def test_the_soak_notices_a_product_that_mishandles_an_event(event, train, said, tmp_path, monkeypatch, capsys):
    assert counts_of(EVENTS[event], train, tmp_path, monkeypatch)["violations"] > 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["unused now and then, bucket view", "unused by all, skipped"])
def test_a_leg_goes_on_bit_for_bit_where_its_first_step_leaves_parameters_unused(kind, tmp_path):
    # Step 1 uses the branch on no rank; what step 0 sent of it still has momentum.
    whole = dataclasses.replace(LEG, steps=4, density=0.3, entry="attach", kind=kind, set_to_none=False, growth=None)
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


def test_bad_options_are_errors(capsys):
    for arguments, message in ((["--workers", "1"], "--workers: expected at least 2, got 1"), (["--minutes", "0"], "--minutes: expected a number above 0")):
        with pytest.raises(SystemExit) as ended:
            soak.main(arguments)
        assert ended.value.code == 2 and message in capsys.readouterr().err
