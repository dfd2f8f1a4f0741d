"""A short run of every campaign; and campaigns find what they are there for."""

import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from hostile import __main__ as command
from hostile.runner import CAMPAIGNS, Campaign, environment, run


@pytest.mark.parametrize("campaign", CAMPAIGNS)
def test_nothing_breaks(campaign: str) -> None:
    if campaign == "folders":
        pytest.importorskip("safetensors")
    report = run(campaign, seed=0, count=300)
    assert not report.failures, "\n\n".join(map(str, report.failures))
    assert report.tried == 300
    assert min(report.refused, report.answered) > 0


BROKEN = """
import os

def attempt(random, say):
    drawn = random.randrange(6)
    say(f"drew {drawn}")
    if drawn == 0:
        os.kill(os.getpid(), 11)
    assert drawn != 1, "it should have refused"
    return drawn == 2
"""


@pytest.fixture
def _broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A campaign against something that is broken: some inputs end the process, some are answered wrongly."""
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(CAMPAIGNS, "broken", Campaign("broken"))


@pytest.mark.usefixtures("_broken")
def test_failures_are_counted_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [Random(f"broken 1 {index}").randrange(6) for index in range(9)]
    dies, lies = drawn.index(0), drawn.index(1)
    assert command.main(["--only", "broken", "--seed", "1", "--count", "9"]) == 1
    said = capsys.readouterr().out
    bad, good = drawn.count(0) + drawn.count(1), drawn.count(2)
    assert f"broken, seed 1: 9 inputs were tried, {9 - bad - good} refused, {good} answered, {bad} failures" in said
    assert f"broken, seed 1, input {dies}: drew 0\nthe process died of it, SIGSEGV" in said
    assert f"broken, seed 1, input {lies}: drew 1\n" in said
    assert "AssertionError: it should have refused" in said
    for index, words in ((dies, "SIGSEGV"), (lies, "AssertionError")):
        alone = f"--only broken --seed 1 --first {index} --count 1"
        assert f'alone: make hostile HOSTILE="{alone}"' in said
        assert command.main(alone.split()) == 1
        again = capsys.readouterr().out
        assert words in again
        assert "1 inputs were tried, 0 refused, 0 answered, 1 failures" in again


@pytest.mark.usefixtures("_broken")
def test_what_is_fine_exits_with_0() -> None:
    drawn = [Random(f"broken 1 {index}").randrange(6) for index in range(9)]
    fine = next(index for index, one in enumerate(drawn) if one > 1)
    assert command.main(f"--only broken --seed 1 --first {fine} --count 1".split()) == 0


@pytest.mark.parametrize(
    "step",
    [
        "at_the_edge(5, torch.float32, behind=True); read(x.data_ptr() + 20, 1)",
        "at_the_edge(5, torch.float32, behind=False); read(x.data_ptr() - 1, 1)",
        "inner_pages_forbidden(at_the_edge(9000, torch.uint8, behind=False)); read(x.data_ptr() + 2 * PAGE - 1, 1)",
        "torch.empty(33); ctypes.memset(end(x), read(end(x), 1)[0] ^ 255, 1); del x",
    ],
)
def test_a_step_beyond_memory_ends_the_process(step: str) -> None:
    """Reading beyond an argument, within what is forbidden, and writing beyond a result."""
    code = f"""
import ctypes
import torch
from ctypes import string_at as read
from helpers.pages import PAGE, at_the_edge, forbid_within

def end(x):
    return x.data_ptr() + x.numel() * x.element_size()

def inner_pages_forbidden(x):
    forbid_within([(x.data_ptr(), end(x))])
    return x

x = at_the_edge(9000, torch.uint8, behind=True)
read(x.data_ptr(), 9000)
print("fine", flush=True)
x = {step}
print("unnoticed")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(checks_memory=True)
    )
    assert done.stdout.strip() == "fine", done.stderr
    assert done.returncode < 0
