"""All that is held back is saved, handed out or named: whatever module is asked about, and whatever else that module has."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from given import ENTRIES, Given, held, integers, register, seed_of
from processes import run_workers
from torch.nn.parallel import DistributedDataParallel
from training import make_state

import regtopk_torch as rt

SIZES = (40, 24)
NAMES = ["parts.0", "parts.1"]


def prepare(rank, entry, module=None, **options):
    """A model with a state after some steps; returns (module, ddp, state)."""
    module = module or Given(*SIZES)
    ddp = DistributedDataParallel(module, **options)
    state = make_state("topk", 0.25)
    register(ddp, state, entry)
    for step in range(4):
        ddp.zero_grad()
        ddp(integers(*SIZES, seed=seed_of(rank, step))).backward()
    return module, ddp, state


def flush_and_warnings(state, module):
    """Flush; return the texts of the UserWarnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state.flush(module)
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def average_over_ranks(tensors):
    averages = []
    for tensor in tensors:
        total = tensor.clone()
        dist.all_reduce(total)
        averages.append(total / dist.get_world_size())
    return averages


def equal(left, right):
    return len(left) == len(right) and all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


# Frozen


def freeze_then_save(rank, entry, directory):
    module, ddp, state = prepare(rank, entry)
    before = list(held(state, ddp).values())
    module.requires_grad_(False)
    frozen = list(held(state, ddp).values())
    rt.save(state, ddp, directory)
    saved = state.state_dict(module)
    module.requires_grad_(True)
    state.reset()
    rt.load(state, ddp, directory)
    loaded = list(held(state, ddp).values())
    state.reset()
    module.requires_grad_(False)
    state.load_state_dict(saved, module)
    module.requires_grad_(True)
    return any(residual.any() for residual in before), equal(frozen, before), equal(loaded, before), equal(list(held(state, ddp).values()), before)


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_held_of_frozen_parameters_is_saved_and_loaded(tmp_path, entry):
    assert run_workers(freeze_then_save, 2, entry, tmp_path) == [(True,) * 4] * 2


def freeze_then_flush(rank, entry, frozen):
    module, ddp, state = prepare(rank, entry)
    before = list(held(state, ddp).values())
    averages = average_over_ranks(before)
    for index in frozen:
        module.parts[index].requires_grad_(False)
        module.parts[index].grad = None
    messages = flush_and_warnings(state, ddp)
    handed_out = [parameter.grad for parameter in module.parts]
    left = list(held(state, ddp).values())
    for index in range(len(SIZES)):
        if index in frozen:
            assert handed_out[index] is None and torch.equal(left[index], before[index])
        else:
            assert torch.equal(handed_out[index], averages[index]) and not left[index].any()
    # What was kept is handed out when it can be.
    module.requires_grad_(True)
    again = flush_and_warnings(state, ddp)
    assert all(torch.equal(module.parts[index].grad, averages[index]) for index in frozen)
    return messages, again, any(residual.any() for residual in held(state, ddp).values())


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1)], ids=str)
def test_flush_hands_out_what_can_be_and_says_what_it_kept(frozen, entry):
    for messages, again, left in run_workers(freeze_then_flush, 2, entry, frozen):
        assert len(messages) == 1 and "kept" in messages[0]
        assert again == [] and not left


# Another module


def ask_about_another_module(rank, entry, directory):
    """Return (error of state_dict, error of save) for a foreign module and a part, and whether what is held has changed."""
    module, ddp, state = prepare(rank, entry)
    before = list(held(state, ddp).values())
    part = nn.ParameterList([module.parts[0]])
    found = []
    for other in (Given(5), part):
        for call in (state.state_dict, lambda other: rt.save(state, other, directory)):
            try:
                call(other)
                found.append((None, ""))
            except (ValueError, rt.CheckpointError) as error:
                found.append((type(error).__name__, str(error)))
    return found, equal(list(held(state, ddp).values()), before)


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_a_module_does_not_have_is_an_error_that_names_its_shapes(tmp_path, entry):
    for found, unchanged in run_workers(ask_about_another_module, 2, entry, tmp_path):
        assert [kind for kind, _ in found[::2]] == ["ValueError"] * 2
        assert all(kind in ("ValueError", "CheckpointError") for kind, _ in found)
        assert all("[40]" in message and "[24]" in message for _, message in found[:2])
        assert all("[24]" in message and "[40]" not in message for _, message in found[2:])
        assert unchanged


def flush_a_part(rank, entry):
    module, ddp, state = prepare(rank, entry)
    before = list(held(state, ddp).values())
    averages = average_over_ranks(before)
    ddp.zero_grad()
    messages = flush_and_warnings(state, nn.ParameterList([module.parts[0]]))
    part = torch.equal(module.parts[0].grad, averages[0]), module.parts[1].grad is None
    left = list(held(state, ddp).values())
    foreign = flush_and_warnings(state, Given(5))
    return messages, foreign, part, not left[0].any(), torch.equal(left[1], before[1]), equal(list(held(state, ddp).values()), left)


