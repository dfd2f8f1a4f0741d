"""fastpool.tokens where torch makes graphs and transforms of it, and fastpool.keep_mask."""

import re
from typing import Any

import pytest
import torch
from helpers.token_outputs import SERVING
from torch import Tensor

import fastpool
from fastpool.calls import TokensCall
from fastpool.dispatch import BACKENDS
from fastpool.testing import LAYOUTS, same_bits, sequences

OP_LAYOUTS = [name for name in LAYOUTS if name not in ("padded_lengths", "nested")]  # the op has no such arguments
HIDDEN, MASK = torch.randn(3, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]])


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    "more", [{}, {"truncate_dim": 5, "normalize": True, "out_dtype": torch.float64}, {"total": 99}]
)
@pytest.mark.parametrize("layout", OP_LAYOUTS)
def test_opcheck(layout: str, more: dict[str, Any], recorded: bool) -> None:
    arguments = LAYOUTS[layout].make(sequences([3, 0, 40], 12, torch.float32), None)
    hidden = arguments.pop("hidden").nan_to_num(7.0).requires_grad_(recorded)
    torch.library.opcheck(torch.ops.fastpool.tokens.default, (hidden,), {**arguments, **more})
    rows = int(fastpool.tokens(hidden, **arguments)[1][-1])
    given = [arguments.get(name) for name in ("mask", "cu_seqlens", "starts", "ends")]
    gradient = torch.ones(rows, 12)
    torch.library.opcheck(torch.ops.fastpool._tokens_backward.default, (gradient, hidden.detach(), *given))


@pytest.mark.parametrize("more", [{}, {"total": 20}, {"normalize": True, "truncate_dim": 3}])
def test_whole_graph_and_its_gradient(more: dict[str, Any]) -> None:
    """A number of rows that depends on data, too."""

    def model(hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        values, cu_seqlens = fastpool.tokens(hidden * 2, mask, **more)
        return values * 3, cu_seqlens

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for mask in (MASK, MASK.flip(1), MASK * 0, None):
        leaves = [HIDDEN.clone().requires_grad_() for _ in range(2)]
        (values, cu_seqlens), (expected, offsets) = compiled(leaves[0], mask), model(leaves[1], mask)
        assert same_bits(values, expected)
        assert torch.equal(cu_seqlens, offsets)
        for result, leaf in ((values, leaves[0]), (expected, leaves[1])):
            result.pow(2).sum().backward()
            assert leaf.grad is not None
        assert same_bits(leaves[0].grad, leaves[1].grad)


class Model(torch.nn.Module):
    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return fastpool.tokens(hidden + 1, mask, normalize=True)


def test_export_and_aot_inductor(tmp_path: Any) -> None:
    batch, rows = torch.export.Dim("batch"), torch.export.Dim("rows")
    shapes = {"hidden": {0: batch, 1: rows}, "mask": {0: batch, 1: rows}}
    program = torch.export.export(Model(), (torch.randn(2, 7, 8), torch.ones(2, 7).bool()), dynamic_shapes=shapes)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    expected = Model()(HIDDEN, MASK.bool())
    for model in (program.module(), torch._inductor.aoti_load_package(package)):
        for value, wanted in zip(model(HIDDEN, MASK.bool()), expected, strict=True):
            assert same_bits(value, wanted) if wanted.is_floating_point() else torch.equal(value, wanted)


def test_torch_func() -> None:
    def squares(hidden: Tensor) -> Tensor:
        return fastpool.tokens(hidden, MASK, normalize=True)[0][:, 0].pow(2).sum()

    leaf = HIDDEN.clone().requires_grad_()
    squares(leaf).backward()
    assert same_bits(torch.func.grad(squares)(HIDDEN), leaf.grad)


def test_a_backend_that_has_none_says_so() -> None:
    for name in BACKENDS.keys() - SERVING:
        reason = re.escape(BACKENDS[name].supports(TokensCall(HIDDEN)) or "")
        words = f"^fastpool.tokens: backend '{name}' was asked for and cannot serve this call: {reason}$"
        with fastpool.backend(name), pytest.raises(RuntimeError, match=words):
            fastpool.tokens(HIDDEN)
        assert fastpool.explain(HIDDEN, MASK, mode="tokens", normalize=True).reasons[name]
    with pytest.raises(ValueError, match=r"^fastpool.explain: tokens takes no weights$"):
        fastpool.explain(HIDDEN, mode="tokens", weights=HIDDEN[..., 0])
    with pytest.raises(ValueError, match=r"^fastpool.tokens: lengths must lie between 0 and 5, got lengths\[2\] = 6$"):
        fastpool.explain(HIDDEN, mode="tokens", lengths=torch.tensor([0, 1, 6]))


def test_options() -> None:
    for name, value, kind in (("total", 3.5, "an int"), ("truncate_dim", True, "an int"), ("normalize", 1, "a bool")):
        with pytest.raises(TypeError, match=f"^fastpool.tokens: {name} must be {kind}, got {type(value).__name__}$"):
            fastpool.tokens(HIDDEN, **{name: value})  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match=r"^fastpool.tokens has no dim: "):
        fastpool.tokens(HIDDEN, dim=3)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'modes'"):
        fastpool.tokens(HIDDEN, modes=3)  # type: ignore[arg-type]  # on purpose


