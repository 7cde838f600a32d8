"""States with published settings, each with its source and with what differs from it."""

from regtopk_torch.states import TopKState


def sparse_loco(k=64, chunk=4096, decay=0.95, **options):
    """A state with the settings of SparseLoCo, for the averages of local steps: `rt.LocalSteps(model, adamw, sparse_loco(), every=30)`.

    Source: Sarfi, Thérien, Lidin, Belilovsky, "Communication Efficient LLM Pre-training with SparseLoCo", arXiv 2508.15706. Each replica
    takes some steps of AdamW; the difference of its weights to the common ones is added to what was held back times `decay`; of every
    `chunk` entries of that the `k` largest travel, in 2 bits each; what they carry is subtracted from what is held back, and the
    replicas' average is subtracted from the common weights, at an outer learning rate and without outer momentum.

    Deviations, so far as the method is described or code for it was seen:
        Chunks are consecutive entries of all tensors of one dtype, one after the other in row-major order. There a chunk ends with its
        tensor, and of a matrix it is a block whose sides divide the matrix's, at most 64 × 64.
        The last, shorter chunk sends its share of k, at least 1; there a smaller block sends k as well.
        Two bits are a sign and one of two levels, shared by 65,536 consecutive entries and made as `wire_dtype` of TopKState says. There
        they are four levels around the mean of the values sent of a tensor, as far apart as their standard deviation says.
        Places travel in the Elias-Fano code.
        The outer learning rate is that of LocalSteps: 1, or its `outer`. Idle parameters do not decay.
        Equal magnitudes go to the smaller index, and a round that is not finite is void on all ranks.

    Args:
        k, chunk (int): entries that travel of so many.
        decay (float): of what is held back.
        options: further ones of TopKState, or others than these.

    Raises:
        ValueError: k or another option out of range.
    """
    if not 1 <= k <= chunk:
        raise ValueError(f"sparse_loco: expected 1 <= k <= chunk={chunk}, got k={k}")
    return TopKState(**{"density": k / chunk, "decay": decay, "wire_dtype": "2bit", "chunk": chunk, **options})
