"""tools/ptx's machine: what it runs, and what it must refuse.

Of the kernels themselves: tests/ptx/test_ptx_kernels.py.
"""

import pytest
import torch
from ptx.assembler import assemble
from ptx.parser import PtxError, parse
from ptx_machine import HEAD, kernel, run, write

OUT = "mul.wide.u32 %rd3, %r0, 8;\nadd.s64 %rd3, %rd0, %rd3;\n"  # where a thread writes


def alone(tmp_path, body, *tensors, name="k", **more):
    """Run one kernel; what is wrong, or None."""
    path = write(tmp_path / f"{name}.machine", kernel(name, body, len(tensors)))
    return run(path, name, list(tensors), **more)


def longs(n, value=0):
    return torch.full((n,), value, dtype=torch.int64)


@pytest.mark.parametrize(
    "statement,what",
    [
        ("add.sat.s32 %r3, %r4, %r5;", "unknown opcode 'add.sat.s32'"),
        ("ld.global.nc.u32 %r3, [%rd0];", "unknown opcode 'ld.global.nc.u32'"),
        ("ld.global.L1::no_allocate.u32 %r3, [%rd0];", "unknown opcode 'ld.global.L1::no_allocate.u32'"),
        ("add.s32 %r3, %r4;", "2 operands; expected 3"),
        ("add.s32 %r3, %r4, %laneid;", "unknown register: '%laneid'"),
        ("add.s32 %r3, %r4, other;", "no register, number or shared variable: 'other'"),
        ("bra $Lnowhere;", "unknown label: '$Lnowhere'"),
        ("call.uni elsewhere, (%r3);", "a call of elsewhere, which has no body here"),
        (".local .b8 stack[16];", "unknown directive"),
        ("ld.global.u32 %r3, [%rd0+4+4];", "an address of another form"),
    ],
)
def test_what_is_not_known_is_an_error_of_its_line(statement, what):
    text = HEAD + kernel("k", "mov.u32 %r4, 1;\nmov.u32 %r5, 2;\n" + statement)
    line = next(n for n, t in enumerate(text.split("\n"), 1) if t == statement)
    with pytest.raises(PtxError) as e:
        assemble(parse(text))
    assert what in str(e.value) and e.value.line == line


def test_a_target_of_another_architecture_is_refused():
    with pytest.raises(PtxError, match="made for sm_80; expected sm_90"):
        parse(HEAD.replace("sm_90", "sm_80"))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_lanes_part_and_meet(tmp_path, seed):
    """A loop whose length is the lane's, around a call and a shuffle behind it."""
    callee = """.func (.param .b64 func_retval0) twice(.param .b64 twice_param_0)
{
.reg .b64 %rd<3>;
ld.param.u64 %rd1, [twice_param_0];
add.s64 %rd2, %rd1, %rd1;
st.param.b64 [func_retval0+0], %rd2;
ret;
}
"""
    body = (
        OUT
        + """cvt.u64.u32 %rd5, %r0;
mov.u64 %rd6, 0;
mov.u32 %r4, 0;
$Lnext:
add.s64 %rd6, %rd6, %rd5;
add.s32 %r4, %r4, 1;
setp.le.u32 %p1, %r4, %r0;
@%p1 bra $Lnext;
{ // callseq
.param .b64 param0;
st.param.b64 [param0+0], %rd6;
.param .b64 retval0;
call.uni (retval0),
twice,
(
param0
);
ld.param.b64 %rd7, [retval0+0];
}
cvt.u32.u64 %r5, %rd7;
shfl.sync.idx.b32 %r6|%p2, %r5, 31, 31, -1;
shfl.sync.bfly.b32 %r7|%p3, %r5, 1, 31, -1;
cvt.u64.u32 %rd8, %r6;
cvt.u64.u32 %rd9, %r7;
mad.lo.s64 %rd8, %rd8, 65536, %rd9;
st.global.u64 [%rd3], %rd8;
"""
    )
    out = longs(32)
    path = write(tmp_path / "k.machine", callee, kernel("k", body, 1))
    assert run(path, "k", [out], seed=seed) is None
    twice = [2 * lane * (lane + 1) for lane in range(32)]
    assert out.tolist() == [twice[31] * 65536 + twice[lane ^ 1] for lane in range(32)]


@pytest.mark.parametrize("seed", [0, 5])
def test_votes_and_shuffles_of_narrow_segments(tmp_path, seed):
    body = (
        OUT
        + """setp.eq.s32 %p1, %r0, 7;
vote.sync.any.pred %p2, %p1, -1;
vote.sync.all.pred %p3, %p1, -1;
shfl.sync.bfly.b32 %r4|%p4, %r0, 8, 4127, -1;
selp.u32 %r5, 1, 0, %p2;
selp.u32 %r6, 2, %r5, %p3;
selp.u32 %r7, 256, 0, %p4;
add.s32 %r6, %r6, %r7;
cvt.u64.u32 %rd5, %r6;
cvt.u64.u32 %rd6, %r4;
mad.lo.s64 %rd5, %rd6, 65536, %rd5;
st.global.u64 [%rd3], %rd5;
"""
    )
    out = longs(32)
    assert alone(tmp_path, body, out, seed=seed) is None
    assert out.tolist() == [(lane ^ 8) * 65536 + 257 for lane in range(32)]  # segments of 16 lanes: 0x101f


