r"""RegTop-k in plain PyTorch: the oracle of the tests, and the shortest complete statement of what the kernels compute.

Equations are those of Bereyhi, Liang, Boudreau, Afana, arXiv 2409.14893; design choices beyond the paper are marked (+).

    paper                    here                     meaning, for one worker and one bucket of J entries
    g_n^t                    gradient                 local gradient
    epsilon_n^t              residual                 what was not sent so far
    a_n^t                    accumulated              decay * residual + gradient, decay 1 in the paper (Algorithm 1, line 4)
    s_n^t, its support S     index                    the k entries sent, ascending
    \hat g_n^t = s * a       value                    a[S] as the wire carries it, v
    g^t                      average                  Z / N with Z = v_0 + ... + v_{N-1}            (eq. 1, omega_n = 1/N)
    Delta_n^t                -                        posterior distortion; enters only as |1 + Delta|   (eq. 13)
    |1 + Delta_n^t|          rho                      infinite for entries not sent last step (Q infinite) (+)
    u_mu(x) = tanh(x / mu)   regularisation           factor of the score                           (eq. 16)
    -                        velocity                 momentum correction of arXiv 1712.01887, u there (+)
    Top_k                    select                   eq. 5, made unique: equal scores by index (+)

Everything is fp32, or fp64 for fp64 gradients; only the gradient, the wire and the average have the gradient's dtype.
Tensors are on the CPU and flat, shape [J] unless said otherwise.
"""

import math
import operator
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import reduce

import torch

TILE_ENTRIES = 65536
_WIRE_TYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def accumulate_dtype(dtype):
    """Dtype of residual, score and sum for gradients of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def entries_to_send(density, numel):
    """k = density * J, rounded, at least 1 and at most J (section 4.1 writes S = k / J)."""
    return min(max(math.floor(density * numel + 0.5), 1), numel)


def tanh_of_nonnegative(x):
    """tanh(x) for fp64 x >= 0, from additions, multiplications and divisions in a fixed order (+).

    The kernels compute the same bits: tanh(x) = e / (e + 2) with e = expm1(2x), 2x = n ln 2 + r and
    expm1(n ln 2 + r) = 2^n expm1(r) + (2^n - 1), expm1(r) by its Taylor polynomial of degree 13.
    """
    y = 2.0 * torch.clamp(x, max=22.0)
    n = torch.floor(y * 1.4426950408889634 + 0.5)
    r = (y - n * float.fromhex("0x1.62e42feep-1")) - n * float.fromhex("0x1.a39ef35793c76p-33")
    polynomial = torch.full_like(r, 1.0 / math.factorial(13))
    for order in range(12, 1, -1):
        polynomial = polynomial * r + 1.0 / math.factorial(order)
    expm1_of_r = r + r * r * polynomial
    two_to_n = ((n.to(torch.int64) + 1023) << 52).view(torch.float64)
    expm1_of_y = two_to_n * expm1_of_r + (two_to_n - 1.0)
    return expm1_of_y / (expm1_of_y + 2.0)


def magnitude_ratio(numerator, denominator):
    """|numerator| / |denominator|; infinite where the denominator is 0 or the ratio is NaN (+)."""
    ratio = numerator.abs() / denominator.abs()
    return torch.where((denominator == 0) | ratio.isnan(), math.inf, ratio)


def feedback_of(total, value, distortion):
    """What is kept of Z and v for the next step's score: rho itself, or Z - v. Shapes [k]."""
    difference = total - value
    return magnitude_ratio(total, value) if distortion == "previous" else torch.where(difference.isnan(), math.nan, difference)


def rho_of(accumulated, feedback, distortion):
    """|1 + Delta| of entries sent last step, shape [k].

    distortion "previous" divides by the value sent last step: |Z| / |v|, as the authors' scripts do;
    "current" by the accumulated gradient of this step: |a + (Z - v)| / |a|, as Algorithm 1, line 5 is printed.
    """
    return feedback if distortion == "previous" else magnitude_ratio(accumulated + feedback, accumulated)


def scores(accumulated, sent_index, feedback, *, mu, distortion):
    """|a| for entries not sent last step, |a| tanh(rho / mu) for the others (eq. 16)."""
    result = accumulated.abs()
    if sent_index is not None and feedback is not None:
        rho = rho_of(accumulated[sent_index], feedback, distortion)
        regularisation = tanh_of_nonnegative(rho.double() / mu)
        result[sent_index] *= regularisation.to(accumulated.dtype)
    return result


