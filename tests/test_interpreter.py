"""The check of the addresses that kernels read and write in Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter, without a GPU")


@triton.jit
def copy_kernel(source, target, first, last, N: tl.constexpr):
    offsets = first + tl.arange(0, N)
    mask = offsets < last
    tl.store(target + offsets, tl.load(source + offsets, mask=mask, other=0.0), mask=mask)


@triton.jit
def add_kernel(target, offset):
    tl.atomic_add(target + offset, 1.0)


@triton.jit
def read_by_address_kernel(addresses, target):
    pointer = tl.load(addresses).to(tl.pointer_type(tl.float32))
    tl.store(target, tl.load(pointer))


def test_addresses_inside_the_arguments_pass():
    source, target = torch.arange(8.0), torch.zeros(8)
    copy_kernel[(1,)](source[2:6], target[2:6], -2, 6, N=16)  # of a view, all of its storage may be read
    assert torch.equal(source, target)
    add_kernel[(1,)](target, 7)
    assert target[7] == 8


@pytest.mark.parametrize(
    "first,last,message",
    [
        (0, 9, "copy_kernel reads 1 of 9 elements outside of its tensors, the lowest 0 bytes past the end of source"),
        (-3, 2, "copy_kernel reads 3 of 5 elements outside of its tensors, the lowest 12 bytes before source"),
    ],
)
def test_an_address_outside_is_named(first, last, message):
    memory = torch.zeros(64)
    with pytest.raises(InterpreterError, match=message):
        copy_kernel[(1,)](memory[16:24].clone(), torch.zeros(64), first, last, N=16)


def test_writes_outside_are_named():
    with pytest.raises(InterpreterError, match="copy_kernel writes 1 of 9 elements outside .* past the end of target"):
        copy_kernel[(1,)](torch.zeros(64), torch.zeros(8), 0, 9, N=16)
    with pytest.raises(InterpreterError, match="add_kernel writes 1 of 1 elements outside .* past the end of target"):
        add_kernel[(1,)](torch.zeros(8), 9)


def test_a_pointer_that_was_an_integer_may_point_to_any_tensor():
    source, target = torch.full((1,), 3.0), torch.zeros(1)
    read_by_address_kernel[(1,)](torch.tensor([source.data_ptr()]), target)
    assert target.item() == 3.0
