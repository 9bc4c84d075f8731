"""The PTX interpreter of the tests, on PTX written by hand: what it computes, and what it refuses to let pass."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from ptx import execute
from ptx.execute import Launch, Program, PtxError
from ptx.parse import parse

#: The arguments are `out`, `in` and n; every thread has its index in %t and the address of its word of `out` in %mine.
TEXT = """
.version 8.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry probe(.param .u64 p_out, .param .u64 p_in, .param .u32 p_n)
{{
    .reg .pred %p<8>;
    .reg .b16 %h<8>;
    .reg .b32 %r<24>;
    .reg .f32 %f<8>;
    .reg .b64 %d<16>;
    .reg .b32 %t, %n;
    .reg .b64 %out, %in, %mine;
    ld.param.u64 %out, [p_out];
    ld.param.u64 %in, [p_in];
    ld.param.u32 %n, [p_n];
    mov.u32 %t, %tid.x;
    mul.wide.u32 %mine, %t, 4;
    add.s64 %mine, %out, %mine;
{body}
    ret;
}}
"""
STORE = "st.global.u32 [%mine], %r0;"


def run(
    body: str, words: int = 64, given: Sequence[Any] | NDArray = (0.0,), n: int = 0, launch: Launch | None = None
) -> NDArray[np.uint32]:
    """`out`, which starts as ones, after a launch of one thread per word."""
    out, source = np.ones(words, np.uint32), np.ascontiguousarray(given)
    source = source.astype(np.float32) if source.dtype == np.float64 else source
    arguments = np.array([out.ctypes.data, source.ctypes.data], np.uint64).tobytes() + np.uint32(n).tobytes()
    (kernel,) = parse(TEXT.format(body=body)).values()
    memory = [("out", out.ctypes.data, out.nbytes), ("in", source.ctypes.data, source.nbytes)]
    Program(kernel)(arguments, memory, launch or Launch((1, 1), words, 1, 4096))
    return out


def error(body: str, **how: Any) -> str:
    with pytest.raises(PtxError) as caught:
        run(body, **how)
    message = str(caught.value)
    assert message.startswith("probe, PTX line ")
    line = int(message.removeprefix("probe, PTX line ").partition(":")[0])
    shown = message.partition(": ")[2].partition(": ")[0]
    assert shown in " ".join(TEXT.format(body=body).splitlines()[line - 1].split())
    return message


def test_threads_diverge_in_a_loop_and_meet_again_behind_it() -> None:
    """Thread t runs the loop t times; behind it all shuffle together."""
    body = """
    mov.u32 %r0, 0;
    mov.u32 %r1, %t;
again:
    setp.eq.u32 %p0, %r1, 0;
    @%p0 bra done;
    add.u32 %r0, %r0, %r1;
    sub.u32 %r1, %r1, 1;
    bra.uni again;
done:
    shfl.sync.bfly.b32 %r0, %r0, 1, 31, -1;
    """
    t = np.arange(64) ^ 1
    assert np.array_equal(run(body + STORE), t * (t + 1) // 2)


def test_a_predicate_chooses_threads_and_its_negation_the_others() -> None:
    body = "setp.lt.u32 %p0, %t, 10; mov.u32 %r0, 7; @%p0 mov.u32 %r0, 3; @!%p0 add.u32 %r0, %r0, 1;"
    assert np.array_equal(run(body + STORE), np.where(np.arange(64) < 10, 3, 8))


@pytest.mark.parametrize(
    ("mode", "by", "bounds", "expected"),
    [
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("down", 3, 31, lambda lane: lane + 3 if lane <= 28 else lane),
        ("idx", 9, 31, lambda lane: 9),
        ("idx", 1, 0x1C1F, lambda lane: lane & 28 | 1),  # segments of four lanes
    ],
)
def test_shuffles_exchange_lanes(mode: str, by: int, bounds: int, expected: Any) -> None:
    out = run(f"shfl.sync.{mode}.b32 %r0|%p0, %t, {by}, {bounds}, -1;" + STORE)
    assert out.tolist() == [32 * (t // 32) + expected(t % 32) for t in range(64)]


def test_a_shuffle_with_lanes_that_have_ended_is_an_error() -> None:
    body = "setp.gt.u32 %p0, %t, 40; @%p0 ret; shfl.sync.bfly.b32 %r0, %t, 1, 31, -1;"
    assert "lanes of the warp have ended" in error(body)


EXCHANGE = """
    mov.u32 %r1, dynamic;
    shl.b32 %r2, %t, 2;
    add.u32 %r2, %r1, %r2;
    st.shared.u32 [%r2], %t;
    bar.sync 0;
    sub.u32 %r3, 63, %t;
    shl.b32 %r3, %r3, 2;
    add.u32 %r3, %r1, %r3;
    ld.shared.u32 %r0, [%r3];
