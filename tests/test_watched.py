"""What tests/watched.py and tests/interpreted.py find in kernels with one defect each; the same kernels without it pass."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from dsfast.triton_kernels.pieces import BY_3_7
from triton_contract import INTERPRETED, in_the_interpreter

if INTERPRETED:
    from triton.runtime.errors import InterpreterError
    from watched import LaunchError

interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
N = 256  # two elements for each thread of four warps


@triton.jit
def copy_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0), mask=i < n)


@triton.jit
def copy_the_first_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n))


@triton.jit
def copy_blocks_but_the_first_kernel(x, y, first, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    for start in range(0, n, BLOCK):
        m = (start >= first) & (i >= 0)
        tl.store(y + start + i, tl.load(x + start + i, mask=m, other=0), mask=m)


@triton.jit
def copy_from_table_kernel(table, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(table).to(tl.pointer_type(tl.float32))
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0), mask=i < n)


@triton.jit
def offset_kernel(y, stride, WIDE: tl.constexpr):
    i = tl.arange(0, 2)
    tl.store(y + i, (i.to(tl.int64) if WIDE else i) * stride + stride)


@triton.jit
def neighbours_kernel(x, y, BLOCK: tl.constexpr):
    """The block of the next program becomes this one's."""
    i = tl.arange(0, BLOCK)
    next_program = (tl.program_id(0) + 1) % tl.num_programs(0)
    tl.store(y + tl.program_id(0) * BLOCK + i, tl.load(x + next_program * BLOCK + i))


@triton.jit
def same_element_kernel(y):
    tl.store(y, tl.program_id(0).to(tl.float32))


@triton.jit
def turn_kernel(x, y, BLOCK: tl.constexpr, BARRIERS: tl.constexpr):
    """x into y, and y turned into x."""
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))
    if BARRIERS:
        tl.debug_barrier()
    tl.store(x + i, tl.load(y + BLOCK - 1 - i))


@triton.jit
def twice_kernel(x, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i) * 2)


@triton.jit
def many_to_one_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i // 2, tl.load(x + i))


@triton.jit
def overlapping_bytes_kernel(x, BLOCK: tl.constexpr):
    """Halves of numbers that other programs write whole."""
    i = tl.program_id(0)
    tl.store(x + i, 1.0)
    tl.store(x.to(tl.pointer_type(tl.int16), bitcast=True) + (2 * i + 3) % (2 * BLOCK), 1)


@triton.jit
def multiple_kernel(x, n):
    n = tl.multiple_of(n, 16)
    tl.store(x, n)


@triton.jit
def last_sums_kernel(
    x, done, y, BLOCK: tl.constexpr, BARRIER: tl.constexpr, SEM: tl.constexpr, LAST: tl.constexpr, BEHIND: tl.constexpr
):
    """Every program writes a number; the one that is done last, but BEHIND, adds them up (not LAST: that of the last number)."""
    p, programs = tl.program_id(0), tl.num_programs(0)
    tl.store(x + p, p + 1.0)
    if BARRIER:
        tl.debug_barrier()
    before = tl.atomic_add(done, 1, sem=SEM) if LAST else p
    if before % programs == programs - 1 - BEHIND:
        i = tl.arange(0, BLOCK)
        tl.store(y, tl.sum(tl.load(x + i, mask=i < programs, other=0.0), 0))


@triton.jit
def next_reads_kernel(x, done, y):
    """Each program reads what the one before wrote, whoever comes last."""
    p = tl.program_id(0)
    tl.store(x + p, 1.0)
    tl.debug_barrier()
    tl.atomic_add(done, 1, sem="acq_rel")
    tl.store(y + p, tl.load(x + tl.maximum(p, 1) - 1))


@triton.jit
def read_count_kernel(done, y):
    tl.atomic_add(done, 1, sem="acq_rel")
    tl.store(y + tl.program_id(0), tl.load(done))


@triton.jit
def two_counts_kernel(x, done):
    """Each of two programs reads what the other wrote, behind additions to different numbers."""
    p = tl.program_id(0)
    tl.store(x + p, 1.0)
    tl.debug_barrier()
    tl.atomic_add(done + p, 1, sem="acq_rel")
    tl.store(x + 2 + p, tl.load(x + 1 - p))


