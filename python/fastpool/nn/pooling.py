"""Pooling by one mode or several, and normalising, as modules. Their state is what they were made with."""

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from .. import functional
from ..checks import check_float
from ..constants import NORM_EPS
from ..options import check_eps, mode_names, option, optional_count, refuse
from .ending import Ending, given


class Pooling(Ending):
    """One vector for each segment of token states: fastpool.mean and the like, or several of them side by side.

    Several modes are concatenated, [B, len(mode) * H], in their order; `truncate_dim` and `normalize` then apply to the
    whole, and modes that are cut off are not computed. Each mode's vector stays in the accumulator's precision
    (float32; float64 for float64 hidden) until the result is rounded, once. A sequence of one mode is that mode.

    Args:
        mode: a function's name ("mean", "max", "cls", ...; fastpool.MODES has them all), or a sequence of them; not
            "attention", whose query AttentionPooling learns.
        truncate_dim: keep the first `truncate_dim` columns only (Matryoshka); truncation comes before normalisation.
        normalize: divide each vector by max(its L2 norm, 1e-12).
        out_dtype: of the result; hidden's dtype if not given.

    Calls take the arguments of the functions, in every layout that they know:
    `pooling(hidden, mask, cu_seqlens, weights, scores=, lengths=, starts=, ends=)`; weights and scores go to the modes
    that take them.

    Returns:
        [B, truncate_dim or len(mode) * H]. Gradients flow to hidden, weights and scores; where several modes give one,
        each is rounded before they are added.

    Raises:
        TypeError: an argument of the wrong type; in calls, what the functions raise.
        ValueError: an unknown mode, none at all, truncate_dim below 1; in calls, what the functions raise, truncate_dim
            beyond the columns there are, weights or scores that no mode takes.

    >>> fastpool.nn.Pooling("mean", truncate_dim=256, normalize=True)(hidden, mask)
    """

    def __init__(
        self,
        mode: str | Sequence[str],
        truncate_dim: int | None = None,
        normalize: bool = False,
        out_dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__(truncate_dim, normalize, out_dtype, unknown)
        names = mode_names(self._name, "mode", mode, without=("query",))
        self.mode = mode if isinstance(mode, str) else names

    @property
    def modes(self) -> tuple[str, ...]:
        """All modes, be it one."""
        return (self.mode,) if isinstance(self.mode, str) else self.mode

    def extra_repr(self) -> str:
        return ", ".join([repr(self.mode), *self._options()])

    def forward(
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        weights: Tensor | None = None,
        *,
        scores: Tensor | None = None,
        lengths: Tensor | None = None,
        starts: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> Tensor:
        return functional.pool(
            hidden, mask, cu_seqlens, weights, scores, modes=self.modes, lengths=lengths, starts=starts, ends=ends,
            truncate_dim=self.truncate_dim, normalize=self.normalize, out_dtype=self.out_dtype,
        )  # fmt: skip


class Normalize(torch.nn.Module):
    """x / max(norm(x), eps) over the last dimension of at most 64: fastpool.l2_normalize.

    Args:
        truncate_dim: keep the first `truncate_dim` columns only; truncation comes before normalisation.
        eps: vectors shorter than this are divided by it instead.
        out_dtype: of the result; x's dtype if not given.

    Calls take `normalize(x, truncate_dims)`: each vector is then cut to a number of columns of its own, as the function
    has it.

    Returns:
        x's shape with `truncate_dim` columns, rounded once. Gradients flow to x.

    Raises:
        TypeError: an argument of the wrong type; in calls, what the function raises.
        ValueError: truncate_dim below 1, eps below 0; in calls, what the function raises.
    """

    def __init__(
        self,
        truncate_dim: int | None = None,
        eps: float = NORM_EPS,
        out_dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        super().__init__()
        name = "fastpool.nn.Normalize"
        if unknown:
            refuse(name, unknown)
        if out_dtype is not None:
            check_float(name, "out_dtype", out_dtype)
        self.truncate_dim = optional_count(name, "truncate_dim", truncate_dim)
        self.eps = option(name, "eps", eps, float)
        check_eps(name, self.eps)
        self.out_dtype = out_dtype

    def extra_repr(self) -> str:
        return ", ".join(
            given(truncate_dim=(self.truncate_dim, None), eps=(self.eps, NORM_EPS), out_dtype=(self.out_dtype, None))
        )

    def forward(self, x: Tensor, truncate_dims: Tensor | None = None) -> Tensor:
        return functional.l2_normalize(
            x, truncate_dim=self.truncate_dim, truncate_dims=truncate_dims, eps=self.eps, out_dtype=self.out_dtype
        )
