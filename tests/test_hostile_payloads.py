"""A rank that sends anything but its payload: an error on every other rank that names it and the field, and nothing changes."""

import math
import random
import re
import struct

import pytest
import torch
import torch.distributed as dist
from processes import run_workers
from test_payload import FIELDS, HEADER
from torch.nn.parallel import DistributedDataParallel
from training import batch, loss_of, make_model, make_state

import regtopk_torch as rt
from regtopk_torch import _C, groups

HOSTILE = 1
PARAMETERS = len(list(make_model().parameters()))
ENTRIES = sum(parameter.numel() for parameter in make_model().parameters())


class Message:
    """The bytes of one rank's message: header | scale (fp64), deed (u64), a bit per parameter, padded to 8 | the rest."""

    SCALE, DEED = 64, 72
    TILE_STARTS = 80 + -(-PARAMETERS // 64) * 8
    SUPPORT = TILE_STARTS + 8  # one tile

    def __init__(self, k):
        self.k = k
        self.bytes = _C.payload_bytes(ENTRIES, k, torch.float32, PARAMETERS)

    def valid(self, header):
        """A message of the step and the plan that `header` names, with k entries of value 1."""
        fields = dict(zip(FIELDS, header, strict=True))
        index = torch.randperm(ENTRIES, generator=torch.Generator().manual_seed(0))[: self.k].sort().values
        step, plan = fields["step"], struct.unpack("<q", struct.pack("<Q", fields["plan"]))[0]
        message = torch.ops.regtopk.encode(index, torch.ones(self.k), numel=ENTRIES, step=step, plan=plan, spans=PARAMETERS)
        return self.with_scale(message, 1.0)

    def with_scale(self, message, scale):
        return self.with_bytes(message, self.SCALE, struct.pack("<d", scale))

    @staticmethod
    def with_bytes(message, at, content):
        message = message.clone()
        message[at : at + len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return message

    def with_field(self, message, name, value):
        header = list(struct.unpack_from(HEADER, message.numpy().tobytes()))
        header[FIELDS.index(name)] = value
        return self.with_bytes(message, 0, struct.pack(HEADER, *header))

    def damages(self, valid):
        """{what the error must say: message}."""
        fields = {"magic": 1, "version": 9, "value type": 0, "support": 1 - struct.unpack_from(HEADER, valid.numpy().tobytes())[3], "step": 77}
        fields |= {"numel": 2**63, "k": 2**64 - 1, "plan": 3, "repeated": self.k + 1, "flags": 4, "spans": 9999}
        damages = {f"expected {name} .* in the payload of rank 1, got {value}": self.with_field(valid, name, value) for name, value in fields.items()}
        damages["expected entries before tile 0 0 in the payload of rank 1, got 7"] = self.with_bytes(valid, self.TILE_STARTS, struct.pack("<I", 7))
        if self.k > ENTRIES // 16:
            flipped = valid.clone()
            flipped[self.SUPPORT] ^= 1
            damages["expected entries in tile 0 .* in the payload of rank 1"] = flipped
            damages[r"expected offset of entry \d+ .* in the payload of rank 1"] = self.with_bytes(valid, self.SUPPORT + (ENTRIES - 1) // 8, b"\xff")
        else:
            damages["expected offset of entry 1 more than .* in the payload of rank 1, got 0"] = self.with_bytes(valid, self.SUPPORT + 2, b"\0\0")
            last = self.with_bytes(valid, self.SUPPORT + 2 * (self.k - 1), struct.pack("<H", ENTRIES))
            damages[f"expected offset of entry {self.k - 1} .* less than {ENTRIES} in the payload of rank 1, got {ENTRIES}"] = last
        for scale, text in ((0.0, "0"), (2.0, "2"), (-1.0, "-1"), (math.nan, "nan"), (math.inf, "inf")):
            damages[f"expected the same gradient scale on every rank, got 1 on rank 0 and {text} on rank 1"] = self.with_scale(valid, scale)
        damages["got no call on rank 0 and 1 call, reset\\(\\) on rank 1; make the call on every rank"] = self.with_bytes(valid, self.DEED, struct.pack("<Q", 257))
        noise = random.Random(0).randbytes(self.bytes)
        damages["rank 1"] = torch.frombuffer(bytearray(noise), dtype=torch.uint8)
        return damages


def payloads_of(state):
    """The process group of a state's payloads, once `take_part` has it opened."""
    return opened[state][0]


opened = {}


def take_part(rank, density, entry):
    """Return, for honest ranks, {what the error must say: (error, bucket untouched, residual untouched)} and what a step after
    all that gave; for the hostile one, nothing."""
    model = make_model()
    state = make_state("regtopk", density, index_code="offsets")  # what a payload has; coded ones: test_wire.py
    open_groups = groups.open_groups
    groups.open_groups = lambda state, caller: opened.setdefault(state, open_groups(state, caller))

    def wrap():
        # The error leaves DDP in the middle of a step: each exchange gets another one around the same parameters.
        model.zero_grad()
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        if entry == "attach":
            rt.attach(ddp, state)
        else:
            ddp.register_comm_hook(state, rt.sparse_hook)
        return ddp

    ddp = wrap()
    loss_of(ddp, batch(rank, 0)).backward()
    form = Message(max(1, math.floor(density * ENTRIES + 0.5)))
    received = torch.empty(dist.get_world_size() * form.bytes, dtype=torch.uint8)
    valid, found = torch.zeros(form.bytes, dtype=torch.uint8), {}
    names = [None, *form.damages(form.valid([0] * len(FIELDS)))]
    for name in names:
        ddp = wrap()
        if rank == HOSTILE:
            sent = valid if name is None else form.damages(valid)[name]
            payloads_of(state)._allgather_base(received, sent).wait()
            header = list(struct.unpack_from(HEADER, received.numpy().tobytes()))  # rank 0's, of this step
            header[FIELDS.index("step")] += 1
            valid = form.valid(header)
            continue
        before = state.state_dict(ddp)["parameters"]
        plain = make_model()
        loss_of(plain, batch(rank, 1)).backward()
        try:
            loss_of(ddp, batch(rank, 1)).backward()
            error = "none"
        except Exception as caught:
            error = str(caught)
        after = state.state_dict(ddp)["parameters"]
        bucket = all(torch.equal(mine.grad, other.grad) for mine, other in zip(model.parameters(), plain.parameters(), strict=True))
        kept = all(
            torch.equal(after[key]["residual"], before[key]["residual"] + parameter.grad) for key, parameter in plain.named_parameters()
        )
        found[name] = error, bucket, kept
    ddp = wrap()
    if rank == HOSTILE:
        payloads_of(state)._allgather_base(received, valid).wait()
        return None
    loss_of(ddp, batch(rank, 2)).backward()
    return found, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("entry", ["register_comm_hook", "attach"])
@pytest.mark.parametrize("density", [0.02, 0.4], ids=["offsets", "bitmap"])
def test_hostile_bytes_are_an_error_on_every_rank_and_change_nothing(density, entry):
    results = run_workers(take_part, 3, density, entry)
    honest = [results[0], results[2]]
    for found, _ in honest:
        assert "expected magic 1802531954 in the payload of rank 1, got 0, as a rank sends that has an error of its own" in found[None][0]
        for name, (error, bucket, kept) in found.items():
            assert name is None or re.search(name, error), f"expected {name!r}, got {error!r}"
            assert bucket, f"{name}: expected an untouched bucket"
            assert kept, f"{name}: expected residual plus gradient to be kept"
    # A valid payload after all that is exchanged, and replicas agree.
    assert all(map(torch.equal, honest[0][1], honest[1][1]))