def test_the_nested_form() -> None:
    values, cu_seqlens = fastpool.tokens(HIDDEN, MASK)
    nested = torch.nested.nested_tensor_from_jagged(values, cu_seqlens)
    for b, tokens in enumerate(nested.unbind()):
        assert torch.equal(tokens, HIDDEN[b][MASK[b].bool()])
    assert same_bits(fastpool.mean(nested), fastpool.mean(HIDDEN, MASK))


# ---- keep_mask

IDS = torch.tensor([[5, 7, 9, 7, 0], [9, 9, 1, 0, 0]])
REAL = IDS != 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_keep_mask(dtype: torch.dtype, as_tensor: bool) -> None:
    def listed(*ids: int) -> Any:
        return torch.tensor(ids, dtype=torch.int32) if as_tensor else list(ids)

    ids = IDS.to(dtype)
    for mask in (None, REAL, REAL.long(), REAL.byte()):
        for skip in (None, (), (7,), (7, 9, 4)):
            for keep in (None, (), (9,), (7, 9, 0)):
                given = {
                    name: listed(*values) for name, values in (("skip", skip), ("keep", keep)) if values is not None
                }
                kept = fastpool.keep_mask(ids, mask, **given)
                expected = [
                    [
                        (mask is None or bool(REAL[b, i]))
                        and (skip is None or x not in skip)
                        and (keep is None or x in keep)
                        for i, x in enumerate(row)
                    ]
                    for b, row in enumerate(IDS.tolist())
                ]
                assert kept.dtype == torch.bool
                assert kept.tolist() == expected
    assert fastpool.keep_mask(ids[0], skip=listed(7)).tolist() == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"ids": [1, 2]}, TypeError, "ids must be a torch.Tensor, got list"),
        ({"ids": IDS.float()}, TypeError, "ids must be int8, int16, int32, int64 or uint8, got float32"),
        ({"ids": IDS.bool()}, TypeError, "ids must be int8, .*, got bool"),
        ({"mask": REAL.tolist()}, TypeError, "mask must be a torch.Tensor, got list"),
        ({"mask": REAL.float()}, TypeError, "mask must be bool or an integer type, got float32"),
        ({"mask": REAL[:1]}, ValueError, r"mask must have ids' shape, \[2, 5\], got \[1, 5\]"),
        ({"mask": REAL.to("meta")}, ValueError, "mask must be on ids' device, cpu, got meta"),
        ({"skip": torch.tensor([1], device="meta")}, ValueError, "skip must be on ids' device, cpu, got meta"),
        ({"skip": torch.tensor([1.0])}, TypeError, "skip must be int8, .*, got float32"),
        ({"keep": 7}, TypeError, "keep must be a sequence of ints or a tensor, got int"),
        ({"keep": "ab"}, TypeError, "keep must be a sequence of ints or a tensor, got str"),
        ({"keep": [1, "x"]}, TypeError, r"keep\[1\] must be an int, got str"),
        ({"skip": [True]}, TypeError, r"skip\[0\] must be an int, got bool"),
    ],
)
def test_keep_mask_errors(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^fastpool.keep_mask: {words}$"):
        fastpool.keep_mask(**{"ids": IDS, **arguments})


def test_a_mask_that_numbers_texts_is_no_mask_to_keep() -> None:
    """What comes out would tell nobody any more."""
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.int8, torch.uint16):
        mask = torch.tensor([[1, 0, 1, 2, 2]], dtype=dtype)
        with pytest.raises(ValueError, match=r"keep_mask: mask must be 0 and 1, got mask\[0, 3\] = 2; .*segments"):
            fastpool.keep_mask(torch.arange(5)[None], mask)


def test_keep_mask_of_freed_memory() -> None:
    for name in ("mask", "skip"):
        freed = torch.ones(1, 5, dtype=torch.int64)
        freed.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"keep_mask: {name} must have memory"):
            fastpool.keep_mask(torch.arange(5)[None], **{name: freed})


def test_keep_mask_in_a_graph() -> None:
    punctuation = torch.tensor([7, 4])
    compiled = torch.compile(
        lambda ids, mask, skip: fastpool.keep_mask(ids, mask, skip=skip), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(IDS, REAL, punctuation), fastpool.keep_mask(IDS, REAL, skip=[7, 4]))