"""


def test_a_barrier_makes_what_others_wrote_visible() -> None:
    assert np.array_equal(run(EXCHANGE + STORE), 63 - np.arange(64))


def test_reading_what_another_warp_wrote_without_a_barrier_is_a_race() -> None:
    assert "a race: warp" in error(EXCHANGE.replace("bar.sync 0;", "") + STORE)
    assert "wrote, with no barrier" in error(EXCHANGE.replace("bar.sync 0;", "") + STORE)


def test_writing_what_another_warp_still_reads_is_a_race() -> None:
    assert "read, with no barrier" in error(EXCHANGE + "st.shared.u32 [%r2], %r0;" + STORE)
    assert np.array_equal(run(EXCHANGE + "bar.sync 0; st.shared.u32 [%r2], %r0;" + STORE), 63 - np.arange(64))


def test_global_memory_that_another_warp_still_reads_is_not_written_without_a_barrier() -> None:
    """As the first thread may count a step that all have read; between blocks no barrier helps."""
    body = "ld.global.u32 %r0, [%out]; bar.sync 0; setp.eq.u32 %p0, %t, 0; @%p0 st.global.u32 [%out], 5;"
    run(body)
    assert "touches out that several warps read" in error(body.replace("bar.sync 0;", ""))
    assert "touches out that several warps read" in error(body, launch=Launch((2, 1), 64))
    run(body.replace("bar.sync 0;", ""), launch=Launch((1, 1), 64, global_races=False))


def test_warps_may_write_the_same_value_to_one_place_but_not_different_ones() -> None:
    run("mov.u32 %r1, dynamic; st.shared.u32 [%r1], %n;")
    assert "different values" in error("mov.u32 %r1, dynamic; st.shared.u32 [%r1], %t;")


def test_a_barrier_that_not_all_threads_reach_is_an_error_and_no_hang() -> None:
    body = """
    setp.lt.u32 %p0, %t, 7;
    @%p0 bra apart;
    bar.sync 0;
    bra behind;
apart:
    mov.u32 %r0, 0;
    shfl.sync.bfly.b32 %r0, %r0, 1, 31, -1;
behind:
    """
    assert "others of their block that never come: 57 at line" in error(body)


def test_a_thread_that_has_ended_is_not_waited_for() -> None:
    ended = "setp.eq.u32 %p0, %t, 3; @%p0 ret; bar.sync 0; mov.u32 %r0, 5;"
    assert run(ended + STORE).tolist() == [5, 5, 5, 1, *[5] * 60]


def test_a_loop_without_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execute, "MOST_STEPS", 1000)
    assert "has not ended after" in error("again:\n    add.u32 %r0, %t, 1;\n    bra again;\n")


CLUSTER = """
    mov.u32 %r1, dynamic;
    mov.u32 %r2, %cluster_ctarank;
    shl.b32 %r3, %t, 2;
    add.u32 %r3, %r1, %r3;
    add.u32 %r4, %t, %r2;
    st.shared.u32 [%r3], %r4;
    barrier.cluster.arrive;
    barrier.cluster.wait;
    xor.b32 %r5, %r2, 1;
    cvt.u64.u32 %d0, %r3;
    cvta.shared.u64 %d0, %d0;
    mapa.u64 %d1, %d0, %r5;
    ld.u32 %r0, [%d1];
    barrier.cluster.arrive;
    barrier.cluster.wait;
    mov.u32 %r6, %ctaid.x;
    mad.lo.u32 %r6, %r6, 32, %t;
    mul.wide.u32 %mine, %r6, 4;
    add.s64 %mine, %out, %mine;
