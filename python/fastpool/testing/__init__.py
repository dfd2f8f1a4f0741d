"""Inputs and answers that tests share: ragged batches in every layout, and the plainest float64 formula of each mode.

A `Sequence` is one text: its token states, which of them are real (holes), and weights. `LAYOUTS` turn a list of them
into the arguments of a pooling function, each in its own way, with NaN wherever no token is. `given` names the argument
of its own that a mode gets beside them: "weights", "scores", "query" or None.
"""

from .answers import (
    backward_arguments,
    exact,
    function_of,
    gradients,
    own_arguments,
    required,
    variants,
    variants_of_states,
)
from .comparisons import bits, error, same_bits
from .inputs import (
    DTYPES,
    EPS,
    Sequence,
    Target,
    cpu_backends,
    every_norm,
    moved,
    sequences,
    special_values,
)
from .layouts import LAYOUTS, Layout, taking_turns

__all__ = [
    "DTYPES", "EPS", "LAYOUTS", "Layout", "Sequence", "Target", "backward_arguments", "bits", "cpu_backends", "error",
    "every_norm", "exact", "function_of", "gradients", "moved", "own_arguments", "required", "same_bits", "sequences",
    "special_values", "taking_turns", "variants", "variants_of_states",
]  # fmt: skip
