"""Options are of the types they say, the same in functions, modules and PoolingConfig."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import fastpool
from fastpool.modes import MODES
from fastpool.testing import function_of, required, same_bits

HIDDEN = torch.randn(2, 5, 8)
POOLS = {f"fastpool.{mode}": partial(function_of(mode), HIDDEN, **required(mode, HIDDEN.shape)) for mode in MODES}

MODULES = {
    "fastpool.nn.Pooling": partial(fastpool.nn.Pooling, "mean"),
    "fastpool.nn.AttentionPooling": partial(fastpool.nn.AttentionPooling, 8),
    "fastpool.nn.MultiheadPooling": partial(fastpool.nn.MultiheadPooling, 8, 2),
}

# Who takes an option, by the name that errors begin with.
OWNERS: dict[str, dict[str, Callable[..., object]]] = {
    "truncate_dim": {
        **POOLS,
        "fastpool.l2_normalize": partial(fastpool.l2_normalize, HIDDEN),
        **MODULES,
        "fastpool.nn.Normalize": fastpool.nn.Normalize,
        "fastpool.PoolingConfig": partial(fastpool.PoolingConfig, ("mean",)),
    },
    "normalize": {
        **POOLS,
        **MODULES,
        "fastpool.PoolingConfig": partial(fastpool.PoolingConfig, ("mean",)),
    },
    "eps": {
        "fastpool.l2_normalize": partial(fastpool.l2_normalize, HIDDEN),
        "fastpool.nn.Normalize": fastpool.nn.Normalize,
    },
    "scale": {"fastpool.attention": POOLS["fastpool.attention"]},
    "out_dtype": {
        **POOLS,
        "fastpool.l2_normalize": partial(fastpool.l2_normalize, HIDDEN),
        **MODULES,
        "fastpool.nn.Normalize": fastpool.nn.Normalize,
    },
}
for _option in ("truncate_dim", "normalize", "out_dtype"):
    OWNERS[_option]["fastpool.mean"] = partial(fastpool.explain, HIDDEN)

WRONG: list[tuple[str, object, type[Exception], str]] = [
    ("truncate_dim", True, TypeError, "must be an int, got bool"),
    ("truncate_dim", np.True_, TypeError, "must be an int, got bool"),
    ("truncate_dim", 3.0, TypeError, "must be an int, got float"),
    ("truncate_dim", np.float64(3), TypeError, "must be an int, got float64"),
    ("truncate_dim", torch.tensor(3), TypeError, "must be an int, got Tensor"),
    ("truncate_dim", "3", TypeError, "must be an int, got str"),
    ("truncate_dim", 0, ValueError, "must (be at least 1|lie between 1 and the last dimension, 8), got 0"),
    ("truncate_dim", -(10**400), ValueError, "must be an int of 64 bits, got one of 1329"),
    ("normalize", 1, TypeError, "must be a bool, got int"),
    ("normalize", 2.0, TypeError, "must be a bool, got float"),
    ("normalize", None, TypeError, "must be a bool, got NoneType"),
    ("normalize", "l2", TypeError, "must be a bool, got str"),
    ("normalize", np.int64(1), TypeError, "must be a bool, got int64"),
    ("normalize", torch.tensor(True), TypeError, "must be a bool, got Tensor"),
    ("eps", True, TypeError, "must be a float, got bool"),
    ("scale", True, TypeError, "must be a float, got bool"),
    ("scale", None, TypeError, "must be a float, got NoneType"),
    ("scale", "1", TypeError, "must be a float, got str"),
    ("scale", torch.tensor(1.0), TypeError, "must be a float, got Tensor"),
    ("scale", 10**400, ValueError, r"must be at most 1.798e\+308 in size, got an int of 1329 bits"),
    ("eps", None, TypeError, "must be a float, got NoneType"),
    ("eps", "small", TypeError, "must be a float, got str"),
    ("eps", 1j, TypeError, "must be a float, got complex"),
    ("eps", torch.tensor(1.0), TypeError, "must be a float, got Tensor"),
    ("eps", 10**400, ValueError, r"must be at most 1.798e\+308 in size, got an int of 1329 bits"),
    ("eps", -1, ValueError, "must be at least 0, got -1"),
    ("eps", float("nan"), ValueError, "must be at least 0, got nan"),
    ("out_dtype", float, TypeError, "must be float16, bfloat16, float32 or float64, got type"),
    ("out_dtype", 6, TypeError, "must be float16, bfloat16, float32 or float64, got int"),
    ("out_dtype", np.float32, TypeError, "must be float16, bfloat16, float32 or float64, got type"),
    ("out_dtype", torch.int32, TypeError, "must be float16, bfloat16, float32 or float64, got int32"),
    ("out_dtype", torch.float8_e8m0fnu, TypeError, "must be .*, got float8_e8m0fnu"),
]


@pytest.mark.parametrize(("name", "value", "error", "words"), WRONG)
def test_what_is_no_option(name: str, value: object, error: type[Exception], words: str) -> None:
    for owner, call in OWNERS[name].items():
        with pytest.raises(error, match=rf"^{owner}: {name} {words if words.startswith('must') else f'.*{words}'}$"):
            call(**{name: value})


def test_ints_that_python_does_not_write() -> None:
    for owner, call in OWNERS["truncate_dim"].items():
        with pytest.raises(ValueError, match=rf"^{owner}: truncate_dim must be an int of 64 bits, got one of 16610$"):
            call(truncate_dim=10**5000)


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("truncate_dim", np.int64(3), 3),
        ("truncate_dim", np.uint8(3), 3),
        ("normalize", np.True_, True),
        ("normalize", np.False_, False),
        ("eps", np.float32(2), 2.0),
        ("eps", np.longdouble(2), 2.0),
        ("eps", np.int16(2), 2.0),
        ("eps", 2, 2.0),
        ("scale", 2, 2.0),
        ("scale", np.float32(2), 2.0),
    ],
)
def test_numpy_scalars_are_numbers(name: str, theirs: object, ours: object) -> None:
    for call in OWNERS[name].values():
        taken, expected = call(**{name: theirs}), call(**{name: ours})
        if isinstance(taken, torch.Tensor):
            assert isinstance(expected, torch.Tensor)
            assert same_bits(taken, expected)
        elif isinstance(taken, torch.nn.Module | fastpool.PoolingConfig):
            assert type(getattr(taken, name)) is type(ours)
            assert getattr(taken, name) == ours


MODE_ERRORS: list[tuple[Any, type[Exception], str]] = [
    (3, TypeError, "must be a mode's name or a sequence of them, got int"),
    (["mean", 3], TypeError, "got int"),
    (b"mean", TypeError, "got bytes"),
    (np.array(["mean", "max"]), TypeError, "got ndarray"),
    ([], ValueError, "must name at least one of mean, .*, got none"),
    ("median", ValueError, "must be one of mean, .*, got 'median'"),
    ("attention", ValueError, "must be one of mean, .*, got 'attention', whose scores go to fastpool.attention, or .*"),
]


@pytest.mark.parametrize(("value", "error", "words"), MODE_ERRORS)
def test_modes(value: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(
        error, match=f"^fastpool.nn.Pooling: mode {words if words.startswith('must') else '.*' + words}$"
    ):
        fastpool.nn.Pooling(value)
    if "at least one" not in words:  # without modes it says what an engine does that gives no vectors
        with pytest.raises(
            error, match=f"^fastpool.PoolingConfig: modes {words if words.startswith('must') else '.*' + words}$"
        ):
            fastpool.PoolingConfig(value)
    with pytest.raises(ValueError, match=r"got 'softmax_mean', whose scores go to fastpool\.softmax_mean, or "):
        fastpool.PoolingConfig(("mean", "softmax_mean"))  # which reads no scores of a folder
    assert fastpool.PoolingConfig("mean").modes == fastpool.PoolingConfig(["mean"]).modes == ("mean",)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("include_prompt", 1, "must be a bool, got int"),
        ("prompt_counts", "no", "must be a bool, got str"),
        ("width", 384.0, "must be an int, got float"),
        ("max_length", True, "must be an int, got bool"),
    ],
)
def test_what_only_a_configuration_has(name: str, value: Any, words: str) -> None:
    with pytest.raises(TypeError, match=f"^fastpool.PoolingConfig: {name} {words}$"):
        fastpool.PoolingConfig(("mean",), **{name: value})