def test_vectors_and_narrow_registers(tmp_path):
    """A byte that is loaded signed fills its register; _ and numbers stand in vectors."""
    body = """setp.ne.s32 %p1, %r0, 0;
@%p1 ret;
ld.global.v4.u32 {%r3, _, %r4, %r5}, [%rd0];
ld.global.s8 %rs1, [%rd0+16];
cvt.s32.s16 %r6, %rs1;
st.global.v4.u32 [%rd1], {%r5, 9, %r3, %r4};
st.global.s32 [%rd1+16], %r6;
mov.b32 {%rs2, %rs3}, %r3;
mov.b32 %r7, {%rs3, %rs2};
st.global.u32 [%rd1+20], %r7;
"""
    given, out = (
        torch.tensor([0x00050006, 2, 3, 4, 0x80, 0], dtype=torch.int32),
        torch.zeros(6, dtype=torch.int32),
    )
    assert alone(tmp_path, body, given, out) is None
    assert out.tolist() == [4, 9, 0x00050006, 3, -128, 0x00060005]


@pytest.mark.parametrize(
    "body,what",
    [
        ("ld.global.u32 %r3, [%rd0+2];", "is not aligned"),
        ("ld.global.v4.u32 {%r3, %r4, %r5, %r6}, [%rd0+8];", "an access of 16 bytes is not aligned"),
        ("ld.global.u64 %rd5, [%rd0+256];", "outside of all memory"),
        ("st.global.u64 [%rd0+-8], %rd5;", "outside of all memory"),
        ("st.shared.u32 [stage+4096], %r0;", "shared memory has 4096 bytes"),
        ("mov.u64 %rd5, 0;\ncvta.to.shared.u64 %rd6, %rd5;", "not of this block's shared memory"),
        ("mov.u32 %r3, 0;\ndiv.u32 %r4, %r0, %r3;", "division by zero"),
        ("atom.global.add.u64 %rd5, [%rd0+4], 1;", "an address with an offset"),
        ("add.s64 %rd6, %rd0, 4;\natom.global.add.u64 %rd5, [%rd6], 1;", "is not aligned"),
    ],
)
def test_wrong_accesses_are_found(tmp_path, body, what):
    try:
        said = alone(tmp_path, "mov.u64 %rd5, 0;\n" + body, longs(32))
    except PtxError as e:
        said = str(e)
    assert said is not None and what in said and "PTX line" in said


@pytest.mark.parametrize(
    "body,what",
    [
        ("setp.eq.s32 %p1, %r0, 5;\n@%p1 ret;\nbarrier.sync 1, 64;", "deadlock"),
        ("setp.lt.s32 %p1, %r0, 32;\nselp.u32 %r3, 64, 96, %p1;\nbarrier.sync 1, %r3;", "a barrier of"),
        ("barrier.sync 16, 64;", "barrier 16"),
        (
            "and.b32 %r3, %r0, 1;\nsetp.eq.s32 %p1, %r3, 1;\n@%p1 bra $Lodd;\nbar.warp.sync "
            "1431655765;\nshfl.sync.idx.b32 %r4|%p2, %r0, 1, 31, 1431655765;\n$Lodd:",
            "takes no part",
        ),
        (
            "setp.eq.s32 %p1, %r0, 5;\n@%p1 bra $Lother;\nshfl.sync.idx.b32 %r4|%p2, %r0, 1, 31, -1;\nbra "
            "$Lend;\n$Lother:\nvote.sync.any.pred %p3, %p1, -1;\n$Lend:",
            "different instructions",
        ),
        ("bar.warp.sync 15;", "is no member"),
    ],
)
def test_wrong_meetings_are_found(tmp_path, body, what):
    said = alone(tmp_path, body, longs(64), threads=64)
    assert said is not None and what in said


