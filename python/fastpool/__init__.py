"""fastpool: token states to sentence vectors, exact and with the same bits every time."""

# ops defines torch.ops.fastpool.*, and autograd their gradients.
from . import autograd, chunks, functional, nn, ops, quantization, sparse, token_outputs  # noqa: F401
from .dispatch import Explanation, backend, validate
from .functional import *  # noqa: F403  # its __all__: a function stands there once
from .models import PoolingConfig
from .modes import MODES, Mode
from .packing import segments
from .quantization import *  # noqa: F403  # likewise
from .sparse import *  # noqa: F403  # likewise
from .token_outputs import *  # noqa: F403
from .version import __version__

__all__ = ["MODES", "Explanation", "Mode", "PoolingConfig", "__version__", "backend", "chunks", "nn", "segments"]
__all__ += ["validate", *functional.__all__, *quantization.__all__, *sparse.__all__, *token_outputs.__all__]
