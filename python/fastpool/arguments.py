"""What each op takes: every argument stands in one list here. Schemas, the order in which calls are taken apart and put
together, and autograd's positions follow from the lists; C++ takes arguments from its stack in the same order."""

from collections.abc import Iterable
from typing import Any

from .constants import NORM_EPS
from .modes import MODES, Argument, Mode

Arguments = tuple[Argument, ...]

_HIDDEN = Argument("hidden", "Tensor", differentiable=True)
_PER_BATCH = (Argument("mask", "Tensor?", "None"), Argument("cu_seqlens", "Tensor?", "None"))
_BOUNDS = (
    Argument("starts", "Tensor?", "None", keyword=True),
    Argument("ends", "Tensor?", "None", keyword=True),
)
_EPILOGUE = (
    Argument("truncate_dim", "int?", "None", keyword=True),
    Argument("normalize", "bool", "False", keyword=True),
    Argument("out_dtype", "ScalarType?", "None", keyword=True),
)


def _in_order(own: Iterable[Argument]) -> Arguments:
    """Arguments of pooling, its own among them: those that must be given come first, then what every batch may have."""
    own = tuple(own)
    required = (argument for argument in own if argument.default is None)
    by_place = (argument for argument in own if argument.default is not None and not argument.keyword)
    by_name = (argument for argument in own if argument.keyword)
    return (_HIDDEN, *required, *_PER_BATCH, *by_place, *_BOUNDS, *by_name)


def of_pooling(mode: Mode) -> Arguments:
    """The arguments of a mode's op, in its order."""
    return (*_in_order(mode.arguments), *_EPILOGUE)


def _by_place(arguments: Iterable[Argument]) -> Arguments:
    """These arguments without defaults and given by place, as ops take them that only autograd calls; a tensor that
    one mode must be given is none of another's."""
    optional = {"Tensor": "Tensor?"}
    return tuple(
        Argument(one.name, one.type if one is _HIDDEN else optional.get(one.type, one.type)) for one in arguments
    )


_OWN = dict.fromkeys(argument for mode in MODES.values() for argument in mode.arguments)
OF_EVERY_MODE = _in_order(_OWN)
POOL_TENSORS: Arguments = tuple(argument for argument in OF_EVERY_MODE if argument.type.startswith("Tensor"))
# Places in MODES and in GRADIENTS_OF, not names: torch's stable ABI leaks strings that C++ hands on to Python.
GRADIENTS_OF = tuple(argument.name for argument in POOL_TENSORS if argument.differentiable)
POOL_BACKWARD: Arguments = (
    Argument("mode", "int"),
    Argument("of", "int"),
    Argument("gradient", "Tensor"),
    *_by_place(OF_EVERY_MODE),
    Argument("result", "Tensor?"),
)
NORMALIZE: Arguments = (
    Argument("x", "Tensor", differentiable=True),
    Argument("truncate_dim", "int?", "None", keyword=True),
    Argument("truncate_dims", "Tensor?", "None", keyword=True),
    Argument("eps", "float", str(NORM_EPS), keyword=True),
    Argument("out_dtype", "ScalarType?", "None", keyword=True),
)
NORMALIZE_BACKWARD: Arguments = (
    Argument("gradient", "Tensor"),
    Argument("x", "Tensor"),
    Argument("eps", "float"),
    Argument("truncate_dims", "Tensor?", "None"),
)

POOL_SEVERAL: Arguments = (
    Argument("modes", "int"),
    *(argument for argument in _in_order(_OWN) if argument.name not in ("query", "scale")),
    *_EPILOGUE,
)

TOKENS: Arguments = (
    *_in_order(()),
    *_EPILOGUE,
    Argument("total", "int?", "None", keyword=True),
)
TOKENS_BACKWARD: Arguments = (Argument("gradient", "Tensor"), *_by_place(_in_order(())))
QUANTIZE: Arguments = (
    Argument("x", "Tensor"),
    Argument("kind", "int"),  # a place in KINDS
    Argument("ranges", "Tensor?", "None", keyword=True),
    Argument("truncate_dim", "int?", "None", keyword=True),
    Argument("zero_bit", "bool", "False", keyword=True),
)

OPS: dict[str, Arguments] = {
    **{mode.name: of_pooling(mode) for mode in MODES.values()},
    "_pool_several": POOL_SEVERAL,
    "_pool_backward": POOL_BACKWARD,
    "l2_normalize": NORMALIZE,
    "_l2_normalize_backward": NORMALIZE_BACKWARD,
    "tokens": TOKENS,
    "_tokens_backward": TOKENS_BACKWARD,
    "quantize": QUANTIZE,
}
_RETURNS = {"tokens": "(Tensor, Tensor)"}  # of the others: one tensor


def codes(mode: str, of: str) -> tuple[int, int]:
    """The first two arguments of _pool_backward: a mode, and which argument's gradient is asked for."""
    return list(MODES).index(mode), GRADIENTS_OF.index(of)


def schema(op: str) -> str:
    """The op's signature in the words of torch's schemas, without its name."""
    parts, by_name = [], False
    for argument in OPS[op]:
        if argument.keyword and not by_name:
            parts.append("*")
        by_name = argument.keyword
        parts.append(f"{argument.type} {argument.name}" + ("" if argument.default is None else f"={argument.default}"))
    return f"({', '.join(parts)}) -> {_RETURNS.get(op, 'Tensor')}"


def named(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments as an op was given them, by their names; those that were not given are missing."""
    return dict(zip((argument.name for argument in OPS[op]), args), **kwargs)  # noqa: B905  # torch has checked how many


def given(op: str, values: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Values by their names, among others, as the op is to be given them: by place, and by name."""
    by_place = [values[argument.name] for argument in OPS[op] if not argument.keyword]
    return by_place, {argument.name: values[argument.name] for argument in OPS[op] if argument.keyword}
