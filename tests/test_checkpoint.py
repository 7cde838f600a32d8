"""State dicts: save, load and go on equals never stopping; what does not fit is an error and changes nothing."""

import copy
import io
import re

import pytest
import torch
import torch.nn as nn
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import batch, local_gradients, loss_of, make_model, make_optimizer, make_state

import regtopk_torch as rt

STEPS, STOP = 12, 6


def through_a_file(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def train_part(rank, method, entry, model, optimizer, steps, state_dict=None):
    # The model is one bucket, from the first step on: the same layout before and after a restart.
    ddp = DistributedDataParallel(model, bucket_cap_mb=100)
    state = make_state(method, 0.02)
    if state_dict is not None:
        state.load_state_dict(state_dict, ddp)
    if entry == "attach":
        rt.attach(ddp, state)
    else:
        ddp.register_comm_hook(state, rt.sparse_hook)
    for step in steps:
        optimizer.zero_grad()
        loss_of(ddp, batch(rank, step)).backward()
        optimizer.step()
    return state, ddp


def stop_and_go_on(rank, method, entry):
    model = make_model()
    optimizer = make_optimizer(model)
    state, ddp = train_part(rank, method, entry, model, optimizer, range(STOP))
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "exchange": state.state_dict(ddp)})

    resumed = make_model()
    resumed_optimizer = make_optimizer(resumed)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    state, ddp = train_part(rank, method, entry, resumed, resumed_optimizer, range(STOP, STEPS), saved["exchange"])

    undisturbed = make_model()
    whole, whole_ddp = train_part(rank, method, entry, undisturbed, make_optimizer(undisturbed), range(STEPS))
    same_parameters = all(torch.equal(a, b) for a, b in zip(resumed.parameters(), undisturbed.parameters(), strict=True))
    return same_parameters, same_state(state.state_dict(ddp), whole.state_dict(whole_ddp)), whole.stats()["repeated"]