def copy(
    expect="1024",
    wait=True,
    fence="fence.proxy.async.global;",
    read="cp.async.bulk.wait_group.read 0;",
    end="cp.async.bulk.wait_group 0;",
    made="fence.proxy.async.shared::cta;",
):
    """A kernel whose lane 0 moves 1024 bytes through the copy engine, twice."""
    twice = ""
    for k, parity in ((0, 0), (1024, 1)):
        twice += (
            f"""{fence}
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], {expect};
add.s64 %rd5, %rd0, {k};
add.s64 %rd6, %rd1, {k};
mov.u32 %r12, 1024;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r11], [%rd5], %r12, [%r10];
"""
            + (
                f"""$Lwait{k}:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], {parity};
@!%p2 bra $Lwait{k};
"""
                if wait
                else ""
            )
            + f"""cp.async.bulk.global.shared::cta.bulk_group [%rd6], [%r11], %r12;
cp.async.bulk.commit_group;
{read}
"""
        )
    return f"""setp.ne.s32 %p1, %r0, 0;
@%p1 bra $Lend;
mov.u32 %r10, stage;
add.s32 %r11, %r10, 128;
mbarrier.init.shared::cta.b64 [%r10], 1;
fence.mbarrier_init.release.cluster;
{made}
ld.acquire.gpu.global.u64 %rd7, [%rd2];
{twice}{end}
fence.proxy.async.global;
red.release.gpu.global.add.u64 [%rd2], 1;
$Lend:"""


@pytest.mark.parametrize("seed", range(6))
def test_bulk_copies(tmp_path, seed):
    x, out, flag = torch.arange(256), torch.zeros(256, dtype=torch.int64), longs(1)
    assert alone(tmp_path, copy(), x, out, flag, seed=seed) is None
    assert torch.equal(x, out) and flag.item() == 1


@pytest.mark.parametrize(
    "change,what",
    [
        (dict(expect="1040"), "an mbarrier that never ends its phase"),
        (dict(expect="1008"), "more bytes have come than the mbarrier expects"),
        (dict(fence=""), "without a proxy fence between"),
        (dict(made=""), "no proxy fence is behind its making"),
        (dict(made="fence.proxy.async.global;"), "no proxy fence is behind its making"),
        (dict(read=""), "into a stage that a store still reads"),
        (dict(end=""), "a release while bulk stores are under way"),
        (dict(wait=False), "."),
    ],
)
def test_wrong_uses_of_the_copy_engine_are_found(tmp_path, change, what):
    found = set()
    for seed in range(8):
        x, out, flag = torch.arange(256), torch.zeros(256, dtype=torch.int64), longs(1)
        said = alone(tmp_path, copy(**change), x, out, flag, seed=seed)
        found.add(said or ("nothing" if torch.equal(x, out) else "wrong bytes."))
    assert any(what in said for said in found), found


def test_no_more_blocks_are_resident_than_there_is_room_for(tmp_path):
    """Blocks that wait for each other end where all of them have room."""
    body = """mov.u32 %r3, %tid.x;
setp.ne.s32 %p1, %r3, 0;
@%p1 bra $Lend;
red.release.gpu.global.add.u64 [%rd0], 1;
mov.u32 %r4, %nctaid.x;
cvt.u64.u32 %rd4, %r4;
$Lwait:
ld.acquire.gpu.global.u64 %rd5, [%rd0];
setp.lt.u64 %p2, %rd5, %rd4;
@%p2 bra $Lwait;
$Lend:"""
    for seed in (0, 1):
        count = longs(1)
        assert alone(tmp_path, body, count, blocks=40, seed=seed) is None
        assert count.item() == 40


# Block 1 reads a word, waits for block 0's signal, and reads the word again.
STALE = """setp.ne.s32 %p1, %r1, 0;
@%p1 bra $Lreader;
$Lready:
ld.relaxed.gpu.global.u64 %rd5, [%rd1+8];
setp.eq.s64 %p2, %rd5, 0;
@%p2 bra $Lready;
st.global.u64 [%rd0], 7;
red.release.gpu.global.add.u64 [%rd4], 1;
bra $Lend;
$Lreader:
ld.global.u64 %rd6, [%rd0];
add.s64 %rd8, %rd1, 8;
red.relaxed.gpu.global.add.u64 [%rd8], 1;
$Lpoll:
{wait}
setp.eq.s64 %p2, %rd5, 0;
@%p2 bra $Lpoll;
ld.global.u64 %rd7, [%rd0];
mov.u32 %r3, %tid.x;
mul.wide.u32 %rd9, %r3, 8;
add.s64 %rd9, %rd2, %rd9;
st.global.u64 [%rd9], %rd7;
$Lend:"""


@pytest.mark.parametrize(
    "wait,seen",
    [
        ("ld.acquire.gpu.global.u64 %rd5, [%rd4];", {7}),
        ("ld.acquire.cta.global.u64 %rd5, [%rd4];", {0, 7}),
        ("ld.relaxed.gpu.global.u64 %rd5, [%rd4];", {0, 7}),
    ],
)
def test_a_load_may_return_an_old_value_until_an_acquire(tmp_path, wait, seen):
    body = "mov.u64 %rd4, %rd1;\n" + STALE.format(wait=wait)
    found = set()
    for seed in range(1, 12):
        word, flags, out = longs(1), longs(2), longs(32)
        assert alone(tmp_path, body, word, flags, out, blocks=2, seed=seed) is None
        found.update(out.tolist())
    assert found == seen