"""
TWO_CLUSTERS = Launch((4, 1), 32, 2, 4096)


def without(text: str, part: str, index: int) -> str:
    """`text` less the occurrence of `part` of that index."""
    pieces = text.split(part)
    return part.join(pieces[: index + 1]) + part.join(["", *pieces[index + 1 :]])[len(part) :]


def test_blocks_of_a_cluster_read_each_others_shared_memory() -> None:
    out = run(CLUSTER + STORE, 128, launch=TWO_CLUSTERS)
    assert np.array_equal(out.reshape(2, 2, 32), np.broadcast_to(np.arange(32) + np.array([[1], [0]]), (2, 2, 32)))


@pytest.mark.parametrize(
    ("missing", "index", "expected"),
    [
        ("barrier.cluster.wait;", 0, "may not have begun"),
        ("barrier.cluster.wait;", 1, "between arriving at the cluster's barrier and waiting"),
        ("barrier.cluster.arrive;", 0, "without having arrived"),
        ("barrier.cluster.arrive;\n    barrier.cluster.wait;", 1, "a block ends while others may still touch"),
    ],
)
def test_a_missing_half_of_a_clusters_barrier_is_an_error(missing: str, index: int, expected: str) -> None:
    assert expected in error(without(CLUSTER, missing, index) + STORE, words=128, launch=TWO_CLUSTERS)


def test_a_write_between_the_halves_of_a_clusters_barrier_races_with_reads_behind_it() -> None:
    store = "st.shared.u32 [%r3], %r4;"
    late = CLUSTER.replace(store, "").replace("barrier.cluster.wait;", store + "\n    barrier.cluster.wait;", 1)
    assert "a race" in error(late + STORE, words=128, launch=TWO_CLUSTERS)


COPY = """
    mov.u32 %r1, dynamic;
    shl.b32 %r2, %t, 4;
    add.u32 %r2, %r1, %r2;
    mul.wide.u32 %d0, %t, 16;
    add.s64 %d0, %in, %d0;
    cp.async.cg.shared.global [%r2], [%d0], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    ld.shared.u32 %r0, [%r2];
"""


def test_an_asynchronous_copy_is_there_behind_its_wait_and_not_before() -> None:
    source = np.arange(1, 257, dtype=np.uint32)
    assert np.array_equal(run(COPY + STORE, given=source), source[::4])
    for early in (COPY.replace("wait_group 0", "wait_group 1"), without(COPY, "cp.async.wait_group 0;", 0)):
        assert (run(early + STORE, given=source) == 0xFFFFFFFF).all()


def test_a_copy_of_fewer_bytes_fills_the_rest_with_zeros() -> None:
    body = COPY.replace("[%d0], 16;", "[%d0], 16, 8;").replace("[%r2];", "[%r2+8];").replace("+8]", "+8]")
    assert (run(body + STORE, given=np.arange(1, 257, dtype=np.uint32)) == 0).all()


MATRIX = """
    mov.u32 %r1, dynamic;
    shl.b32 %r2, %t, 2;
    add.u32 %r2, %r1, %r2;
    mul.wide.u32 %d0, %t, 4;
    add.s64 %d0, %in, %d0;
    ld.global.u32 %r3, [%d0];
    st.shared.u32 [%r2], %r3;
    bar.sync 0;
    and.b32 %r4, %t, 7;
    shl.b32 %r4, %r4, 4;
    add.u32 %r4, %r1, %r4;
