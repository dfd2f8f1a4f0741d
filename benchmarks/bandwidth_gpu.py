"""The measured ceiling of a GPU: a kernel that reads and hardly writes.

A copy would not do: it shares the memory's bandwidth between reads and writes, and pooling hardly writes.
"""

from collections.abc import Callable

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

Read = Callable[[], Tensor]
# Words of a block, warps, and programs per processor, which then walk over the blocks in turn (0: one for every block).
SHAPES = ((4096, 8, 8), (8192, 8, 4), (2048, 4, 16), (4096, 8, 0), (8192, 8, 0))

if triton is not None:

    @triton.jit
    def read_kernel(words, sums, count, BLOCK: tl.constexpr):  # noqa: N803  # as Triton names constants
        columns = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.int32)
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, count, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = start + columns
            total += tl.load(words + at, mask=at < count, other=0)
        tl.store(sums + tl.program_id(0), tl.sum(total.to(tl.int64), 0))


def _words(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.int32)


def _triton_read(block: int, warps: int, per_processor: int) -> Callable[[Tensor], Read]:
    def prepare(tensor: Tensor) -> Read:
        words = _words(tensor)
        blocks = -(-words.numel() // block)
        programs = min(blocks, per_processor * sm_count(tensor.device)) if per_processor else blocks
        sums = torch.empty(programs, dtype=torch.int64, device=tensor.device)

        def read() -> Tensor:
            read_kernel[(programs,)](words, sums, words.numel(), BLOCK=block, num_warps=warps)
            return sums

        return read

    return prepare


def _torch_sum(tensor: Tensor) -> Read:
    words = _words(tensor).view(torch.float32)
    return words.sum


def sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


# Each makes, of a tensor, a call that reads its bytes once.
READERS: dict[str, Callable[[Tensor], Read]] = {"torch.sum": _torch_sum}
if triton is not None:
    READERS |= {f"Triton {block}x{warps}x{per}": _triton_read(block, warps, per) for block, warps, per in SHAPES}


def reads_all(reader: str, tensor: Tensor) -> bool:
    """Whether a reader works here and has seen every word: sums wrap around, so their order does not matter."""
    try:
        seen = READERS[reader](tensor)()
    except Exception:  # a Triton that does not get along with this machine costs its readers, not the run
        return False
    return reader == "torch.sum" or int((seen.sum() - _words(tensor).long().sum()) % 2**32) == 0
