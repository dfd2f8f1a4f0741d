"""What torch knows of the ops: schemas, fakes, compile, and what they never touch."""

import dataclasses
import inspect
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpool
from fastpool.arguments import GRADIENTS_OF, OPS
from fastpool.calls import (
    NormalizeBackwardCall,
    NormalizeCall,
    PoolBackwardCall,
    PoolCall,
    QuantizeCall,
    TokensBackwardCall,
    TokensCall,
)
from fastpool.modes import MODES
from fastpool.testing import (
    LAYOUTS,
    backward_arguments,
    function_of,
    required,
    sequences,
    taking_turns,
    variants_of_states,
)

OP_LAYOUTS = [name for name in LAYOUTS if name not in ("padded_lengths", "nested")]  # the ops have no such arguments


MORE: dict[str, Any] = {"truncate_dim": 5, "normalize": True, "out_dtype": torch.float64}


@pytest.mark.parametrize(
    ("mode", "given", "layout", "how"),
    taking_turns((False, {}), (True, MORE), (True, {}), (False, MORE), layouts=OP_LAYOUTS),
)
def test_opcheck(mode: str, given: str | None, layout: str, how: tuple[bool, dict[str, Any]]) -> None:
    recorded, more = how
    arguments = LAYOUTS[layout].make(sequences([3, 0, 40], 12, torch.float32), given)
    # Poison is compared with itself here, and NaN never equals: where it goes is other tests' affair.
    arguments = {name: x.nan_to_num(7.0) if x.is_floating_point() else x for name, x in arguments.items()}
    for name in GRADIENTS_OF:
        if name in arguments:
            arguments[name].requires_grad_(recorded)
    by_place = [arguments.pop(name) for name in ("hidden", "query") if name in arguments]
    torch.library.opcheck(getattr(torch.ops.fastpool, mode).default, tuple(by_place), {**arguments, **more})


@pytest.mark.parametrize("layout", OP_LAYOUTS)
@pytest.mark.parametrize(("mode", "given"), variants_of_states())
def test_opcheck_backward(mode: str, given: str | None, layout: str) -> None:
    arguments = LAYOUTS[layout].make(sequences([3, 0, 40], 12, torch.bfloat16), given)
    result = function_of(mode)(**arguments, out_dtype=torch.float32)
    for of in ("hidden", given) if given else ("hidden",):
        taken = backward_arguments(mode, of, torch.ones_like(result), result, **arguments)
        torch.library.opcheck(torch.ops.fastpool._pool_backward.default, tuple(taken))


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_opcheck_l2_normalize(backend: str, recorded: bool) -> None:
    for x in (torch.randn(5), torch.randn(2, 3, 12), torch.randn(3, 4, 12).transpose(0, 1), torch.randn(3, 0)):
        more = {"truncate_dim": 4} if x.shape[-1] else {}
        for truncate_dims in (None, torch.full(x.shape[:-1], 3 if more else 0)):
            with fastpool.backend(backend):
                y = x.detach().requires_grad_(recorded)
                torch.library.opcheck(
                    torch.ops.fastpool.l2_normalize.default, (y,), {**more, "truncate_dims": truncate_dims}
                )
                gradient = torch.ones_like(fastpool.l2_normalize(x, **more))
                torch.library.opcheck(
                    torch.ops.fastpool._l2_normalize_backward.default, (gradient, x, 1e-12, truncate_dims)
                )


def test_autocast_leaves_dtypes_alone() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.float64, torch.float16):
            hidden = torch.ones(1, 2, 3, dtype=dtype, requires_grad=True)
            result = fastpool.mean(hidden, normalize=True)
            assert result.dtype == dtype
            result.sum().backward()
            assert hidden.grad is not None
            assert hidden.grad.dtype == dtype


@pytest.mark.parametrize("mode", MODES)
def test_fakes_and_meta(mode: str) -> None:
    pool = function_of(mode)
    with FakeTensorMode():
        hidden, own = torch.empty(3, 7, 16, dtype=torch.float16), required(mode, (3, 7, 16))
        result = pool(hidden, lengths=torch.empty(3, dtype=torch.int64), truncate_dim=4, **own)
        assert (result.shape, result.dtype, result.stride()) == ((3, 4), torch.float16, (4, 1))
        with pytest.raises(TypeError, match="additive mask"):
            pool(torch.empty(3, 7, 16), mask=torch.empty(3, 7), **own)
    hidden = torch.empty(9, 16, device="meta", requires_grad=True)
    own = {name: value.to("meta") for name, value in required(mode, (9, 16)).items()}
    meta = pool(hidden, cu_seqlens=torch.empty(3, dtype=torch.int64, device="meta"), normalize=True, **own)
    assert (meta.shape, meta.device.type) == ((2, 16), "meta")
    meta.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.shape == (9, 16)