"""


def test_matrices_of_a_warp_are_loaded_and_stored_by_rows_or_columns() -> None:
    rows = np.arange(64, dtype=np.uint16).reshape(8, 8)
    plain = run(MATRIX + "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [%r4];" + STORE, 32, rows.view(np.uint32))
    assert np.array_equal(plain.view(np.uint16).reshape(8, 8), rows)
    body = MATRIX + "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r0}, [%r4];"
    assert np.array_equal(run(body + STORE, 32, rows.view(np.uint32)).view(np.uint16).reshape(8, 8), rows.T)
    body = MATRIX + "stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%r4+512], {%r3}; ld.shared.u32 %r0, [%r2+512];"
    assert np.array_equal(run(body + STORE, 32, rows.view(np.uint32)).view(np.uint16).reshape(8, 8), rows.T)


def test_an_access_off_its_boundary_is_an_error() -> None:
    wide = "add.s64 %d0, %mine, 4; st.global.v4.u32 [%d0], {%r0, %r0, %r0, %r0};"
    assert "is not on a boundary of 16 bytes" in error(wide, launch=Launch((1, 1), 1))
    assert "boundary of 4 bytes" in error("mov.u32 %r1, dynamic; ld.shared.u32 %r0, [%r1+2];")
    assert "boundary of 16 bytes" in error(COPY.replace("[%d0], 16;", "[%d0+4], 16;"), given=np.zeros(257, np.uint32))


def test_an_access_outside_of_the_tensors_is_an_error_that_names_the_nearest() -> None:
    message = error("st.global.u32 [%mine+4], %t;")
    assert "the nearest is out, of 256 bytes, at byte 256 of it" in message
    assert "at byte -4 of it" in error("ld.global.u32 %r0, [%mine+-4];")
    assert "outside of every tensor" in error("mov.u64 %d0, 0; ld.global.u32 %r0, [%d0];")
    assert "4 bytes at 4096 lie outside of the 4096" in error("mov.u32 %r1, dynamic; ld.shared.u32 %r0, [%r1+4096];")


def test_a_predicated_access_out_of_bounds_is_none() -> None:
    run("setp.lt.u32 %p0, %t, 63; @%p0 st.global.u32 [%mine+4], %t;")


def test_shared_memory_and_registers_start_as_nan() -> None:
    assert np.isnan(run("mov.u32 %r1, dynamic; ld.shared.u32 %r0, [%r1+16];" + STORE).view(np.float32)).all()
    assert np.isnan(run(STORE).view(np.float32)).all()


def test_an_unknown_instruction_is_an_error_where_it_is_run_and_nowhere_else() -> None:
    assert "not implemented" in error("bar.red.popc.u32 %r0, 0, %p0;")
    assert "not implemented" in error("add.rz.f32 %f0, %f0, %f1;")
    run("bra over;\n    add.rz.f32 %f0, %f0, %f1;\nover:\n    mov.u32 %r0, 1;")


def bits(value: float) -> str:
    return f"0f{np.float32(value).view(np.uint32):08X}"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("div.s32 %r0, -7, 2;", -3),
        ("rem.s32 %r0, -7, 2;", -1),
        ("shr.s32 %r0, -8, 1;", -4),
        ("shr.u32 %r0, 8, 40;", 0),
        ("shl.b32 %r0, 3, 33;", 0),
        ("mul.hi.s32 %r0, -3, 1431655766;", -2),
        ("mul.wide.s32 %d0, -3, 5; cvt.u32.u64 %r0, %d0;", -15),
        ("mad.lo.s32 %r0, 3, 5, 7;", 22),
        ("bfe.u32 %r0, 0xabcd, 4, 8;", 0xBC),
        ("bfe.s32 %r0, 0xf0, 4, 4;", -1),
        ("prmt.b32 %r0, 0x44332211, 0x88776655, 0x7610;", 0x88772211 - (1 << 32)),
        ("min.s32 %r0, -1, 1;", -1),
        ("max.u32 %r0, -1, 1;", -1),
        ("mov.b32 %r0, 0x12345678; mov.b32 {%h0, %h1}, %r0; mov.b32 %r0, {%h1, %h0};", 0x56781234),
        ("mov.b32 %f0, 0fC0200000; cvt.rzi.s32.f32 %r0, %f0;", -2),
        ("mov.b32 %f0, 0f4F800000; cvt.rzi.s32.f32 %r0, %f0;", 2**31 - 1),
        ("mov.b32 %f0, 0f7FC00000; cvt.rzi.s32.f32 %r0, %f0;", 0),
        ("setp.lt.s32 %p0, -1, 0; selp.b32 %r0, 5, 6, %p0;", 5),
        ("setp.lt.u32 %p0, -1, 0; selp.b32 %r0, 5, 6, %p0;", 6),
        ("{ .reg .b32 %r0; mov.b32 %r0, 9; mov.b32 %r1, %r0; } mov.b32 %r0, %r1;", 9),
    ],
)
def test_integers_are_computed_as_ptx_says(body: str, expected: int) -> None:
    assert run(body + STORE, 32).view(np.int32)[0] == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # 1 + 2⁻²³ squared is 1 + 2⁻²² + 2⁻⁴⁶: the last term is there where the product is not rounded
        (f"fma.rn.f32 %f0, {bits(1 + 2**-23)}, {bits(1 + 2**-23)}, {bits(-1 - 2**-22)};", 2.0**-46),
        (f"ex2.approx.ftz.f32 %f0, {bits(-130)};", 0.0),
        (f"ex2.approx.f32 %f0, {bits(-130)};", 2.0**-130),
        (f"max.f32 %f0, {bits(np.nan)}, {bits(2)};", 2.0),
        (f"max.NaN.f32 %f0, {bits(np.nan)}, {bits(2)};", np.nan),
        (f"mul.ftz.f32 %f0, {bits(2**-130)}, {bits(2**100)};", 0.0),
        (f"cvt.rni.f32.f32 %f0, {bits(2.5)};", 2.0),
        (f"cvt.rn.bf16.f32 %h0, {bits(1 + 2**-8)}; cvt.f32.bf16 %f0, %h0;", 1.0),
        (f"cvt.rn.bf16.f32 %h0, {bits(1 + 3 * 2**-8)}; cvt.f32.bf16 %f0, %h0;", 1 + 2**-6),
        (f"cvt.rn.bf16x2.f32 %r0, {bits(2)}, {bits(3)}; shl.b32 %r0, %r0, 16; mov.b32 %f0, %r0;", 3.0),
        (f"cvt.rn.f16.f32 %h0, {bits(70000)}; cvt.f32.f16 %f0, %h0;", np.inf),
        (f"cvt.rn.f32.s32 %f0, {2**24 + 1};", 2.0**24),
    ],
)
def test_floats_are_computed_as_ptx_says(body: str, expected: float) -> None:
    out = run(body + "mov.b32 %r0, %f0;" + STORE, 32).view(np.float32)[0]
    assert out == np.float32(expected) or (np.isnan(out) and np.isnan(expected))


def test_comparisons_know_nan() -> None:
    truths = {"eq": 0, "ne": 0, "lt": 0, "equ": 1, "neu": 1, "ltu": 1, "num": 0, "nan": 1}
    for (name, truth), other in itertools.product(truths.items(), (1.0, np.nan)):
        body = f"setp.{name}.f32 %p0, {bits(other)}, {bits(np.nan)}; selp.b32 %r0, 1, 0, %p0;"
        assert run(body + STORE, 32)[0] == truth, name
