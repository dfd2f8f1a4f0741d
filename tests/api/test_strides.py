"""Any strides: a tensor whose last dimension is not contiguous gives the bits of its contiguous copy, everywhere."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.cuda_host import Host
from torch import Tensor

import fastpool
from fastpool.modes import MODES
from fastpool.testing import backward_arguments, cpu_backends, function_of, gradients, required, same_bits

# Of a contiguous [..., D]: the same values, laid out so that columns are not side by side.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every third": lambda x: x.repeat_interleave(3, dim=-1)[..., ::3],
    "columns first": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "one value": lambda x: x[..., :1].expand(x.shape),
}


# A backend's copy is one for all of its kernels, so that slow ones need few of these.
MODES_OF = {"native": tuple(MODES), "reference": tuple(MODES), "triton": ("max", "weighted_mean")}
LAYOUTS_OF = {"native": tuple(LAYOUTS), "reference": tuple(LAYOUTS), "triton": ("every third",)}


@pytest.mark.parametrize(
    ("backend", "layout"), [(backend, layout) for backend in cpu_backends() for layout in LAYOUTS_OF[backend]]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_pooling_and_its_gradients(dtype: torch.dtype, backend: str, layout: str) -> None:
    """Padded and packed, by the function and the raw op."""
    hidden = LAYOUTS[layout](torch.randn(3, 7, 6).to(dtype))
    assert hidden.stride(-1) != 1
    before = hidden.clone()
    for mode in MODES_OF[backend]:
        pool, raw = function_of(mode), getattr(torch.ops.fastpool, mode)
        weights = {"weights": torch.rand(3, 7)} if MODES[mode].takes_weights else {}
        padded = {"hidden": hidden, "mask": torch.rand(3, 7) < 0.7, **weights, **required(mode, (3, 7, 6))}
        packed = {"hidden": hidden[1], "cu_seqlens": torch.tensor([0, 3, 3, 6]), **required(mode, (7, 6))}
        more = {"truncate_dim": 5, "normalize": True, "out_dtype": torch.float32}
        for given, options in ((padded, {}), (packed, more)):
            copied = {**given, "hidden": given["hidden"].contiguous()}
            expected = pool(**copied, **options)
            gradient = torch.randn(expected.shape).to(expected.dtype)
            with fastpool.backend(backend):
                assert same_bits(raw(**given, **options), expected)
                found = gradients(pool, given, gradient, **options)
            assert all(map(same_bits, found, gradients(pool, copied, gradient, **options)))
    assert torch.equal(hidden, before)


@pytest.mark.parametrize(
    ("backend", "layout"), [(backend, layout) for backend in cpu_backends() for layout in LAYOUTS_OF[backend]]
)
def test_normalisation_and_its_gradient(backend: str, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 3, 8))
    gradient = torch.randn(2, 3, 7)
    more = {"truncate_dim": 7, "truncate_dims": torch.tensor([[0, 3, 7], [1, 7, 2]])}
    with fastpool.backend(backend):
        assert same_bits(fastpool.l2_normalize(x, **more), fastpool.l2_normalize(x.contiguous(), **more))
        both = [gradients(fastpool.l2_normalize, {"x": one}, gradient, **more) for one in (x, x.contiguous())]
        assert same_bits(both[0][0], both[1][0])
        assert same_bits(fastpool.l2_normalize(x[0, 0]), fastpool.l2_normalize(x[0, 0].contiguous()))


def strided_gradients() -> list[Tensor]:
    return [
        torch.randn(8, 3).T,
        torch.randn(3, 1).expand(3, 8),
        torch.randn(3, 16)[:, ::2],
        torch.randn(()).expand(3, 8),
    ]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gradients_of_any_strides(backend: str) -> None:
    hidden, x = torch.randn(3, 5, 8), torch.randn(3, 8)
    with fastpool.backend(backend):
        for gradient in strided_gradients():
            for function, given in ((fastpool.max, {"hidden": hidden}), (fastpool.l2_normalize, {"x": x})):
                both = [gradients(function, given, one) for one in (gradient, gradient.contiguous())]
                assert same_bits(both[0][0], both[1][0])


def test_the_cuda_sources(host: Host) -> None:
    hidden = LAYOUTS["every third"](torch.randn(3, 7, 6))
    assert same_bits(host("mean", {"hidden": hidden}, normalize=True), fastpool.mean(hidden, normalize=True))
    assert same_bits(host.ops.l2_normalize(hidden), fastpool.l2_normalize(hidden))
    largest = fastpool.max(hidden)
    given = backward_arguments("max", "hidden", torch.ones(3, 6), largest, hidden=hidden)
    assert same_bits(*(ops._pool_backward(*given) for ops in (host.ops, torch.ops.fastpool)))
    given = (torch.ones(3, 7, 6), hidden, 1e-12)
    assert same_bits(host.ops._l2_normalize_backward(*given), torch.ops.fastpool._l2_normalize_backward(*given))


def test_nothing_to_copy() -> None:
    for shape in ((0, 4, 6), (2, 0, 6), (2, 4, 0), (2, 4, 1)):
        hidden = torch.randn(*shape[:-2], shape[-1], shape[-2]).mT
        assert same_bits(fastpool.mean(hidden), fastpool.mean(hidden.contiguous()))
        assert same_bits(fastpool.l2_normalize(hidden), fastpool.l2_normalize(hidden.contiguous()))


def both_ops(hidden: Tensor, mask: Tensor) -> Tensor:
    return fastpool.l2_normalize(fastpool.mean(hidden.mT, mask).T, truncate_dim=2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    hidden, mask = torch.randn(3, 6, 5, requires_grad=True), torch.ones(3, 5).bool()
    compiled = torch.compile(both_ops, fullgraph=True, backend=backend)
    gradient = torch.randn(6, 2)
    found, expected = (
        (result, torch.autograd.grad(result, hidden, gradient)[0])
        for result in (compiled(hidden, mask), both_ops(hidden, mask))
    )
    assert all(same_bits(one, other) for one, other in zip(found, expected, strict=True))


def test_exported_and_packaged(tmp_path: Any) -> None:
    class Both(torch.nn.Module):
        def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
            return both_ops(hidden, mask)

    given = (torch.randn(3, 6, 5), torch.ones(3, 5).bool())
    exported = torch.export.export(Both(), given)
    assert same_bits(exported.module()(*given), both_ops(*given))
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "both.pt2"))
    assert same_bits(torch._inductor.aoti_load_package(package)(*given), both_ops(*given))


def test_opcheck() -> None:
    hidden = torch.randn(2, 6, 5).mT
    for given in (hidden, hidden.detach().requires_grad_()):
        torch.library.opcheck(torch.ops.fastpool.max.default, (given,))
        torch.library.opcheck(torch.ops.fastpool.l2_normalize.default, (given,))
