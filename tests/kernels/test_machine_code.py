"""What `fastpool aot` reads of machine code, and what it calls wrong."""

import pytest

pytest.importorskip("triton")  # a reason to skip: there is no Triton for every platform

from fastpool.triton_kernels.machine_code import Report, read_ptx  # after the skip


def test_what_is_wrong_is_said() -> None:
    good = Report(registers=100, spills=0, shared=0, load=16, store=4)
    assert good.complaint(wide=("load",)) is None
    assert good.complaint(wide=("load", "store")) == "the widest store of aligned rows is 4 bytes"
    assert Report(128, 8, 0, 16, 16).complaint() == "8 bytes spilled"
    assert Report(128, 8, 0, 16, 16).complaint(spills=8) is None
    assert Report(100, 0, 0, 8, 16).complaint(wide=("load",)) == "the widest load of aligned rows is 8 bytes"


# As Triton writes it: what every program may do, and the meeting in an arrival tree, which may stand anywhere. The
# first parameter points to token states, the second to what other programs have left.
ALONE = """
.visible .entry pool_kernel(.param .u64 .ptr .global .align 1 pool_kernel_param_0)
\tld.param.b64 \t%rd1, [pool_kernel_param_0];
\t// fma.rn.f32 in a comment;
$L__BB0_1:
\tmad.lo.s32 \t%r1, %r2, %r3, %r4;
\t@%p1 ld.global.v4.b32 { %r5, %r6, %r7, %r8 }, [ %rd1 + 0 ];
\tadd.rn.f32 \t%r9, %r5, %r6;
\tdiv.rn.f32 \t%r10, %r9, %r7;
\t@!%p1 bra \t$L__BB0_1;
\tst.global.b64 \t[%rd1], %rd2;
"""
ARRIVING = """
\tld.param.b64 \t%rd3, [pool_kernel_param_1];
\tadd.s64 \t%rd4, %rd3, %rd9;
$L__BB0_2:
\tmov.b64 \t%rd5, %rd6;
\t@%p3 ld.global.cg.v4.b32 { %r13, %r14, %r15, %r16 }, [ %rd5 + 0 ];
\tadd.s64 \t%rd6, %rd4, 16;
\tld.global.cg.b64 \t%rd7, [%rd3];
\t@%p2 atom.global.gpu.acq_rel.add.u32 %r11, [ %rd8 + 0 ], %r12;
"""
MEETING = ALONE + ARRIVING
MINIMUM = "\tatom.global.gpu.relaxed.min.s32 %r1, [ %rd1 + 0 ], %r2;\n"


def complaint(ptx: str, meets: bool) -> str | None:
    return read_ptx(ptx, registers=64, spills=0, shared=0, left=[1]).complaint(("load",), meets)


def test_ptx_is_read() -> None:
    found = read_ptx(MEETING, registers=64, spills=0, shared=1024, left=[1])
    assert found == Report(64, 0, 1024, 16, 8, (), ("atom.global.gpu.acq_rel.add.u32",), 0, 2)
    assert complaint(MEETING, meets=True) is None
    assert complaint(ALONE, meets=False) is None
    assert complaint(ALONE + MINIMUM, meets=False) is None


@pytest.mark.parametrize(
    "operation",
    [
        "add.rn.ftz.f32", "div.approx.f32", "div.full.f32", "rcp.approx.ftz.f64", "fma.rn.f32", "fma.rn.f64",
        "fma.rn.bf16x2", "mad.rn.f32", "ex2.approx.ftz.f32",
    ],
)  # fmt: skip
def test_operations_that_round_otherwise_are_found(operation: str) -> None:
    for before in ("\t", "\t@%p1 "):
        doctored = f"{ALONE}{before}{operation} \t%r1, %r2, %r3;\n"
        assert complaint(doctored, meets=False) == f"not rounded as IEEE's: {operation}"


ARRIVAL = "atom.global.gpu.acq_rel.add.u32"


@pytest.mark.parametrize(
    ("ptx", "meets", "words"),
    [
        (MEETING, False, "1 atomic operations acquire and release, not 0"),
        (ALONE, True, "0 atomic operations acquire and release, not 1"),
        (MEETING.replace("acq_rel", "relaxed"), True, "0 atomic operations acquire and release, not 1"),
        (MEETING.replace("acq_rel", "release"), True, "0 atomic operations acquire and release, not 1"),
        (MEETING.replace("acq_rel", "acquire"), True, "0 atomic operations acquire and release, not 1"),
        (MEETING.replace("gpu.acq_rel", "cta.acq_rel"), True, "0 atomic operations acquire and release, not 1"),
        (f"{MEETING}\t{ARRIVAL} %r1, [%rd1], %r2;\n", True, "2 atomic operations acquire and release, not 1"),
        (f"{ALONE}\tred.global.gpu.relaxed.add.f32 [%rd1], %r2;\n", False, "red.global.gpu.relaxed.add.f32"),
        (f"{MEETING}\tatom.global.gpu.relaxed.add.f64 %rd2, [%rd1], %rd2;\n", True, "whose order may matter"),
        (f"{ALONE}\tatom.global.gpu.relaxed.min.f32 %r1, [%rd1], %r2;\n", False, "whose order may matter"),
        (f"{ALONE}\tatom.global.add.s32 %r1, [%rd1], %r2;\n", False, "whose order may matter"),
        (MEETING.replace("global.cg.b64", "global.b64"), True, "1 past the L1 cache, 1 not"),
        (MEETING.replace("ld.global.cg", "ld.global.ca"), True, "0 past the L1 cache, 2 not"),
    ],
)  # fmt: skip
def test_memory_that_is_shared_otherwise_is_found(ptx: str, meets: bool, words: str) -> None:
    found = complaint(ptx, meets)
    assert found is not None
    assert words in found
