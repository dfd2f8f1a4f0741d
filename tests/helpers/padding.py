"""What stands in padding is nothing to a module, and to its parameters' gradients."""

from typing import Any

import torch

from fastpool.token_rows import in_layout_of, rows


def gradients(module: torch.nn.Module, x: torch.Tensor, arguments: dict[str, Any]) -> list[torch.Tensor]:
    """Of hidden's rows x, then of the parameters."""
    hidden = arguments["hidden"]
    x = x.detach().requires_grad_()
    module(**{**arguments, "hidden": in_layout_of(hidden, x)}).square().sum().backward()
    found = [x.grad, *(parameter.grad for parameter in module.parameters())]
    module.zero_grad()
    return found


def check_padding_gets_nothing(module: torch.nn.Module, arguments: dict[str, Any]) -> None:
    """hidden has NaN wherever there is no token."""
    hidden = arguments["hidden"]
    x = rows(hidden)
    found, expected = (gradients(module, one, arguments) for one in (x, x.nan_to_num(0)))
    assert found[0][x.isnan()].eq(0).all()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
