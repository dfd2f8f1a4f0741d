"""What tests of token outputs share: the backends that have them, lengths, and options of every kind."""

from typing import Any

import torch

from fastpool.calls import TokensCall
from fastpool.dispatch import BACKENDS

SERVING = [name for name, module in BACKENDS.items() if module.supports(TokensCall(torch.empty(1, 1, 1))) is None]
LENGTHS = [7, 0, 1, 33, 70]
MORE: list[dict[str, Any]] = [
    {},
    {"truncate_dim": 5},
    {"normalize": True},
    {"truncate_dim": 9, "normalize": True, "out_dtype": torch.float32},
    {"out_dtype": torch.bfloat16},
    {"out_dtype": torch.float16, "normalize": True},
]
