"""Reads what a Triton program became: registers, spills, the width of its accesses, its atomic operations, and what
does not round as IEEE's arithmetic does."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

from .config import LOAD_BYTES


@dataclass(frozen=True)
class Report:
    """What a variant became on a target: registers of a thread, bytes of them spilled to memory, bytes of shared
    memory, bytes of a thread's widest load and widest store, of token states and their gradient where those are the
    widest. For NVIDIA's alone: operations that do not round once, as IEEE's, to the nearest, subnormals too; atomic
    operations; loads of what other programs have left that the L1 cache may serve, and those that go past it. (On AMD
    operations cannot be told from those of a division, and units do not meet.)"""

    registers: int
    spills: int
    shared: int
    load: int
    store: int
    inexact: tuple[str, ...] = ()
    atomics: tuple[str, ...] = ()
    cached: int = 0
    uncached: int = 0

    def complaint(self, wide: Sequence[str] = (), meets: bool = False, spills: int = 0) -> str | None:
        """What is wrong with it, if anything. `wide`: what has to be LOAD_BYTES wide; `meets`: units of a segment meet
        in an arrival tree, which takes one atomic operation; beside it only the minimum of integers is allowed.
        `spills`: bytes that may be spilled."""
        if self.spills > spills:
            return f"{self.spills} bytes spilled"
        if self.inexact:
            return f"not rounded as IEEE's: {', '.join(self.inexact)}"
        arrivals = [name for name in self.atomics if {"acq_rel", "gpu"} <= {*name.split(".")}]
        if len(arrivals) != meets:
            return f"{len(arrivals)} atomic operations acquire and release, not {int(meets)}"
        others = [name for name in self.atomics if name not in arrivals and not re.search(r"\.min\.[su]\d+$", name)]
        if others:
            return f"atomic operations whose order may matter: {', '.join(others)}"
        if meets and (self.cached or not self.uncached):
            return f"loads of other programs' states: {self.uncached} past the L1 cache, {self.cached} not"
        for what in wide:
            if getattr(self, what) < LOAD_BYTES:
                return f"the widest {what} of aligned rows is {getattr(self, what)} bytes"
        return None


def read_nvidia(compiled: Any, left: Sequence[int] = ()) -> Report:
    """The report on what Triton compiled for an NVIDIA GPU. `left` as in `read_ptx`."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    spilled = numbers["STACK"] + numbers["LOCAL"]
    return read_ptx(compiled.asm["ptx"], numbers["REG"], spilled, compiled.metadata.shared, left)


# An instruction of PTX, which a predicate may stand before, and its operands; not a directive, a comment or a label.
INSTRUCTION = re.compile(r"^[ \t{]*(?:@!?%\w+[ \t]+)?([a-z]\w*(?:\.[\w:]+)+)[ \t]+([^;]*);", re.MULTILINE)


def read_ptx(ptx: str, registers: int, spills: int, shared: int, left: Sequence[int] = ()) -> Report:
    """What a program's text says, beside what the machine code does. `left`: parameters that point to what other
    programs leave, by their number."""
    instructions: list[tuple[str, str]] = INSTRUCTION.findall(ptx)
    names = [name for name, _ in instructions]
    addresses = _reached(instructions, left)
    loads = [
        name
        for name, operands in instructions
        if name.startswith("ld.global") and not addresses.isdisjoint(re.findall(r"%\w+", operands.rpartition("[")[2]))
    ]
    uncached = [name for name in loads if "cg" in name.split(".")]
    # Token states: nothing else is as wide, but for states of the arrival tree.
    return Report(
        registers,
        spills,
        shared,
        max((_width(name) for name in names if name.startswith("ld.global") and ".cg" not in name), default=0),
        max((_width(name) for name in names if name.startswith("st.global")), default=0),
        tuple(sorted({name for name in names if _is_inexact(name.split("."))})),
        tuple(name for name in names if name.startswith(("atom.", "red."))),
        len(loads) - len(uncached),
        len(uncached),
    )


def _reached(instructions: Sequence[tuple[str, str]], parameters: Sequence[int]) -> set[str]:
    """Registers whose value is made from these parameters, but for what is loaded from where they point to."""
    found: set[str] = set()
    before = -1
    while before < len(found):
        before = len(found)
        for name, operands in instructions:
            to, _, of = operands.partition(",")
            if name.startswith("ld.param"):
                reached = any(f"_param_{number}]" in of for number in parameters)
            else:
                reached = not name.startswith(("ld.", "atom.", "setp.")) and any(
                    register in found for register in re.findall(r"%\w+", of)
                )
            if reached:
                found.add(to.strip())
    return found


def _is_inexact(parts: list[str]) -> bool:
    """Whether an instruction, by the parts of its name, takes subnormals for zero, approximates, or multiplies and adds
    floats with one rounding where the canonical order has two."""
    fused = parts[0] in ("fma", "mad") and re.fullmatch(r"b?f\d+(x2)?", parts[-1]) is not None
    return fused or not {"ftz", "approx", "full"}.isdisjoint(parts)


def _width(name: str) -> int:
    """Bytes that an access by this name moves."""
    found = re.search(r"(?:\.v(\d))?\.[busf](\d+)$", name)
    return int(found[1] or 1) * int(found[2]) // 8 if found else 0


_AMD_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def read_amd(compiled: Any) -> Report:
    """The report on what Triton compiled for an AMD GPU."""
    text = compiled.asm["amdgcn"]

    def most(name: str) -> int:
        return max((int(n) for n in re.findall(rf"\.{name}:\s*(\d+)", text)), default=0)

    def widest(what: str) -> int:
        found = re.findall(rf"(?:global|buffer)_{what}_[us]?(\w+)", text)
        return max((_AMD_BYTES.get(kind, 0) for kind in found), default=0)

    spilled = most("private_segment_fixed_size")  # scalar registers spill to vector registers, not to memory
    return Report(most("vgpr_count"), spilled, compiled.metadata.shared, widest("load"), widest("store"))
