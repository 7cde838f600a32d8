"""What the operators need beyond gradient and residual."""

import torch

from tests.gpu_check import machine


def memory(log):
    from regtopk_torch import reference

    for numel, density in [(100_003, 1e-3)] if log.emulated else [(11_200_000, 1e-3), (11_200_000, 1e-2), (124_000_000, 1e-3)]:
        k, workers, dtype = reference.entries_to_send(density, numel), 8, torch.float32
        payload = machine.payload_bytes(numel, k, dtype)
        workspace = machine.library_kernels(log).compress_workspace(numel, k, dtype, has_feedback=True).numel()
        row = {"numel": numel, "density": density, "workers": workers, "payload": payload, "last payload": payload, "gathered payloads": workers * payload}
        row |= {"feedback": 4 * k, "workspace of a stream": workspace, "of the residual": workspace / (4 * numel)}
        if not log.emulated:
            row["allocated by the operators"] = allocated(log, numel, k, dtype)
            # The allocator rounds up.
            log.check(
                row["allocated by the operators"] <= workspace + (4 << 20),
                f"expected no more than the workspace of {workspace} bytes, got {row['allocated by the operators']}",
            )
        log.write("memory", **row)


def allocated(log, numel, k, dtype):
    """Bytes that stay allocated after two steps, beside the operands."""
    kernels = machine.kernels_of(log)
    gradient, residual = torch.randn(numel, device="cuda", dtype=dtype), torch.zeros(numel, device="cuda")
    payloads = [torch.zeros(machine.payload_bytes(numel, k, dtype), dtype=torch.uint8, device="cuda") for _ in range(2)]
    feedback = torch.empty(1, k, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):  # which has no workspace yet, or that of a smaller bucket
        before = torch.cuda.memory_allocated()
        for step in range(2):
            sent, row = (payloads[1 - step % 2], feedback[0]) if step else (None, None)
            kernels.compress(gradient, residual, payloads[step % 2], k=k, sent=sent, feedback=row, step=step)
            kernels.aggregate(gradient.clone(), payloads[step % 2].view(1, -1), k=k, feedback=feedback, step=step)
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated() - before