def same_state(left, right):
    """Whether two nested state dicts hold equal values, tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same_state(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same_state, left, right))
    return left == right


@pytest.mark.parametrize("entry", ["register_comm_hook", "attach"])
@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_saved_loaded_and_gone_on_equals_never_stopped_bit_for_bit(method, entry):
    for same_parameters, same, repeated in run_workers(stop_and_go_on, 2, method, entry):
        assert same_parameters and same
        assert repeated > 0, "expected a history that matters"


@pytest.mark.parametrize("method", ["topk", "regtopk"])
def test_the_local_exchange_goes_on_bit_for_bit(method):
    model = make_model()
    steps = [[local_gradients(model, rank, step) for rank in range(3)] for step in range(STEPS)]
    whole = rt.LocalExchange(3, 0.02, method=method, mu=1.0)
    resumed = rt.LocalExchange(3, 0.02, method=method, mu=1.0)
    for step, gradients in enumerate(steps):
        expected = whole.step(gradients)
        assert all(map(torch.equal, resumed.step(gradients), expected))
        if step % 4 == 3:
            saved = through_a_file(resumed.state_dict())
            resumed = rt.LocalExchange(3, 0.02, method=method, mu=1.0)
            resumed.load_state_dict(saved)
            assert same_state(resumed.state_dict(), saved)


def test_a_new_layout_gets_residuals_and_history_by_parameter():
    """Any two layouts: the residuals are the same tensors by parameter, and so is the history."""
    model = make_model()
    gradients = [[local_gradients(model, rank, step) for rank in range(2)] for step in range(3)]
    count = len(gradients[0][0])
    one, other = rt.LocalExchange(2, 1e-9, mu=1.0), rt.LocalExchange(2, 1e-9, mu=1.0)
    alone = [[index] for index in range(count)]
    for exchange in (one, other):
        exchange.step(gradients[0], alone)
    before = one.state_dict()
    # Another layout, with nothing new to send: every bucket sends its largest entry and keeps the rest.
    one.step(gradients[1], [[3, 1], list(range(count - 1, 3, -1)), [0, 2]])
    other.step(gradients[1], [[index] for index in reversed(range(count))])
    assert one.stats()["history_dropped"] == 0
    assert one.stats(0)["rebuilds"] == count
    for rank in range(2):
        for index in range(count):
            held = before["workers"][rank]["parameters"][str(index)]["residual"]
            given = held + gradients[1][rank][index].flatten()
            kept = one.residuals(rank)[index]
            assert ((kept == given) | (kept == 0)).all()
            assert (kept != given).sum() <= 1
    # The same buckets in another order are the same plans: nothing is rebuilt.
    assert other.stats(0)["rebuilds"] == 0


def test_history_travels_through_a_rebuild_as_parameter_and_offset():
    # Two parameters of one bucket, then of two: entry 0 of each was sent and cancelled, so neither is sent again.
    exchange = rt.LocalExchange(2, 0.5, mu=1.0)
    first = [[torch.tensor([4.0, 1.0]), torch.tensor([5.0, 1.0])], [torch.tensor([-4.0, 1.0]), torch.tensor([-5.0, 1.0])]]
    assert [average.tolist() for average in exchange.step(first, [[0, 1]])] == [[0.0, 0.0], [0.0, 0.0]]
    averages = exchange.step(first, [[1], [0]])
    assert [average.tolist() for average in averages] == [[0.0, 2.0], [0.0, 2.0]]
    assert exchange.stats()["displaced"] == 4


def damage(rank):
    """Try to load wrong state dicts; return the message of each and whether the state stayed as it was."""
    model = make_model()
    state, ddp = train_part(rank, "regtopk", "attach", model, make_optimizer(model), range(3))
    good = state.state_dict(ddp)
    name = "layers.0.weight"

    def changed(change):
        result = copy.deepcopy(good)
        change(result)
        return result

    def entry(key, value):
        return changed(lambda d: d["parameters"][name].__setitem__(key, value))

    cases = {
        "not ours": {"state": {}},
        "tensor": torch.zeros(3),
        "version": changed(lambda d: d.update(version=2)),
        "world size": changed(lambda d: d.update(world_size=4)),
        "rank": changed(lambda d: d.update(rank=1 - rank)),
        "step": changed(lambda d: d.update(step="three")),
        "model": changed(lambda d: d["parameters"].update(head=d["parameters"].pop(name))),
        "shape": entry("shape", [1, 2]),
        "residual": entry("residual", torch.zeros(3)),
        "no dict": changed(lambda d: d["parameters"].update({name: [1]})),
        "sparse": entry("residual", good["parameters"][name]["residual"].to_sparse()),
        "no tensor": entry("sent_index", 3),
        "NaN": entry("residual", torch.full_like(good["parameters"][name]["residual"], float("nan"))),
        "NaN sent": entry("sent_value", torch.full_like(good["parameters"][name]["sent_value"], float("nan"))),
        "NaN fed back": entry("feedback", torch.full_like(good["parameters"][name]["feedback"], float("nan"))),
        "index": entry("sent_index", good["parameters"][name]["sent_index"].flip(0)),
        "value": entry("sent_value", torch.zeros(1, dtype=torch.float64)),
    }
    messages = {}
    for case, wrong in cases.items():
        try:
            state.load_state_dict(wrong, ddp)
        except (TypeError, ValueError) as error:
            messages[case] = f"{type(error).__name__}: {error}"
    # Another model altogether, with the right one's dict.
    other = nn.Linear(3, 3)
    try:
        state.load_state_dict(good, other)
    except ValueError as error:
        messages["other model"] = f"{type(error).__name__}: {error}"
    return messages, same_state(state.state_dict(ddp), good)


def test_a_state_dict_that_does_not_fit_is_an_error_and_changes_nothing():
    who = "RegTopKState.load_state_dict: "
    expected = {
        "not ours": r"TypeError: {who}expected a state dict of regtopk_torch, got a dict with the keys \['state'\]",
        "tensor": r"TypeError: {who}expected a state dict of regtopk_torch, got dtype torch.float32 and shape \[3\]",
        "version": "ValueError: {who}expected a state dict of version 1, got version 2",
        "world size": "ValueError: {who}expected a state dict of world_size 2, got world_size 4",
        "rank": "ValueError: {who}expected a state dict of rank {rank}, got rank {other}",
        "step": r"ValueError: {who}expected step to be an integer in \[-1, 2\^62\), got 'three\'",
        "model": r"ValueError: {who}expected a state dict of this model's 9 parameters, got 9; missing \['layers.0.weight'\], unknown \['head'\]",
        "shape": r"ValueError: {who}expected layers.0.weight of shape \[24, 96\], got \[1, 2\]",
        "residual": r"ValueError: {who}layers.0.weight: expected residual of dtype torch.float32 and shape \[24, 96\], got dtype torch.float32 and shape \[3\]",
        "no dict": "ValueError: {who}expected a dict with what was kept of layers.0.weight, got list",
        "sparse": r"ValueError: {who}layers.0.weight: expected residual of dtype .*, got dtype torch.float32 and shape \[24, 96\], torch.sparse_coo on cpu",
        "no tensor": r"ValueError: {who}layers.0.weight: expected sent_index of dtype torch.int64 and shape \[0\], got int",
        "NaN": "ValueError: {who}layers.0.weight: expected a finite residual, got infinities or NaN",
        "NaN sent": "ValueError: {who}layers.0.weight: expected finite sent_value, got infinities or NaN",
        "NaN fed back": "ValueError: {who}layers.0.weight: expected feedback without NaN, got some",
        "index": r"ValueError: {who}layers.0.weight: expected sent_index strictly ascending in \[0, 2304\), got others",
        "value": r"ValueError: {who}layers.0.weight: expected sent_value of dtype torch.float32 and shape \[\d+\], got dtype torch.float64 and shape \[1\]",
        "other model": "ValueError: {who}expected a state dict of this model's 2 parameters, got 9; missing ",
    }
    for rank, (messages, unchanged) in enumerate(run_workers(damage, 2)):
        assert messages.keys() == expected.keys()
        for case, pattern in expected.items():
            pattern = pattern.replace("{who}", re.escape(who)).replace("{rank}", str(rank)).replace("{other}", str(1 - rank))
            assert re.match(pattern, messages[case]), messages[case]
        assert unchanged


def channels_last(rank):
    """Save with channels_last parameters; return the residual by name, what DDP gave out and whether loading restores it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    ddp = DistributedDataParallel(model)
    state = make_state("regtopk", 0.1)
    rt.attach(ddp, state)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
    ddp(x).square().mean().backward()
    sent = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().mean().backward()
    given = {name: p.grad for name, p in model.named_parameters()}
    saved = state.state_dict(ddp)
    loaded = make_state("regtopk", 0.1)
    loaded.load_state_dict(through_a_file(saved), ddp)
    return given, sent, saved, same_state(loaded.state_dict(ddp), saved)


def test_a_channels_last_model_is_saved_in_logical_order():
    results = run_workers(channels_last, 2)
    for name, average in results[0][1].items():
        # Sum of what was given, less what both kept, is twice the average: only if every entry is at its own place.
        given = sum(result[0][name] for result in results)
        kept = sum(result[2]["parameters"][name]["residual"] for result in results)
        torch.testing.assert_close(average, (given - kept) / 2, rtol=1e-5, atol=1e-7)
    for _, _, saved, restored in results:
        assert restored
        entry = saved["parameters"]["0.weight"]
        assert entry["residual"].is_contiguous() and len(entry["sent_index"]) > 0
        assert torch.equal(entry["residual"].flatten()[entry["sent_index"]], torch.zeros(len(entry["sent_index"])))
