"""The checker of memory order in tools/ptx: ordered programs pass, and fail if one operation is removed."""

import pytest
import torch
from ptx_machine import kernel, run, write

SEEDS = range(4)
# Lane 1 of block 0 stores, lane 0 signals; lane 0 of block 1 waits, lane 1 reads.
MESSAGE = """mov.u32 %r3, %tid.x;
setp.ne.s32 %p1, %r1, 0;
@%p1 bra $Lreader;
setp.ne.s32 %p2, %r3, 1;
@%p2 bra $Lstored;
st.global.u32 [%rd0], 7;
$Lstored:
{meet}
setp.ne.s32 %p3, %r3, 0;
@%p3 bra $Lend;
{signal}
bra $Lend;
$Lreader:
setp.ne.s32 %p4, %r3, 0;
@%p4 bra $Lwaited;
$Lpoll:
{wait}
setp.eq.s64 %p5, %rd5, 0;
@%p5 bra $Lpoll;
$Lwaited:
{met}
setp.ne.s32 %p6, %r3, 1;
@%p6 bra $Lend;
ld.global.u32 %r4, [%rd0];
st.global.u32 [%rd2], %r4;
$Lend:"""
RIGHT = dict(
    meet="bar.warp.sync -1;",
    signal="red.release.gpu.global.add.u64 [%rd1], 1;",
    wait="ld.acquire.gpu.global.u64 %rd5, [%rd1];",
    met="bar.warp.sync -1;",
)


def found(tmp_path, body, sizes=(4, 8, 4), **more):
    """Return the checker's findings under some schedules."""
    path = write(tmp_path / "k.machine", kernel("k", body, len(sizes)))
    said = set()
    for seed in SEEDS:
        said.add(
            run(path, "k", [torch.zeros(n, dtype=torch.uint8) for n in sizes], seed=seed, check=True, **more)
        )
    return said


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(signal="st.release.gpu.global.u64 [%rd1], 1;"),
        dict(signal="atom.acq_rel.gpu.global.add.u64 %rd6, [%rd1], 1;"),
        dict(signal="red.release.sys.global.add.u64 [%rd1], 1;"),
        dict(meet="barrier.sync 1, 32;"),
    ],
)
def test_a_message_in_order(tmp_path, change):
    assert found(tmp_path, MESSAGE.format(**{**RIGHT, **change}), blocks=2) == {None}


@pytest.mark.parametrize(
    "change",
    [
        dict(meet=""),
        dict(met=""),
        dict(meet="vote.sync.any.pred %p7, %p1, -1;"),
        dict(meet="shfl.sync.idx.b32 %r5|%p7, %r3, 0, 31, -1;"),
        dict(signal="red.relaxed.gpu.global.add.u64 [%rd1], 1;"),
        dict(signal="red.release.cta.global.add.u64 [%rd1], 1;"),
        dict(signal="st.global.u64 [%rd1], 1;"),
        dict(wait="ld.relaxed.gpu.global.u64 %rd5, [%rd1];"),
        dict(wait="ld.acquire.cta.global.u64 %rd5, [%rd1];"),
        dict(wait="ld.volatile.global.u64 %rd5, [%rd1];"),
    ],
)
def test_a_message_with_less_than_that(tmp_path, change):
    said = found(tmp_path, MESSAGE.format(**{**RIGHT, **change}), blocks=2)
    assert said & {None} != said
    assert all("nothing orders these" in text and text.count("PTX line") == 2 for text in said - {None})


def test_a_chain_of_three_carries_what_the_first_has_done(tmp_path):
    """Block 1 waits for block 0 and signals block 2: release is cumulative."""
    body = """mov.u32 %r3, %tid.x;
setp.ne.s32 %p1, %r3, 0;
@%p1 bra $Lend;
cvt.u64.u32 %rd6, %r1;
setp.ne.s32 %p2, %r1, 0;
@%p2 bra $Lpoll;
st.global.u32 [%rd0], 7;
bra $Ltell;
$Lpoll:
ld.acquire.gpu.global.u64 %rd5, [%rd1];
setp.ne.s64 %p3, %rd5, %rd6;
@%p3 bra $Lpoll;
ld.global.u32 %r4, [%rd0];
$Ltell:
red.release.gpu.global.add.u64 [%rd1], 1;
$Lend:"""
    assert found(tmp_path, body, sizes=(4, 8), blocks=3) == {None}


# Lane 0 stores 16 bytes, the copy engine moves them to shared memory and on, and the last lane reads them.
BULK = """mov.u32 %r3, %tid.x;
mov.u32 %r10, stage;
add.s32 %r11, %r10, 128;
mov.u32 %r12, 16;
setp.ne.s32 %p1, %r3, 0;
@%p1 bra $Lmeet;
mbarrier.init.shared::cta.b64 [%r10], 1;
fence.mbarrier_init.release.cluster;
fence.proxy.async.shared::cta;
st.global.v4.u32 [%rd0], {{1, 2, 3, 4}};
{fence}
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 16;
cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r11], [%rd0], %r12, [%r10];
$Lwait:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10], 0;
{again}
cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r11], %r12;
cp.async.bulk.commit_group;
{done}
fence.proxy.async.global;
$Lmeet:
bar.warp.sync -1;
setp.ne.s32 %p3, %r3, 31;
@%p3 bra $Lend;
ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%rd1];
ld.shared.u32 %r8, [stage+128];
$Lend:
bar.warp.sync -1;
setp.eq.s32 %p4, %r3, 0;
@%p4 cp.async.bulk.wait_group 0;"""
BULK_RIGHT = dict(
    fence="fence.proxy.async.global;", again="@!%p2 bra $Lwait;", done="cp.async.bulk.wait_group 0;"
)


def test_bulk_copies_in_order(tmp_path):
    assert found(tmp_path, BULK.format(**BULK_RIGHT), sizes=(16, 16)) == {None}


@pytest.mark.parametrize(
    "change,what",
    [
        (dict(fence=""), "no proxy fence is between these"),
        (dict(again=""), "nothing orders these"),
        (dict(done="cp.async.bulk.wait_group.read 0;"), "nothing orders these"),
        (dict(done=""), "nothing orders these"),
    ],
)
def test_bulk_copies_with_less_than_that(tmp_path, change, what):
    said = found(tmp_path, BULK.format(**{**BULK_RIGHT, **change}), sizes=(16, 16))
    assert any(text and what in text for text in said), said  # in some schedule: a load may complete at once


def test_shared_memory_that_nobody_has_written(tmp_path):
    assert all("nobody has written" in text for text in found(tmp_path, "ld.shared.u32 %r3, [stage+64];"))
