"""What GPU tests leave out, to be quick, is no pair of anything."""

from itertools import combinations, product

from helpers.on_gpu import batches

from fastpool.testing import DTYPES, LAYOUTS, variants

SHAPES = (([3], 2), ([1, 0], 5))


def test_every_pair_has_its_turn() -> None:
    cases = [
        {"mode": (mode, given), "dtype": dtype, "layout": case.layout, "width": case.width, "holes": case.holes}
        for mode, given in variants()
        for dtype in DTYPES
        for case, _ in batches(SHAPES, mode, given, dtype)
    ]
    for one, other in combinations(cases[0], 2):
        found = {(case[one], case[other]) for case in cases}
        wanted = set(product({case[one] for case in cases}, {case[other] for case in cases}))
        if {one, other} == {"layout", "holes"}:
            wanted = {(name, holes) for name, holes in wanted if LAYOUTS[name].holes or not holes}
        assert found == wanted, (one, other)
    assert len({case["layout"] for case in cases}) == len(LAYOUTS)