def order_keys(magnitudes):
    """Integers in the order of non-negative floats: their bit patterns, with one pattern for every NaN, above infinity (+)."""
    integers = torch.int64 if magnitudes.dtype == torch.float64 else torch.int32
    nan = torch.tensor(math.nan, dtype=magnitudes.dtype)
    return torch.where(magnitudes.isnan(), nan, magnitudes).abs().view(integers)


def select(score, k):
    """Indices of the k largest scores, ascending; among equal scores the smallest indices (eq. 5, made unique)."""
    order = torch.sort(order_keys(score), descending=True, stable=True).indices
    return order[:k].sort().values


def select_in_chunks(score, density, chunk):
    """The same of each `chunk` consecutive entries by itself, the last of which may be fewer (+)."""
    return torch.cat([begin + select(part, entries_to_send(density, len(part))) for begin, part in _chunks_of(score, chunk)])


def _chunks_of(values, chunk):
    return [(begin, values[begin : begin + chunk]) for begin in range(0, len(values), chunk)]


def to_wire(values, dtype):
    """Round to the wire's dtype: nearest even, a finite value never to infinity, one NaN (+)."""
    rounded = values.to(dtype)
    largest = torch.finfo(dtype).max
    overflowed = rounded.isinf() & values.isfinite()
    rounded = torch.where(overflowed, torch.sign(values).to(dtype) * largest, rounded)
    return torch.where(values.isnan(), torch.tensor(math.nan, dtype=dtype), rounded)


CODE_BITS = {"sign": 1, "2bit": 2}


def few_bits(bits, index, value):
    """Values as a code of one bit or two carries them, shape [k], with `bits`, the codes [k] and the levels [tiles, 2]; csrc/core/levels.h (+)."""
    half = torch.float16 if value.dtype == torch.float16 else torch.bfloat16
    sent, codes, levels = torch.empty_like(value), torch.zeros(len(value), dtype=torch.int64), {}
    tiles = index // TILE_ENTRIES
    for tile in tiles.unique().tolist():
        where = (tiles == tile).nonzero().flatten()
        levels[tile], of_tile = _levels_and_codes(bits, [float(v) for v in value[where]], half)
        codes[where] = torch.tensor(of_tile)
        sent[where] = torch.tensor([(-1.0 if code & 1 else 1.0) * levels[tile][code if bits == 1 else code >> 1] for code in of_tile], dtype=torch.float64).to(value.dtype)
    return sent, bits, codes, levels


def _levels_and_codes(bits, values, half):
    """The two levels that the values of a tile share, in the order of their sides, and the code of each value."""
    if not all(map(math.isfinite, values)):
        return [math.nan, math.nan], [0] * len(values)
    exponent = max(math.frexp(max(map(abs, values)))[1] - 1, -923)
    units = [math.floor(math.ldexp(abs(v), 40 - exponent)) if v else 0 for v in values]
    present, total = [m for m in units if m], sum(units)
    sides = [int(v < 0) if bits == 1 else int(m * len(present) >= total) for m, v in zip(units, values, strict=True)]
    by_side = [[m for m, own in zip(units, sides, strict=True) if m and own == side] for side in (0, 1)]
    levels = [_stored(_level_of(side), exponent, half) for side in by_side]
    of_zeros = 0
    if bits == 1 and by_side[0]:
        mixed = sum(by_side[0]) * 0x9E3779B97F4A7C15 + sum(by_side[1]) * 0xC2B2AE3D27D4EB4F
        of_zeros = mixed >> 63 & 1 if by_side[1] else 1
    if len(present) < len(units):
        levels[of_zeros] = 0.0
    codes = [side if bits == 1 else 2 * side + (v < 0) for side, v in zip(sides, values, strict=True)]
    return levels, [code if m else of_zeros for code, m in zip(codes, units, strict=True)]