@triton.jit
def add_many_kernel(x, BLOCK: tl.constexpr):
    tl.atomic_add(x + tl.arange(0, BLOCK), 1.0)


@triton.jit
def swap_kernel(x):
    tl.atomic_cas(x, 0, 1)


def numbers(n: int = N) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32)


@interpreted
def test_within_bounds():
    x, y = numbers(N - 1), torch.zeros(N - 1)
    copy_kernel[(2,)](x, y, N - 1, BLOCK=N // 2)
    assert torch.equal(x, y)
    with pytest.raises(
        InterpreterError, match=r"copy_kernel: program 1: load at test_watched.py:\d+ of 1 elements outside"
    ):
        copy_kernel[(2,)](x, torch.zeros(N), N, BLOCK=N // 2)
    with pytest.raises(
        InterpreterError, match=r"copy_kernel: program 1: store at test_watched.py:\d+ of 1 elements outside"
    ):
        copy_kernel[(2,)](numbers(), y, N, BLOCK=N // 2)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int32, torch.bool], ids=str)
def test_what_a_load_has_no_value_for_is_no_zero(dtype):
    x = numbers().to(dtype)
    y = torch.zeros_like(x)
    copy_the_first_kernel[(1,)](x, y, 3, N)
    assert torch.equal(y[:3], x[:3])
    assert (y[3:].isnan() if dtype.is_floating_point else y[3:] == (1 if dtype == torch.bool else 2**31 - 1)).all()


@interpreted
def test_a_mask_of_integers_is_left_to_the_interpreter():
    """A comparison with a loop's number is one: taken for indices they are gigabytes. Triton 3.6 and 3.7 take it for a mask."""
    x, y = numbers(2 * N), torch.zeros(2 * N)
    refused = pytest.raises(InterpreterError, match="mask has unsupported dtype")
    with nullcontext() if BY_3_7 else refused:
        copy_blocks_but_the_first_kernel[(1,)](x, y, N, 2 * N, N)
    assert torch.equal(y, x * (x >= N) if BY_3_7 else torch.zeros(2 * N))


@interpreted
def test_bounds_of_a_tensor_in_a_table():
    x, y = numbers(), torch.zeros(2 * N)
    table = torch.tensor([x.data_ptr()])
    copy_from_table_kernel[(1,)](table, y, N, BLOCK=2 * N)
    assert torch.equal(y[:N], x)
    with pytest.raises(InterpreterError, match=r"copy_from_table_kernel: program 0: load at .* of 1 elements outside"):
        copy_from_table_kernel[(1,)](table, y, N + 1, BLOCK=2 * N)


@interpreted
def test_a_program_writes_what_another_one_reads():
    x, y = numbers(), torch.zeros(N)
    neighbours_kernel[(2,)](x, y, BLOCK=N // 2)
    assert torch.equal(y, numbers().roll(N // 2))
    with pytest.raises(
        LaunchError, match=r"neighbours_kernel: programs 0 and 1 do not wait for each other: load at .*, store at "
    ):
        neighbours_kernel[(2,)](x, x, BLOCK=N // 2)


@interpreted
def test_two_programs_write_the_same():
    same_element_kernel[(1,)](numbers())
    with pytest.raises(
        LaunchError, match=r"same_element_kernel: programs 0 and 1 do not wait for each other: store at .*, store at "
    ):
        same_element_kernel[(2,)](numbers())


@interpreted
def test_parts_of_a_number_of_another_program():
    with pytest.raises(LaunchError, match="overlapping_bytes_kernel: programs 0 and 1 do not wait for each other"):
        overlapping_bytes_kernel[(2,)](numbers(2), BLOCK=2)


@interpreted
def test_barriers():
    x, y = numbers(), torch.zeros(N)
    turn_kernel[(1,)](x, y, BLOCK=N, BARRIERS=True)
    assert torch.equal(x, numbers().flip(0))
    with pytest.raises(LaunchError, match=r"turn_kernel: program 0: no barrier between store at .* and load at "):
        turn_kernel[(1,)](x, y, BLOCK=N, BARRIERS=False)


@interpreted
def test_in_place_is_for_the_thread_that_read():
    """Where threads share elements, one of them may write before another has read."""
    x = numbers()
    twice_kernel[(1,)](x, BLOCK=N)
    assert torch.equal(x, 2 * numbers())
    twice_kernel[(1,)](x, BLOCK=32, num_warps=1)
    with pytest.raises(LaunchError, match=r"twice_kernel: program 0: no barrier between load at .* and store at "):
        twice_kernel[(1,)](x, BLOCK=N, num_warps=16)


@interpreted
def test_one_instruction_writes_two_values_to_one_address():
    many_to_one_kernel[(1,)](torch.ones(N), torch.zeros(N), BLOCK=N)
    with pytest.raises(InterpreterError, match=r"many_to_one_kernel: program 0: store at .* writes different values"):
        many_to_one_kernel[(1,)](numbers(), torch.zeros(N), BLOCK=N)


@interpreted
def test_no_multiple():
    x = torch.zeros(1, dtype=torch.int32)
    multiple_kernel[(1,)](x, 32)
    assert x.item() == 32
    with pytest.raises(InterpreterError, match=r"multiple_kernel: test_watched.py:\d+: no multiple of 16"):
        multiple_kernel[(1,)](x, 24)


@interpreted
def test_the_program_that_is_done_last_may_read_what_all_wrote():
    x, y, done = torch.zeros(5), torch.zeros(5), torch.zeros(1, dtype=torch.int32)

    def run(count=done, **changes):
        options = {"BARRIER": True, "SEM": "acq_rel", "LAST": True, "BEHIND": 0} | changes
        last_sums_kernel[(5,)](x, count, y, BLOCK=8, **options)

    for launches in (1, 2):
        run()
        assert (y[0].item(), done.item()) == (15, 5 * launches)
    with pytest.raises(LaunchError, match=r"programs 0 and 4 do not wait for each other: store at .*, load at "):
        run(LAST=False)
    with pytest.raises(LaunchError, match=r"programs 0 and 4 do not wait for each other: store at .*, load at "):
        run(BARRIER=False)
    with pytest.raises(LaunchError, match=r"programs 0 and 3 do not wait for each other: store at .*, load at "):
        run(BEHIND=1)
    with pytest.raises(InterpreterError, match="by an addition that acquires and releases"):
        run(SEM="relaxed")
    with pytest.raises(LaunchError, match=r"programs \d and \d do not wait for each other: store at .*, load at "):
        next_reads_kernel[(5,)](x, done, y)
    with pytest.raises(LaunchError, match=r"read_count_kernel: program 0: load at .* of what programs add to"):
        read_count_kernel[(5,)](done, y)
    with pytest.raises(InterpreterError, match=r"program 0: store at .* of 1 elements outside of all tensors"):
        run(done[1:])


@interpreted
def test_additions_to_different_numbers_order_nothing():
    with pytest.raises(LaunchError, match=r"two_counts_kernel: programs 0 and 1 do not wait for each other"):
        two_counts_kernel[(2,)](torch.zeros(4), torch.zeros(2, dtype=torch.int32))


@interpreted
def test_other_atomics_are_refused():
    with pytest.raises(InterpreterError, match=r"add_many_kernel: .*: only one number is added to"):
        add_many_kernel[(1,)](torch.zeros(2), BLOCK=2)
    with pytest.raises(InterpreterError, match=r"swap_kernel: .*: compare and swap is not watched"):
        swap_kernel[(1,)](torch.zeros(1, dtype=torch.int32))


@interpreted
def test_an_integer_that_overflows_is_seen():
    y = torch.zeros(2, dtype=torch.int64)
    offset_kernel[(1,)](y, 2**30 - 1, WIDE=False)
    assert y.tolist() == [2**30 - 1, 2**31 - 2]
    with pytest.raises(InterpreterError, match="int32 overflows in add"):
        offset_kernel[(1,)](y, 2**30, WIDE=False)
    offset_kernel[(1,)](y, 2**30, WIDE=True)
    assert y.tolist() == [2**30, 2**31]


test_in_the_interpreter = in_the_interpreter(__file__)
