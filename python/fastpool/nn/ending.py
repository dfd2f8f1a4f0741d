"""How a module's vectors end: truncated, normalised, rounded."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import functional
from ..checks import check_float, has_rows
from ..options import option, optional_count, refuse


def given(**options: tuple[Any, Any]) -> list[str]:
    """name=value, of those whose value is not their default."""
    return [f"{name}={value!r}" for name, (value, default) in options.items() if value != default]


def end(x: Tensor, truncate_dim: int | None, normalize: bool, out_dtype: torch.dtype) -> Tensor:
    """The first columns of vectors in the accumulator's precision, normalised, rounded once."""
    if normalize:
        return functional.l2_normalize(x, truncate_dim=truncate_dim, out_dtype=out_dtype)
    return x[..., :truncate_dim].to(out_dtype)


def check_ending(name: str, options: dict[str, Any]) -> None:
    """Raises TypeError for options that are none of Ending's; their values it looks at itself."""
    unknown = {one: value for one, value in options.items() if one not in ("truncate_dim", "normalize", "out_dtype")}
    if unknown:
        refuse(name, unknown)


class Ending(torch.nn.Module):
    """A module with the options that every pooling function has.

    Raises:
        TypeError: an option of the wrong type, or one that there is not.
        ValueError: truncate_dim below 1.
    """

    def __init__(
        self,
        truncate_dim: int | None,
        normalize: bool,
        out_dtype: torch.dtype | None,
        unknown: dict[str, NoReturn],
    ) -> None:
        super().__init__()
        if unknown:
            refuse(self._name, unknown)
        if out_dtype is not None:
            check_float(self._name, "out_dtype", out_dtype)
        self.truncate_dim = optional_count(self._name, "truncate_dim", truncate_dim)
        self.normalize = option(self._name, "normalize", normalize, bool)
        self.out_dtype = out_dtype

    def _made_with(self, device: torch.device | str | int | None, dtype: torch.dtype | None) -> dict[str, Any]:
        """What torch's modules take for their parameters."""
        if dtype is not None:
            check_float(self._name, "dtype", dtype)
        return {"device": device, "dtype": dtype}

    @property
    def _name(self) -> str:
        return f"fastpool.nn.{type(self).__name__}"

    def _options(self) -> list[str]:
        """Those that are not their defaults."""
        return given(
            truncate_dim=(self.truncate_dim, None), normalize=(self.normalize, False), out_dtype=(self.out_dtype, None)
        )

    def _keep_at_most(self, columns: int) -> None:
        """Raises ValueError where truncate_dim asks for more."""
        if self.truncate_dim is not None and self.truncate_dim > columns:
            raise ValueError(
                f"{self._name}: truncate_dim must lie between 1 and the columns of a vector, {columns}, "
                f"got {self.truncate_dim}"
            )

    def _check_width(self, hidden: Tensor, width: int) -> None:
        """Raises ValueError for token states of another width; what they are else, the functions look at."""
        if has_rows(hidden) and hidden.shape[-1] != width:
            raise ValueError(f"{self._name}: hidden must have {width} columns, got {hidden.shape[-1]}")