def _level_of(side):
    """The mean in the tile's units, at most 7/4 of the smallest, with 8 bits of which none is finer than the largest resolves."""
    if not side:
        return 0
    level = min(sum(side) // len(side), min(side) + min(side) // 2 + min(side) // 4)
    cut = max(level.bit_length() - 8, max(side).bit_length() - 22, 0)
    return level >> cut << cut


def _stored(level, exponent, dtype):
    """The largest value of `dtype` that is not above it; 0 where fp32 does not reach it."""
    exact = math.ldexp(level, exponent - 40) if level.bit_length() + exponent - 40 <= 1024 else math.inf
    if exact > torch.finfo(torch.float32).max:
        return 0.0
    stored = to_wire(torch.tensor(exact, dtype=torch.float32), dtype)
    if float(stored) > exact:
        stored = (stored.view(torch.int16) - 1).view(dtype)
    return float(stored)


@dataclass
class Message:
    """What one worker sends for one bucket in one step."""

    index: torch.Tensor  # [k] int64, ascending
    value: torch.Tensor  # [k], the gradient's dtype
    non_finite: bool  # some accumulated entry is infinite or NaN: the step is void for everyone
    repeated: int  # entries sent twice running
    displaced: int  # entries that plain magnitude would have sent and the regularisation did not


@dataclass
class Worker:
    """Algorithm 1 for worker n. `mu=None` is Top-k."""

    density: float
    mu: float | None = None
    distortion: str = "previous"
    decay: float = 1.0  # (+)
    chunk: int | None = None  # (+) consecutive entries that select by themselves
    wire_dtype: torch.dtype | str | None = None  # (+) in which values travel, where it is narrower than the gradient's; or "sign" or "2bit"
    momentum: float = 0.0  # (+) with the next three: arXiv 1712.01887
    nesterov: bool = False
    mask_momentum: bool = False
    clip_norm: float | None = None
    velocity: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    sent: Message | None = None
    sent_all: bool = False  # whether that was dense
    feedback: torch.Tensor | None = None
    in_vain: bool = False
    idle: torch.Tensor | None = None  # bool [J]: what was zero on all workers in the last step

    def correct(self, gradient, workers, zero=None):
        """Return what is given instead of the gradient (+): clipped, and with momentum, but for parameters that `zero`, as for `compress`,
        marks: their velocity waits. So does that of an entry that would not be finite in the gradient's dtype."""
        wide = accumulate_dtype(gradient.dtype)
        clipped = gradient.to(wide)
        if self.clip_norm is not None:
            norm = math.sqrt(squared_norm(gradient))
            clipped = clipped * (1.0 if norm == 0 else min(1.0, self.clip_norm / math.sqrt(workers) / norm))
        if not self.momentum:
            return to_wire(clipped, gradient.dtype)
        before = torch.zeros_like(clipped) if self.velocity is None else self.masked()
        now = before * self.momentum + clipped
        wanted = clipped + now * self.momentum if self.nesterov else now
        fits = wanted.abs() <= torch.finfo(gradient.dtype).max
        waits = torch.zeros_like(fits) if zero is None else zero
        self.velocity = torch.where(fits & ~waits, now, before)
        return torch.where(waits, gradient, to_wire(torch.where(fits, wanted, wanted * math.inf), gradient.dtype))

    def masked(self):
        """The velocity without what was sent and applied, where that is masked (+)."""
        if not self.mask_momentum or self.sent is None or self.sent_all or self.in_vain:
            return self.velocity
        applied = self.sent.value.isfinite() & (self.sent.value != 0)
        if self.idle is not None:
            applied &= ~self.idle[self.sent.index]
        return self.velocity.index_fill(0, self.sent.index[applied], 0.0)

    def compress(self, gradient, zero=None, support=None, dense=False):
        """Return this step's Message and update the residual: what is sent plus what is kept is what was given.

        `support`, ascending indices, is what a leader has chosen instead of this worker (+): no score is taken.
        Where it is `dense` all entries are sent, in the gradient's dtype (+).

        `zero`, bool [J], marks the parameters whose gradient is zero in all entries here. Those that were so on all workers in
        the last step are idle (+): they score 0, are sent as 0 if at all, and keep their residual.
        """
        wide = accumulate_dtype(gradient.dtype)
        if self.residual is None:
            self.residual = torch.zeros(gradient.numel(), dtype=wide)
        if self.in_vain:
            self.put_back()
        elif self.idle is not None:
            self.take_back(self.idle)
        idle = torch.zeros(gradient.numel(), dtype=torch.bool) if zero is None or self.idle is None else zero & self.idle
        waiting = self.residual[idle].clone()
        self.residual[idle] = 0
        accumulated = self.residual * self.decay + gradient.to(wide)  # line 4
        sent_index = None if self.sent is None else self.sent.index
        feedback = None if self.mu is None else self.feedback
        score = scores(accumulated, sent_index, feedback, mu=self.mu, distortion=self.distortion)  # line 5
        if support is not None:
            index = support
        else:
            index = torch.arange(len(score)) if dense else select_in_chunks(score, self.density, self.chunk or len(score))  # line 6
        finite = accumulated.isfinite()
        # Whether an entry that is not finite has been chosen depends on the leader: it is the message's flag that says it.
        given = accumulated if support is None else torch.where(finite, accumulated, self.residual)
        value = to_wire(given[index], gradient.dtype)  # line 7
        wire_dtype = None if dense else self.wire_dtype
        if wire_dtype in CODE_BITS:
            value = few_bits(CODE_BITS[wire_dtype], index, value)[0]
        elif wire_dtype is not None and wire_dtype.itemsize < gradient.dtype.itemsize:
            value = to_wire(to_wire(value, torch.float32), wire_dtype).to(gradient.dtype)

        kept = given.clone()
        applied = value.isfinite() if wire_dtype in CODE_BITS else torch.ones(len(value), dtype=torch.bool)
        kept[index[applied]] -= value[applied].to(wide)  # line 8
        # (+) an entry that is not finite keeps what it had
        self.residual = torch.where(finite, kept, self.residual if support is None else kept)
        self.residual[idle] = waiting

        repeated, displaced = self._compare_with_last_step(accumulated, score, index) if support is None else (0, 0)
        self.sent = Message(index, value, not bool(finite.all()), repeated, displaced)
        self.sent_all = dense
        self.feedback = None
        return self.sent

    def receive(self, total, *, void, idle=None):
        """Take Z of this step, shape [J] in the wide dtype, whether the step is void (some sum, of any bucket, is not finite),
        and which parameters, bool [J], were zero on all workers."""
        self.in_vain, self.idle = void, idle
        if self.mu is not None:
            index = self.sent.index
            self.feedback = feedback_of(total[index], self.sent.value.to(total.dtype), self.distortion)
            if idle is not None:
                self.feedback = torch.where(idle[index], math.inf, self.feedback)

    def settled(self):
        """The residual with what is about to return to it."""
        kept, returning = self.residual.clone(), None
        if self.in_vain:
            returning = torch.ones(len(self.sent.index), dtype=torch.bool)
        elif self.idle is not None and self.sent is not None:
            returning = self.idle[self.sent.index]
        return kept if returning is None else self._returned(kept, returning)

    def take_back(self, idle):
        """What was sent for idle entries, bool [J], was applied nowhere and returns to the residual (+). It stays in the history
        as a value of 0 that is not regularised."""
        if self.sent is None:
            return
        taken = idle[self.sent.index]
        self.residual = self._returned(self.residual, taken)
        self.sent = replace(self.sent, value=torch.where(taken, torch.zeros_like(self.sent.value), self.sent.value))

    def put_back(self):
        """A void step was applied nowhere: its finite values return to the residual, its history is forgotten (+)."""
        self.residual = self._returned(self.residual, torch.ones(len(self.sent.index), dtype=torch.bool))
        self.sent, self.feedback, self.in_vain = None, None, False

    def _returned(self, residual, which):
        """The residual with the finite values sent of `which`, bool [k]; a value of 0 changes no bit."""
        value = self.sent.value.to(residual.dtype)
        which = which & value.isfinite() & (value != 0)
        residual[self.sent.index[which]] += value[which]
        return residual

    def _compare_with_last_step(self, accumulated, score, index):
        if self.sent is None:
            return 0, 0
        chosen = torch.zeros(len(score), dtype=torch.bool)
        chosen[index] = True
        keys, magnitudes = order_keys(score), order_keys(accumulated.abs())
        before_last = torch.zeros_like(chosen)
        for begin, magnitude in _chunks_of(magnitudes, self.chunk or len(score)):
            of_chunk = index[(begin <= index) & (index < begin + len(magnitude))]
            last_key = keys[of_chunk].min()
            last_index = of_chunk[keys[of_chunk] == last_key].max()
            place = begin + torch.arange(len(magnitude))
            before_last[place] = (magnitude > last_key) | ((magnitude == last_key) & (place <= last_index))
        previous = self.sent.index
        return int(chosen[previous].sum()), int((~chosen & before_last)[previous].sum())


def sum_in_rank_order(messages, numel):
    """Z = ((0 + v_0) + v_1) + ... scattered, shape [J], in the wide dtype (+): the order gives every replica the same bits."""
    total = torch.zeros(numel, dtype=accumulate_dtype(messages[0].value.dtype))
    for message in messages:
        total[message.index] += message.value.to(total.dtype)
    return total


def squared_norm(gradient):
    """The squared 2-norm of the finite entries in fp64, in the kernel's order (+): 256 lanes of a tile, then the lanes, then the tiles."""
    squares = torch.where(gradient.isfinite(), gradient, 0.0).double() ** 2
    total = 0.0
    for tile in squares.split(TILE_ENTRIES):
        lanes = torch.zeros(256, dtype=torch.float64)
        for row in tile.split(256):
            lanes[: len(row)] += row
        total += reduce(operator.add, lanes.tolist(), 0.0)
    return total


def zero_entries(gradient, sizes):
    """The entries, bool [J], of parameters of these sizes whose gradient is zero in all entries (+).

    DDP throws the result away for a parameter that no worker used, and writes it for one whose gradient happens to be zero on
    all. With zero as the result, and what was sent taken back, nothing is lost or applied twice in either case.
    """
    return torch.cat([part.eq(0).all().expand(len(part)) for part in gradient.split(sizes)])


@dataclass
class AdaptiveDensity:
    """The density that follows the average's norm on a budget of bytes (+): `regtopk_torch.AdaptiveDensity` says the rule.

    `message_bytes` gives the bytes that k entries of this bucket take on the network.
    """

    mean: float
    power: float
    minimum: float
    maximum: float
    message_bytes: Callable[[int], int]
    density: float | None = None  # of the next step
    average_norm: float = 0.0
    norms: int = 0
    overspent: float = 0.0  # in steps of mean_bytes
    steps: int = 0

    def __post_init__(self):
        self.density = self.mean

    def measure(self, average, *, void):
        numel = average.numel()
        sent, usual = (self.message_bytes(entries_to_send(density, numel)) for density in (self.density, self.mean))
        self.steps += 1
        self.overspent += sent / usual - 1
        self.density = self.mean
        norm = math.sqrt(squared_norm(average)) if not void else 0.0
        if not 0 < norm < math.inf:
            return
        self.norms = min(self.norms + 1, 100)
        self.average_norm += (norm - self.average_norm) / self.norms
        wanted = self._clipped(self.mean * (norm / self.average_norm) ** self.power)
        owed = self.overspent / (6 * max(1, self.steps / 1000))
        self.density = self._clipped(wanted / (1 + owed) if owed > 0 else wanted * (1 - owed))

    def _clipped(self, density):
        return min(max(density, self.minimum), self.maximum)


@dataclass
class Exchange:
    """N workers, one bucket: `average = exchange.step([gradient_0, ...])`, gradients of shape [J].

    `sizes` are the numbers of entries of the bucket's parameters; without them, as the operators, which know no parameters,
    it treats a gradient of zero as any other. With `leader` worker t mod N chooses the support of all in step t (+).
    """

    workers: list = field(default_factory=list)
    sizes: list | None = None
    leader: bool = False
    steps: int = 0
    density: AdaptiveDensity | None = None  # instead of the workers'
    dense: bool = False  # (+) whether all entries are sent, in the next step; a residual goes along, and there is no history after it

    def step(self, gradients):
        """Return Z / N in the gradient's dtype (eq. 1); with `sizes`, zero for parameters whose gradients are zero everywhere."""
        for worker in self.workers if self.density else []:
            worker.density = self.density.density

        def zeros(gradient):
            return zero_entries(gradient, self.sizes) if self.sizes else None

        gradients = [w.correct(each, len(self.workers), zeros(each)) for w, each in zip(self.workers, gradients, strict=True)]
        zero = [zeros(gradient) for gradient in gradients]
        led = self.leader and not self.dense
        messages = self.led_messages(gradients, zero) if led else [w.compress(*given, dense=self.dense) for w, *given in zip(self.workers, gradients, zero, strict=True)]
        self.steps += 1
        dtype, workers = gradients[0].dtype, len(messages)
        total = sum_in_rank_order(messages, gradients[0].numel())
        shared = self.leader or self.dense
        if shared and any(message.non_finite for message in messages):
            total[messages[0].index] = math.nan
        # By a tensor: dividing by a number may multiply by its rounded inverse.
        average = to_wire(total / torch.tensor(float(workers), dtype=total.dtype), dtype)
        void = not bool(average.isfinite().all())
        if shared:
            total = workers * average.to(total.dtype)  # averages travel: more of Z than they say comes to nobody
        idle = torch.stack(zero).all(dim=0) if self.sizes else None
        for worker in self.workers:
            worker.receive(total, void=void, idle=idle)
            worker.feedback = None if self.dense else worker.feedback
        average = average if idle is None else torch.where(idle, torch.zeros_like(average), average)
        if self.density and not self.dense:
            self.density.measure(average, void=void)
        return average

    def led_messages(self, gradients, zero):
        """The messages of all at the support that the leader chooses."""
        leader = self.steps % len(self.workers)
        led = {leader: self.workers[leader].compress(gradients[leader], zero[leader])}
        for rank, worker in enumerate(self.workers):
            if rank != leader:
                led[rank] = worker.compress(gradients[rank], zero[rank], led[leader].index)
        return [message for _, message in sorted(led.items())]


def dense_bytes(numel, dtype, workers, parameters):
    """What a worker sends of a dense bucket (+): to each other one a head and a slice of its values, then 16 bytes and the averages of its
    own slice. A slice is a multiple of 4 entries. `dense="auto"` is where chosen entries take as many bytes or more."""
    entries, head = -(-numel // (4 * workers)) * 4, 64 + 16 + -(-parameters // 64) * 8
    return (workers - 1) * (head + 16 + 2 * entries * dtype.itemsize)


def encode(message, numel, *, step=0, plan=0, elias_fano=False, coded=None):
    """The payload's bytes, uint8: header, entries before each tile, offsets or bitmap, values; see csrc/core/payload.h.

    With values that a narrower dtype holds, with `elias_fano`, or with what `few_bits` returns beside them, in its wire form:
    csrc/core/wire.h.
    """
    k, dtype = len(message.index), message.value.dtype
    bitmap = 16 * k > numel
    starts = torch.searchsorted(message.index, torch.arange(-(-numel // TILE_ENTRIES)) * TILE_ENTRIES).to(torch.int32)
    support = _packed(torch.zeros(numel, dtype=torch.int64).index_fill_(0, message.index, 1)) if bitmap else _bytes((message.index % TILE_ENTRIES).to(torch.uint16))
    codes = [_padded(_bytes(starts)), _padded(support)]
    if elias_fano:
        low_bits = max(bits for bits in range(17) if bits == 0 or numel >> bits >= k)
        high = torch.zeros(k + ((numel - 1) >> low_bits) + 1, dtype=torch.int64)
        high[(message.index >> low_bits) + torch.arange(k)] = 1
        shorter = [_padded(_packed((message.index[:, None] >> torch.arange(low_bits) & 1).flatten())), _padded(_packed(high))]
        elias_fano = sum(map(len, shorter)) < sum(map(len, codes))
        codes = shorter if elias_fano else codes
    flags = 1 if message.non_finite else 0
    header = struct.pack(
        "<IHBBQQQqQQII",
        0x6B707472, 1, {1: 5, 2: 4}[coded[0]] if coded else _WIRE_TYPES[dtype], 2 if elias_fano else int(bitmap), step, numel, k, plan, message.repeated, message.displaced, flags, 0,
    )  # fmt: skip
    values = _bytes(message.value)
    if coded is not None:
        half = torch.float16 if dtype == torch.float16 else torch.bfloat16
        levels = torch.tensor([coded[2].get(tile, [0.0, 0.0]) for tile in range(-(-numel // TILE_ENTRIES))]).to(half)
        values = torch.cat([_padded(_bytes(levels).flatten()), _padded(_packed((coded[1][:, None] >> torch.arange(coded[0]) & 1).flatten()))])
    return _padded(torch.cat([torch.tensor(list(header), dtype=torch.uint8), *codes, values]), 16)


def _packed(bits):
    """Bits, int64, as bytes, from the lowest bit on."""
    padded = torch.zeros(-(-len(bits) // 8) * 8, dtype=torch.int64)
    padded[: len(bits)] = bits
    return (padded.view(-1, 8) << torch.arange(8)).sum(1).to(torch.uint8)


def _padded(part, multiple=8):
    return torch.cat([part, torch.zeros(-len(part) % multiple, dtype=torch.uint8)])


def _bytes(tensor):
    return tensor.contiguous().view(torch.uint8)