def test_fakes_and_meta_of_dims() -> None:
    with FakeTensorMode():
        x = torch.empty(3, 7, 16, dtype=torch.float16)
        result = fastpool.l2_normalize(x, truncate_dim=9, truncate_dims=torch.empty(3, 7, dtype=torch.int32))
        assert (result.shape, result.dtype, result.stride()) == ((3, 7, 9), torch.float16, (63, 9, 1))
        with pytest.raises(ValueError, match="truncate_dims must have x's shape"):
            fastpool.l2_normalize(x, truncate_dims=torch.empty(3, dtype=torch.int32))
    leaf = torch.empty(3, 16, device="meta", requires_grad=True)
    fastpool.l2_normalize(leaf, truncate_dims=torch.empty(3, dtype=torch.int64, device="meta")).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == (3, 16)


def test_inputs_are_left_alone() -> None:
    batch = sequences([5, 9], 16, torch.float32, holes=True)
    for layout in LAYOUTS.values():
        if not layout.holes:
            continue
        arguments = layout.make(batch, "weights")
        before = {name: value.clone() for name, value in arguments.items()}
        fastpool.weighted_mean(**arguments, normalize=True)
        for name, value in arguments.items():
            assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name


def test_padding_is_not_read() -> None:
    """Padding on pages that nobody may read: touching a byte of them ends the process."""
    code = """
        import torch, fastpool
        from fastpool.testing import function_of, required
        from helpers.pages import PAGE, at_the_edge, forbid
        width = PAGE // 4
        rows = 80
        hidden = at_the_edge(3 * rows * width, torch.float32, behind=True).view(3, rows, width)
        hidden.fill_(1.0)
        real = torch.zeros(3, rows, dtype=torch.bool)
        real[0, :40] = real[1, 30:] = real[2, ::3] = True
        for b, s in (~real).nonzero().tolist():
            forbid(hidden[b, s].data_ptr(), PAGE)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for mode in fastpool.MODES:
                def pool(hidden, **more):
                    function_of(mode)(hidden, **required(mode, hidden.shape), **more)
                pool(hidden, mask=real)
                pool(hidden[:2], starts=torch.tensor([0, 30]), ends=torch.tensor([40, 80]))
                pool(hidden.view(-1, width), starts=torch.tensor([0, 110]), ends=torch.tensor([40, 160]))
        print("not read", flush=True)
        hidden[0, 79].sum()
        print("read")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    # The last line of the program proves that the pages were protected.
    assert done.stdout.strip() == "not read", done.stderr
    assert done.returncode < 0


def test_no_temporaries_of_the_inputs_size() -> None:
    """The library's own memory: 512 MB are pooled while the process may take hardly any more."""
    code = """
        import resource, torch, fastpool
        from fastpool.testing import function_of, required
        torch.set_num_threads(2)
        hidden = torch.ones(4, 32768, 1024)
        mask = torch.ones(4, 32768, dtype=torch.bool)
        fastpool.mean(hidden[:, :64], mask[:, :64])
        for mode in fastpool.MODES:
            own = required(mode, hidden.shape)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            function_of(mode)(hidden, mask=mask, normalize=True, **own)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown < 16 * 1024, (mode, grown)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mode", [*MODES, "tokens"])
def test_functions_take_what_ops_take(mode: str) -> None:
    """A function's signature is the op's list of arguments, and two that are Python's alone; splade's also says which
    op, and calls the first logits."""
    if mode in MODES and MODES[mode].of_logits:
        signature = inspect.signature(fastpool.splade)
        parameters = {name.replace("logits", "hidden"): one for name, one in signature.parameters.items()}
        assert {parameters.pop(name).kind for name in ("pooling", "activation")} == {inspect.Parameter.KEYWORD_ONLY}
    else:
        parameters = dict(inspect.signature(function_of(mode)).parameters)
    assert [name for name in parameters if name not in ("lengths", "unknown")] == [one.name for one in OPS[mode]]
    for one in OPS[mode]:
        assert (parameters[one.name].kind is inspect.Parameter.KEYWORD_ONLY) == one.keyword
    assert {"lengths", "unknown"} < set(parameters)


def test_calls_hold_what_ops_take() -> None:
    """Every argument of a list is a field of the call, or of the one that it holds, with the list's default."""
    for op, kinds in {
        **dict.fromkeys(MODES, (PoolCall,)),
        "_pool_backward": (PoolBackwardCall, PoolCall),
        "l2_normalize": (NormalizeCall,),
        "_l2_normalize_backward": (NormalizeBackwardCall, NormalizeCall),
        "quantize": (QuantizeCall,),
        "tokens": (TokensCall,),
        "_tokens_backward": (TokensBackwardCall, TokensCall),
    }.items():
        fields = {field.name: field for kind in reversed(kinds) for field in dataclasses.fields(kind)}
        for one in OPS[op]:
            assert one.name in fields, (op, one.name)
            if one.default is not None:
                assert str(fields[one.name].default) == one.default


def test_there_are_few_ops() -> None:
    """A forward op for each mode, one for several, and as many for gradients as there are kinds of calls that have any;
    and quantize."""
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastpool::")}
    assert names == {*OPS, *(f"_python_{op}" for op in OPS)}
    assert len(OPS) == len(MODES) + 7
    assert not [op for op in OPS if any(one.type == "str" for one in OPS[op])]  # which torch's stable ABI leaks
