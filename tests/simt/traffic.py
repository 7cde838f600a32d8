"""Print the bytes of global memory that the CUDA kernels load and store per gradient entry, counted in the host emulation.

    python -m tests.simt.traffic [--numel 11181642] [--density 0.001 ...] [--workers 8 ...] [--dtype float32] [--missed]

One step of one worker in the steady state: it sent a payload in the last step, and the payloads of all workers arrive. The
bytes are those the threads ask for, whatever a cache then serves. The limit is what no implementation avoids: read the
gradient and the residual, write the residual and the bucket once each. It needs no GPU and says nothing about time.
"""

import torch

from regtopk_torch import reference
from runlog.command import make_parser
from tests.simt.host import PAYLOADS_VALID, Kernels, aligned, copied

COMPRESS, AGGREGATE = ["settle_kernel", "sample_kernel", "accumulate_kernel", "finish_kernel"], ["check_kernel", "aggregate_kernel"]


def limit(dtype):
    """Bytes per entry that any implementation loads and stores: g and r read, r and the bucket written."""
    wide = reference.accumulate_dtype(dtype)
    return 2 * dtype.itemsize + 2 * wide.itemsize


def gradient_of(numel, dtype, seed):
    """Layers of different scale, as a network has; entries of a layer normal."""
    generator = torch.Generator().manual_seed(seed)
    layers = torch.exp(torch.randn(64, generator=generator)).repeat_interleave(-(-numel // 64))[:numel]
    return copied((torch.randn(numel, generator=generator) * layers).to(dtype))


def payload_of(numel, k, dtype, seed, *, step):
    """A payload of k random entries, as another worker might send."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(numel, generator=generator)[:k].sort().values
    value = torch.randn(k, generator=generator).to(dtype)
    return copied(reference.encode(reference.Message(index, value, False, 0, 0), numel, step=step))


def measure(kernels, numel, density, workers, dtype, *, mu=1.0, missed=False, spans=0):
    """Return {kernel: (bytes loaded, bytes stored)} per entry of one step; `mu=None` is Top-k. None of the spans is idle."""
    k, wide = reference.entries_to_send(density, numel), reference.accumulate_dtype(dtype)
    gradient, residual = gradient_of(numel, dtype, 1), copied(0.3 * gradient_of(numel, dtype, 2).to(wide))
    sent = payload_of(numel, k, dtype, 3, step=0)
    feedback = None if mu is None else aligned(k, wide).uniform_(0, 3, generator=torch.Generator().manual_seed(4))
    residual[_indices(sent, numel, k)] = 0
    sampling = kernels.sampling(numel, k)
    if missed:  # a bracket that holds nothing but the largest samples
        sampling = sampling.replace(rank_high=1, rank_low=1)
    of_both, of_compress = {}, {}
    if spans:
        of_both = {
            "spans": copied(torch.linspace(0, numel, spans + 1, dtype=torch.float64).long()), "idle": aligned(spans, torch.uint8).zero_(),
            "verdict": aligned(4096, torch.int64).fill_(-1),
        }  # fmt: skip
        of_compress = {"counters": aligned(3, torch.int64).zero_(), "sent_round": 0}
    payload = aligned(kernels.payload_bytes(numel, k, dtype, spans), torch.uint8)
    with kernels.traffic() as compress:
        kernels.compress(gradient, residual, payload, k=k, sent=sent, feedback=feedback, mu=mu or 1.0, step=1, sampling=sampling, **of_both, **of_compress)
    others = [payload if spans else payload_of(numel, k, dtype, 10 + n, step=1) for n in range(1, workers)]
    payloads = copied(torch.stack([payload, *others]))
    row = None if mu is None else aligned(k, wide).view(1, k)
    with kernels.traffic() as aggregate:
        status = kernels.aggregate(gradient, payloads, k=k, feedback=row, step=1, **of_both)
    assert status == PAYLOADS_VALID, hex(status)
    result = {}
    for counted in (compress, aggregate):
        for kernel, (loaded, stored) in counted.items():
            before = result.get(kernel, (0, 0))
            result[kernel] = (before[0] + loaded / numel, before[1] + stored / numel)
    return result


def _indices(payload, numel, k):
    """The entries of a payload with offsets or a bitmap, through the reference's layout."""
    tiles = -(-numel // reference.TILE_ENTRIES)
    at = 64 + -(-tiles * 4 // 8) * 8
    if 16 * k > numel:
        bits = payload[at : at + -(-numel // 8)].to(torch.int32)
        return ((bits[:, None] >> torch.arange(8)) & 1).flatten()[:numel].nonzero().flatten()
    starts = payload[64 : 64 + tiles * 4].view(torch.int32).to(torch.int64)
    tile = torch.searchsorted(starts, torch.arange(k), right=True) - 1
    return tile * reference.TILE_ENTRIES + (payload[at : at + 2 * k].view(torch.int16).to(torch.int64) & 0xFFFF)


def total(traffic):
    return sum(loaded + stored for loaded, stored in traffic.values())


def main():
    parser = make_parser("tests.simt.traffic", __doc__)
    parser.add_argument("--numel", type=int, default=11_181_642)
    parser.add_argument("--density", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2, 1e-1])
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--dtype", choices=["float64", "float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--topk", action="store_true", help="Top-k instead of RegTop-k")
    parser.add_argument("--spans", type=int, default=62, help="parameters of the bucket; 0 leaves out what is done for them")
    parser.add_argument("--missed", action="store_true", help="with a bracket that misses the k-th score")
    options = parser.parse_args()
    dtype, mu = getattr(torch, options.dtype), None if options.topk else 1.0
    kernels = Kernels()
    names = (COMPRESS if options.spans else COMPRESS[1:]) + AGGREGATE
    print(f"bytes of global memory per entry, loaded + stored; {options.numel:,} entries of {options.dtype}, "
          f"{'Top-k' if options.topk else 'RegTop-k'}{', bracket forced to miss' if options.missed else ''}")  # fmt: skip
    print(" ".join(["density", " N", *(f"{name.removesuffix('_kernel'):>15}" for name in names), "   total", "limit"]))
    for density in options.density:
        for workers in options.workers:
            traffic = measure(kernels, options.numel, density, workers, dtype, mu=mu, missed=options.missed, spans=options.spans)
            cells = [f"{traffic[name][0]:7.3f}+{traffic[name][1]:7.3f}" for name in names]
            print(" ".join([f"{density:7g}", f"{workers:2d}", *cells, f"{total(traffic):8.3f}", f"{limit(dtype):5d}"]), flush=True)


if __name__ == "__main__":
    main()
