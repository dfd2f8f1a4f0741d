"""How work is cut up: the heuristic's choices, what was measured instead, and the tuner's own logic."""

import json
import math
from dataclasses import asdict
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

from benchmarks import tune  # after the path
from fastpool.calls import PoolCall  # after the skip
from fastpool.triton_kernels import config, plan, run  # likewise
from fastpool.triton_kernels.config import Config, Shape  # likewise
from fastpool.triton_kernels.launch import Launch  # likewise

SHAPES = [
    Shape(batch, longest, mean, columns, size, weighted, 132, summed=summed, softmax=softmax)
    for batch in (1, 7, 1024)
    for longest, mean in ((16, 16), (512, 512), (8192, 300), (32768, 32768))
    for columns, size in ((256, 2), (1024, 2), (4096, 2), (128, 4), (4096, 4), (64, 8), (1024, 8))
    for weighted, summed, softmax in (
        (False, False, False),
        (False, True, False),
        (True, False, False),
        (True, False, True),
    )
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_choices_are_sound(shape: Shape) -> None:
    for chosen in (config.heuristic(shape), *config.candidates(shape)):
        for number in (chosen.leaves, chosen.warps, chosen.loads):
            assert number == config.power_of_two(number)
        assert config.LEAF % chosen.loads == 0
        assert 0 <= chosen.levels <= config.MAX_LEVELS
        assert 1 <= chosen.warps <= 16
        assert chosen.split == config.LEAF * chosen.leaves * 2**chosen.levels
    assert config.heuristic(shape) in config.candidates(shape)


@pytest.mark.parametrize(("batch", "mean"), [(1, 32768), (1, 8192), (64, 512), (8, 8192), (1024, 75)])
@pytest.mark.parametrize("columns", [512, 1024, 2048, 4096])
def test_units_are_as_large_as_fills_the_gpu(batch: int, mean: int, columns: int) -> None:
    """As an H100 wants them: most processors have one, unless a program's leaves side by side are too many for that;
    and none is smaller where twice the tokens would still leave each of them one."""
    shape = Shape(batch, batch * mean, mean, columns, 2, False, 132, summed=True)
    chosen = config.heuristic(shape)
    assert chosen.levels == 0 or shape.units(chosen.split) >= 0.75 * 132
    assert chosen.levels == 3 or shape.units(2 * chosen.split) < 132


def test_measured_choices_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[0]
    measured = Config(4, 2, 8, 4)
    (tmp_path / "a-gpu.json").write_text(
        json.dumps({"native_below_bytes": 4096, "configs": {config.key(shape): asdict(measured)}})
    )
    monkeypatch.setattr(config, "TUNED", tmp_path)
    for cached in (config._measured, config.tuned, config.choose):
        cached.cache_clear()
    try:
        assert config.choose(shape, "a-gpu") == measured
        assert config.choose(SHAPES[-1], "a-gpu") == config.heuristic(SHAPES[-1])
        assert config.choose(shape, "another") == config.heuristic(shape)
        assert config.native_below_bytes("a-gpu") == 4096
        assert config.native_below_bytes("another") == config.NATIVE_BELOW_BYTES == 192 << 20
    finally:
        for cached in (config._measured, config.tuned, config.choose):
            cached.cache_clear()
    assert config.slug("NVIDIA H200") == "nvidia-h200"


def test_the_tuner_keeps_what_beats_the_heuristic() -> None:
    shape = SHAPES[0]
    usual, other = config.heuristic(shape), config.candidates(shape)[-1]
    assert usual != other
    assert tune.best(shape, lambda one: 0.9 if one == other else 1.0) == other
    assert tune.best(shape, lambda one: 0.98 if one == other else 1.0) is None

    def breaks(one: Config) -> float:
        if one != usual:
            raise RuntimeError("out of registers")
        return 1.0

    assert tune.best(shape, breaks) is None


def test_the_tuner_begins_nothing_when_time_is_up() -> None:
    tried: list[Config] = []

    def time_of(one: Config) -> float:
        tried.append(one)
        return 1.0

    assert tune.best(SHAPES[0], time_of, until=-math.inf) is None
    assert tried == [config.heuristic(SHAPES[0])]  # without which there would be nothing to compare


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_tuners_short_list_is_near_the_heuristic(shape: Shape) -> None:
    """One choice changed, and every choice among them; a fraction of all candidates."""
    usual, near = config.heuristic(shape), tune.near(shape)
    assert usual in near
    assert set(near) <= set(config.candidates(shape))
    assert len(near) <= 16
    for one in near:
        changed = {name for name, value in asdict(one).items() if value != getattr(usual, name)}
        assert len(changed - {"warps"}) <= 1, one
        assert changed != {"warps", "levels"}
        assert changed != {"warps", "loads"}
    assert {one.levels for one in near} == {one.levels for one in config.candidates(shape)}
    assert {one.loads for one in near} == {one.loads for one in config.candidates(shape)}


def test_the_tuner_plans_what_it_will_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every configuration of the short list becomes a launch, for tensors without data; the choice is given back."""
    planned: list[Launch] = []
    monkeypatch.setattr(Launch, "run", lambda one: planned.append(one))
    monkeypatch.setattr(run, "device_of", lambda device: plan.DeviceProperties("test", 132))
    before = plan.choose
    tune.plan_calls(tune.SHORT_LIST, tune.near)
    assert plan.choose is before
    wanted = 0
    for case in tune.SHORT_LIST:
        _, shape = tune.shape_of(case, "cuda")
        configs = {(one.leaves, one.levels, one.loads, one.warps) for one in tune.near(shape)}
        wanted += 1 + len(tune.near(shape))
        seen = {
            (*(one.arguments[name] for name in ("LEAVES", "LEVELS", "LOADS")), one.options["num_warps"])
            for one in planned
            if one.arguments["COLUMNS"] == shape.columns and one.arguments["batch"] == case.batch
        }
        assert configs <= seen, case.name
    assert len(planned) == wanted


def test_the_tuner_finds_where_triton_takes_over() -> None:
    assert tune.crossover([(100, 1.0, 2.0), (300, 3.0, 2.0), (200, 1.5, 2.0), (400, 1.0, 2.0)]) == 201
    assert tune.crossover([(100, 2.0, 1.0)]) == 0
    assert tune.crossover([]) == 0


@pytest.mark.parametrize(
    ("mode", "width", "warps", "registers"),
    [("mean", 2048, 8, 128), ("weighted_mean", 2048, 4, 255), ("weighted_mean", 4096, 8, 255)]
    + [("weighted_mean", 1024, 4, 168)],
)
def test_weights_have_registers_for_meeting(mode: str, width: int, warps: int, registers: int) -> None:
    """In large programs of which several share a segment; one alone needs no more than others."""
    for rows, alone in ((100_000, False), (32, True)):
        hidden = torch.empty(4, rows, width, dtype=torch.bfloat16, device="meta")
        launch = plan.plan_pool(PoolCall(mode, hidden), plan.DeviceProperties("test", 132))
        assert launch.arguments["WHOLE"] == alone
        threads = width // 8 if alone else 32 * warps
        assert launch.options["num_warps"] == threads // 32
        assert launch.options["maxnreg"] == (registers if not alone else 168 if threads <= 128 else 128)


@pytest.mark.parametrize(
    ("mode", "levels"), [("mean", {0, 1, 2, 3, 4}), ("max", {0, 1, 2, 3, 4}), ("weighted_mean", {0, 1, 2, 3})]
)
def test_units_grow_as_far_as_registers_go(mode: str, levels: set[int]) -> None:
    """Where each segment may be as long as all rows, until their states fit; the largest in half of the threads, where
    that is still a whole load for each."""
    found = set()
    for batch, rows, width in product((4, 16, 64, 256), (8192, 32768, 131072), (64, 384, 1024, 2048)):
        hidden = torch.empty(rows, width, dtype=torch.bfloat16, device="meta")
        index = torch.empty(batch, dtype=torch.int64, device="meta")
        launch = plan.plan_pool(PoolCall(mode, hidden, starts=index, ends=index), plan.DeviceProperties("test", 132))
        if not launch.arguments["WHOLE"]:
            found.add(launch.arguments["LEVELS"])
            threads = width // 8
            if launch.arguments["LEVELS"] > (3 if threads <= 128 else 2) and threads > 128:
                assert 32 * launch.options["num_warps"] == threads // 2
                assert launch.options["maxnreg"] == 255
    assert found == levels


@pytest.mark.parametrize(
    ("rows", "width", "most"), [(32, 768, 4), (300, 768, 2), (100_000, 768, 2), (100_000, 4096, 1), (100_000, 64, 1)]
)
def test_programs_take_as_many_queries_as_registers_hold(rows: int, width: int, most: int) -> None:
    """No more than there are, and one where it is a gradient."""
    hidden = torch.empty(8, rows, width, dtype=torch.bfloat16, device="meta")
    device = plan.DeviceProperties("test", 132)
    for count, up_to in ((1, 1), (2, 2), (3, 4), (4, 4), (9, 4)):
        call = PoolCall("attention", hidden, query=torch.empty(count, width, dtype=torch.bfloat16, device="meta"))
        launch = plan.plan_pool(call, device)
        assert launch.arguments["QUERIES"] == min(up_to, most)
        assert plan.make_pool_plan(call, device, width).fixed["QUERIES"] == 1


@pytest.mark.parametrize(
    ("batch", "rows", "width"), [(400, 100_000, 1024), (4000, 1 << 20, 4096), (3, 900, 384), (8192, 1 << 20, 1)]
)
def test_a_workspace_stays_small(batch: int, rows: int, width: int) -> None:
    """Overlapping segments could each be as long as all rows: beyond a limit, each is one piece."""
    hidden = torch.empty(rows, width, dtype=torch.bfloat16, device="meta")
    index = torch.empty(batch, dtype=torch.int64, device="meta")
    call = PoolCall("mean", hidden, starts=index, ends=index)
    planned = plan.plan_pool(call, plan.DeviceProperties("test", 132))
    states = planned.arguments["states"]
    held = 0 if states is None else states.numel() * 4
    assert held <= max(plan.MIN_WORKSPACE, hidden.numel())
    assert (states is None) == planned.arguments["WHOLE"]
    assert planned.grid[0] <= plan.MAX_PROGRAMS


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_at_a_time_is_the_same_units(shape: Shape) -> None:
    """Slots and programs are counted before."""
    chosen = config.heuristic(shape)
    row = config.one_row(chosen, 4)
    assert (row.leaves, row.split, row.warps) == (1, chosen.split, 4)
