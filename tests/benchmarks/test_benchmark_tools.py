"""What is done with a record: its figures, its comparison with another one, and the entry for pytest-benchmark."""

import copy
import io
import json
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import compare, plots, style
from benchmarks.case_results import Outcome, Result, Spread, to_json
from benchmarks.cases import FILL, LENGTH, SHAPES, SKEW, Case
from benchmarks.measure import skipped
from benchmarks.providers import LAYOUTS, PEERS, ours
from benchmarks.record import load

ROOT = Path(__file__).parents[2]
MASK, PACKED = (ours("native", input_layout) for input_layout in ("mask", "packed"))
NAMES = {"cpu": [MASK, PACKED], "cuda": [ours(b, s) for b in ("triton", "native") for s in ("mask", "packed")]}
CASE = "queries B32 H384 fp32"


def spread(us: float, wide: float = 0.02) -> Spread:
    return Spread(us, us * (1 - wide), us * (1 + wide), us * (1 - wide), 9)


def result(case: Case, device: str) -> Result:
    """Everybody takes as long as its bytes say; SGLang's numbers are no numbers in float16."""
    made = skipped(case)
    names = [*NAMES[device], *(peer.name for peer in PEERS)]
    for i, name in enumerate(names):
        outcome = made.outcomes[name] = Outcome(error=1e-8 * (1 + i // 3), same_bits=True, must_move=made.real_bytes)
        if name == "SGLang" and case.dtype == "fp16":
            outcome.error = math.nan
        if case.suite != "length":
            nbytes = made.padded_bytes if name not in NAMES[device] and LAYOUTS[name] == "padded" else made.real_bytes
            outcome.us["cpu" if device == "cpu" else "graph"] = spread((1 + i) * nbytes / 1e4)
    if case.suite != "length":
        made.read, made.reader = spread(made.real_bytes / 1.1e4), "words"
    return made


def record(device: str = "cpu", **parts: Any) -> dict[str, Any]:
    machine = {"cpu": "a CPU", "cores": 2, "caches_bytes": {"L1": 1 << 15, "L3": 1 << 25}}
    machine |= {"gpu": "a GPU", "l2_bytes": 50 << 20} if device == "cuda" else {}
    head = {"date": "2027-01-02T03:04:05Z", "commit": "0123456789abcdef+changes", "device": device, "machine": machine}
    made: dict[str, Any] = to_json(head | {"versions": {"torch": "2.13.0"}} | parts)
    return made


def full_record(device: str) -> dict[str, Any]:
    chosen = [case for case in (*SHAPES[:6], *FILL, *SKEW, *LENGTH) if device in case.devices]
    name = PACKED if device == "cpu" else ours("auto", "packed")
    growth = [{"tokens": n, "bytes": 768 * n, "us": {name: n / 30, "bmm": n / 20}} for n in (1000, 10_000, 1_000_000)]
    ways = {name: {"texts_per_second": 10.0, "pooling_share": s} for name, s in (("own", 0.01), ("fastpool", 0.005))}
    embedding = {"workload": "queries", "texts": 9, "tokens": 90, "threads": 2, **ways}
    return record(
        device,
        cases=[result(case, device) for case in chosen],
        growth=growth,
        end_to_end=[embedding],
        tiny_us={"inference mode": {"mean(hidden, mask, normalize=True)": 4.0}},
        empty_us={"graph": spread(2.0)},
    )


# ---- figures


@pytest.mark.filterwarnings("error")  # a layout that finds no room warns
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_figure_is_drawn(tmp_path: Path, device: str) -> None:
    written = plots.draw(full_record(device), tmp_path)
    assert [path.name for path in written] == [f"{name}.{kind}" for name in plots.FIGURES for kind in ("png", "svg")]
    for path in written:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml"), path.name


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    made = record(growth=full_record("cpu")["growth"], cases=[result(case, "cpu") for case in (*FILL[:2], LENGTH[0])])
    first, again = (plots.draw(made, tmp_path / name) for name in ("first", "again"))
    assert len(first) == 6
    for one, other in zip(first, again, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_a_record_of_one_part_has_one_figure(tmp_path: Path) -> None:
    written = plots.draw(record(growth=full_record("cpu")["growth"]), tmp_path / "new" / "folder")
    assert [path.name for path in written] == ["growth.png", "growth.svg"]
    assert plots.draw(record(quality={}), tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_what_failed_is_not_drawn(tmp_path: Path) -> None:
    failed, unread, alone = (result(SHAPES[1], "cpu") for _ in range(3))
    failed.outcomes = {}
    unread.read = None
    alone.outcomes = {PACKED: alone.outcomes[PACKED], "bmm": Outcome(failure="out of memory")}
    assert plots.draw(record(cases=[failed, unread]), tmp_path) == []
    assert [path.name for path in plots.draw(record(cases=[alone]), tmp_path)] == ["shapes.png", "shapes.svg"]


def texts(figure: Any) -> str:
    return "\n".join(one.get_text() for one in figure.findobj(lambda artist: hasattr(artist, "get_text")))


def test_figures_say_what_was_measured() -> None:
    made = full_record("cpu")
    told = {name: texts(draw(made)) for name, draw in plots.FIGURES.items()}
    for text in told.values():
        assert "a CPU, 2 cores" in text
        assert "01234567+changes" in text
    # Packed takes 2 / 1e4 of a microsecond a byte, the read 1 / 1.1e4.
    assert "fastpool, packed, at 45 % of one plain read" in told["shapes"]
    assert "20 times the time for fastpool, 1.0 times the time for bmm" in told["fill"]
    assert "1.0 times the time for fastpool, 24 times the time for bmm" in told["skew"]
    assert "SGLang: NaN or inf from 32\ntokens" in told["error"]
    assert "33.3 us for 1,000 tokens; 33.3 ms for 1,000,000 tokens" in told["growth"]
    assert "the cache, 32 MiB" in told["growth"]
    assert "pooling is 1.00 % of the time, with fastpool 0.50 %" in told["end_to_end"]


def test_labels_do_not_overlap() -> None:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(9, 5)).subplots()
    ends = [(1.0, 1 + i / 1000, style.Style(f"line {i}", "black")) for i in range(12)]
    axes.plot([0, 1], [1, 2])
    style.label_ends(axes, ends, inches=4)
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert min(b - a for a, b in pairwise(heights)) > 0.9 * 0.145 / 4
    assert -1e-6 < heights[0] < heights[-1] < 1


def test_without_matplotlib_a_run_still_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.draw(full_record("cpu"), tmp_path) == []
    assert "matplotlib is not installed" in capsys.readouterr().err


# ---- comparison


@pytest.mark.parametrize(
    ("before", "after", "drift", "expected"),
    [
        (spread(100), spread(100), 1.0, "="),
        (spread(100), spread(150), 1.0, "slower"),
        (spread(150), spread(100), 1.0, "faster"),
        (spread(100, 0.1), spread(115, 0.1), 1.0, "="),  # 90 to 110 and 103.5 to 126.5
        (Spread(100, 90, 110, 90, 9), Spread(120, 110, 130, 110, 9), 1.0, "="),  # they touch
        (Spread(100, 90, 110, 90, 9), Spread(120, 110.01, 130, 110, 9), 1.0, "slower"),
        (spread(100), spread(120), 1.2, "="),  # the machine's
        (spread(100), spread(120), 1.17, "="),  # the ranges meet once the drift is taken out
        (spread(100), spread(120), 1.1, "slower"),
        (spread(100), spread(80), 0.8, "="),
        (spread(100), spread(80), 0.9, "faster"),
        (spread(100), spread(80), 0.83, "="),
        (spread(100), spread(90), 0.8, "="),  # faster, but less than the machine
        (spread(100), spread(110), 0.8, "="),  # so unsteady a machine says nothing
        (spread(100), spread(110), 0.95, "slower"),
        (spread(100, 0.04), spread(106, 0.04), 0.95, "="),  # apart only by the drift
        (spread(100), spread(120), math.nan, "slower"),
    ],
)
def test_the_rule(before: Spread, after: Spread, drift: float, expected: str) -> None:
    assert compare.verdict(before, after, drift) == expected


def test_what_peers_do_as_well_is_noise() -> None:
    assert compare.verdict(spread(100), spread(130), 1.0, math.log(1.4)) == "="
    assert compare.verdict(spread(100), spread(150), 1.0, math.log(1.4)) == "slower"
    before, after = result(SHAPES[1], "cpu"), result(SHAPES[1], "cpu")
    assert compare.unrest(before, after) == 0
    peers = [peer.name for peer in PEERS if peer.name in after.outcomes]
    for name in peers[: len(peers) // 2]:
        median = before.outcomes[name].us["cpu"].median
        after.outcomes[name].us["cpu"] = spread(1.4 * median)
    assert compare.unrest(before, after) == pytest.approx(math.log(1.4), rel=0.01)
    after.outcomes[PACKED].us["cpu"] = spread(1.3 * before.outcomes[PACKED].us["cpu"].median)
    assert [one.verdict for one in compare.changes(before, after, [PACKED])] == ["="]
    few = result(SHAPES[1], "cpu")
    few.outcomes = {PACKED: few.outcomes[PACKED]}
    assert compare.unrest(few, few) == 0


def run(*records: dict[str, Any], folder: Path, options: str = "") -> tuple[int, str]:
    paths = [folder / f"{name}.json" for name in "ab"]
    for path, one in zip(paths, records, strict=True):
        path.write_text(json.dumps(one))
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "Console", lambda **_: Console(file=out, width=170))
        code = compare.main([*map(str, paths), *options.split()])
    return code, out.getvalue()


def scaled(base: dict[str, Any], by: float, provider: str = PACKED, read: float = 1.0) -> dict[str, Any]:
    made = copy.deepcopy(base)
    outcome, stream = made["cases"][0]["outcomes"][provider], made["cases"][0]["read"]
    for spreads, factor in ((outcome["us"]["cpu"], by), (stream, read)):
        spreads |= {name: spreads[name] * factor for name in ("median", "q1", "q3", "least")}
    return made


@pytest.fixture
def base() -> dict[str, Any]:
    return record(cases=[result(SHAPES[1], "cpu")])


@pytest.mark.parametrize(
    ("by", "read", "fails"), [(1.0, 1.0, 0), (1.1, 1.0, 0), (1.3, 1.0, 1), (1.3, 1.15, 0), (1.5, 1.2, 1), (0.5, 1, 0)]
)
def test_fails_above(base: dict[str, Any], tmp_path: Path, by: float, read: float, fails: int) -> None:
    other = scaled(base, by, read=read)
    assert run(base, other, folder=tmp_path, options="--fail-above 20")[0] == fails
    assert run(base, other, folder=tmp_path)[0] == 0


def test_what_is_printed(base: dict[str, Any], tmp_path: Path) -> None:
    _, printed = run(base, scaled(base, 1.5, read=1.2), folder=tmp_path)
    row = next(line for line in printed.splitlines() if PACKED in line)
    assert row.split()[-4:] == ["1.500", "1.200", "1.250", "slower"]
    assert "fastpool: 0 faster, 1 slower, 1 the same; geometric mean of ratios 1.225, over read 1.021" in printed
    assert "A: commit 0123456789ab+changes, 2027-01-02T03:04:05Z, a CPU; torch 2.13.0" in printed
    assert "warning" not in printed
    assert "bmm" not in printed
    code, printed = run(base, scaled(base, 2, "bmm"), folder=tmp_path, options="--all --fail-above 1")
    assert code == 0  # a peer may take as long as it likes
    assert "others: 0 faster, 1 slower" in printed


def test_other_machines_and_cases_are_told(base: dict[str, Any], tmp_path: Path) -> None:
    other = copy.deepcopy(base)
    other["machine"]["cores"], other["versions"]["torch"] = 64, "2.14.0"
    other["cases"][0]["case"] = "another"
    _, printed = run(base, other, folder=tmp_path, options="--fail-above 0")
    for text in (
        "machines differ (cores)",
        "torch differs: 2.13.0 and 2.14.0",
        f"only in A: {CASE}",
        "only in B: another",
    ):
        assert text in printed
    assert "no case was timed in both" in printed
    other["cases"][0] |= {"case": CASE, "real_bytes": 1}
    assert "not the same input" in run(base, other, folder=tmp_path)[1]


def test_a_provider_that_breaks_fails(base: dict[str, Any], tmp_path: Path) -> None:
    for change, told in (
        ({"us": {}, "failure": "it broke"}, "no time in B: it broke"),
        ({"error": "nan"}, "wrong in B"),
    ):
        other = copy.deepcopy(base)
        other["cases"][0]["outcomes"][MASK] |= change
        code, printed = run(base, other, folder=tmp_path, options="--fail-above 50")
        assert code == 1
        assert told in printed


def test_host_and_growth(tmp_path: Path) -> None:
    a, b = ({**record(), "tiny_us": {"on": {"add": us}}, "growth": full_record("cpu")["growth"]} for us in (1.0, 1.5))
    _, printed = run(a, b, folder=tmp_path)
    assert "add, on" in printed
    assert "1.500" in printed
    assert "1,000,000 tokens, fastpool native, packed" in printed


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[1]", "not a record"),
        ('{"device": "cpu"}', "not a record"),
        ('{"device": "cpu", "commit": "a", "cases": [{"case": "x"}]}', "not those of this version"),
        ('{"device": "cpu", "commit": "a", "cases": 3}', "not those of this version"),
    ],
)
def test_broken_files_end_with_a_sentence(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "broken.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit, match=told) as ended:
        load(path)
    assert str(path) in str(ended.value)


def test_cpu_and_gpu_are_not_compared(base: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing to compare"):
        run(base, record("cuda"), folder=tmp_path)


# ---- pytest-benchmark


def run_pytest(*options: str, **environment: str) -> str:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", *options]
    environment |= {"CUDA_VISIBLE_DEVICES": ""}  # small cases, on the CPU
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode in (0, 5), ran.stdout + ran.stderr  # 5: nothing to run
    return ran.stdout


def test_speed_runs() -> None:
    pytest.importorskip("pytest_benchmark")
    assert "5 passed" in run_pytest("--benchmark-disable", "-k", f"{CASE[:7]} and fp32 and (native or bmm or vLLM)")


def test_speed_is_skipped_without_the_plugin(tmp_path: Path) -> None:
    (tmp_path / "pytest_benchmark.py").write_text("raise ModuleNotFoundError('not here', name=__name__)")
    printed = run_pytest("-p", "no:benchmark", PYTHONPATH=str(tmp_path))
    assert "1 skipped" in printed