@pytest.mark.parametrize("entry", ENTRIES)
def test_flush_of_a_part_hands_out_that_part_and_keeps_the_rest(entry):
    for messages, foreign, part, cleared, kept, unchanged in run_workers(flush_a_part, 2, entry):
        assert len(messages) == len(foreign) == 1 and "kept" in messages[0] and "kept" in foreign[0]
        assert part == (True, True) and cleared and kept and unchanged


# Beside parameters that the exchange does not see


class WithEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 4, sparse=True)
        self.given = Given(*SIZES)

    def forward(self, gradients):
        return self.embedding(torch.tensor([1, 5])).sum() + self.given(gradients)


def flush_beside_an_embedding(rank, entry):
    module, ddp, state = prepare(rank, entry, WithEmbedding())
    averages = average_over_ranks(held(state, ddp).values())
    ddp.zero_grad()
    messages = flush_and_warnings(state, ddp)
    untouched = module.embedding.weight.grad is None
    # The next step finds no dense gradient there.
    optimizer = torch.optim.SparseAdam([module.embedding.weight])
    ddp.zero_grad()
    ddp(integers(*SIZES, seed=rank)).backward()
    optimizer.step()
    ddp(integers(*SIZES, seed=rank)).backward()  # and .grad of the embedding, which is sparse now, stays
    state.flush(ddp)
    return messages, untouched, module.embedding.weight.grad.is_sparse, any(average.any() for average in averages[1:])


@pytest.mark.parametrize("entry", ENTRIES)
def test_flush_leaves_the_gradient_of_a_sparse_embedding_alone(entry):
    assert run_workers(flush_beside_an_embedding, 2, entry) == [([], True, True, True)] * 2


class WithIgnored(Given):
    """Beside the parameters of DDP ones that it ignores: of another size on each rank, on rank 1 only, and one with a gradient."""

    def __init__(self, rank):
        super().__init__(*SIZES)
        self.ignored = nn.Module()  # DDP does not find the names of the outermost module's own parameters
        self.ignored.of_this_rank = nn.Parameter(torch.zeros(3 + rank, 2))
        if rank == 1:
            self.ignored.on_rank_1 = nn.Parameter(torch.zeros(7))
        self.ignored.own = nn.Parameter(torch.zeros(2))
        names = [name for name, _ in self.named_parameters() if name.startswith("ignored")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)


def flush_beside_ignored(rank, entry):
    module, ddp, state = prepare(rank, entry, WithIgnored(rank))
    averages = average_over_ranks([held(state, ddp)[name] for name in NAMES])
    module.zero_grad()
    module.ignored.own.grad = torch.full((2,), 5.0)
    messages = flush_and_warnings(state, ddp)
    untouched = [parameter.grad is None for parameter in module.ignored.parameters() if parameter is not module.ignored.own]
    handed_out = equal([parameter.grad for parameter in module.parts], averages)
    ddp(integers(*SIZES, seed=rank)).backward()  # and the ranks go on
    return messages, all(untouched), module.ignored.own.grad.tolist(), handed_out


@pytest.mark.parametrize("entry", ENTRIES)
def test_flush_leaves_parameters_that_ddp_ignores_alone_though_they_differ_between_ranks(entry):
    assert run_workers(flush_beside_ignored, 2, entry) == [([], True, [5.0, 5.0], True)] * 2


class WithBranch(Given):
    """Its second parameter is used from step 4 on; before, it is frozen, so that no exchange has seen it."""

    def forward(self, gradients):
        return super().forward([gradients[0], gradients[1] if self.parts[1].requires_grad else None])


def flush_before_the_first_exchange(rank, entry):
    module = WithBranch(*SIZES)
    module.parts[1].requires_grad_(False)
    module, ddp, state = prepare(rank, entry, module)
    module.parts[1].requires_grad_(True)
    module.parts[1].grad = torch.full((24,), 3.0)
    messages = flush_and_warnings(state, ddp)
    return messages, bool((module.parts[1].grad == 3.0).all()), bool(module.parts[0].grad.any())


@pytest.mark.parametrize("entry", ENTRIES)
def test_flush_leaves_the_gradient_of_what_was_never_exchanged_alone(entry):
    assert run_workers(flush_before_the_first_exchange, 2, entry) == [([], True, True)] * 2


def hold_on_one_rank(rank, entry):
    """Only rank 1 holds something: its gradient alone has entries that are not sent."""
    module = Given(40)
    ddp = DistributedDataParallel(module)
    state = make_state("topk", 0.05)
    register(ddp, state, entry)
    gradient = torch.zeros(40)
    gradient[:2] = 8.0
    if rank == 1:
        gradient[2:6] = 2.0
    ddp([gradient]).backward()
    kept = held(state, ddp)["parts.0"]
    module.zero_grad()
    state.flush(ddp)
    return float(kept.sum()), module.parts[0].grad.tolist()


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_one_rank_alone_holds_is_handed_out_on_all(entry):
    expected = [0.0] * 2 + [1.0] * 4 + [0.0] * 34
    assert run_workers(hold_on_one_rank, 2, entry) == [(0.0, expected), (8.0, expected)]
