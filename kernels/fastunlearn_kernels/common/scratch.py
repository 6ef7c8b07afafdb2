"""Where launchers get the memory that their kernels write: outputs, partial sums and tickets.

One place, so that a test can poison what a kernel ought to overwrite (`POISON`), and so that no launcher calls
`torch.empty`. Not a cache of buffers: torch's allocator is one, except for the tickets, which must start at zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Set by the tests: fill what is handed out with NaN (integers: 0xA5), so that an element nobody writes is noticed.
POISON = False

_tickets: dict[tuple[torch.device, int], Tensor] = {}


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor."""
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    if POISON:
        out.fill_(float("nan") if dtype.is_floating_point else 0xA5 if dtype == torch.uint8 else -91)
    return out


def ticket(device: torch.device) -> Tensor:
    """One int32 per device and stream, zero between launches: each program draws a number, the last one sums up.

    The last program sets it back to zero, so that no launch is needed for that.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in _tickets:
        _tickets[device, stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return _tickets[device, stream]
