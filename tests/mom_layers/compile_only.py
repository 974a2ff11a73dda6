"""Compiles Triton kernels for chips that are not there: the code that launches the kernels runs on CPU tensors."""

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from mom_layers.common.chips import CHIPS, Chip, forced

_recorded: list | None = None
_go_on = False
_run = jit.JITFunction.run


def _compile_instead(self, *args, grid, warmup, **kwargs):
    """In place of a launch."""
    try:
        compiled = _run(self, *args, grid=grid, warmup=True, **kwargs)
    except Exception as error:
        if not _go_on:
            raise
        compiled = error
    room = self.module.removeprefix("mom_layers.")
    _recorded.append((f"{room}.{self.__name__}", compiled))


def _target(architecture: str) -> GPUTarget:
    if CHIPS[architecture].vendor == "amd":
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


@contextmanager
def compiling(
    architecture: str, chip: Chip | None = None, kernel_set: str | None = None, go_on: bool = False
) -> Iterator[list]:
    """Inside, every launch compiles for an architecture and does not run, and kernel sets are chosen for its chip.

    Args:
        architecture: a name of CHIPS.
        chip: choose kernels for this chip instead.
        kernel_set: take this set, where a family has the set.
        go_on: record the exception of a kernel that does not compile, and let the host's code run on.

    Yields the list that receives (the kernel's name with its module, compiled kernel or exception). Kernels must have
    been defined without TRITON_INTERPRET.
    """
    global _recorded, _go_on
    before = jit.JITFunction.run, _recorded, _go_on
    jit.JITFunction.run, _recorded, _go_on = _compile_instead, [], go_on
    # Triton keeps compiled kernels by the number of the device: each architecture is a device of its own.
    number, target, active = list(CHIPS).index(architecture), _target(architecture), driver._active
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target, get_current_device=lambda: number, get_current_stream=lambda device: 0
        )
    )
    try:
        with forced(chip or architecture, kernel_set):
            yield _recorded
    finally:
        jit.JITFunction.run, _recorded, _go_on = before
        driver._active = active


def left_operands_in_registers(kernel) -> int:
    """Hopper's asynchronous products (wgmma) whose left operand is a list of registers and not a descriptor."""
    return len(re.findall(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*\{", kernel.asm["ptx"]))


def tensor_core_products(kernel) -> str:
    """Which instructions of tensor cores a kernel has, and how many of each, in the compiler's text."""
    text = kernel.asm.get("ptx") or kernel.asm.get("amdgcn")
    found = {name: len(re.findall(pattern, text)) for name, pattern in PRODUCTS.items()}
    return " ".join(f"{name}:{count}" for name, count in found.items() if count)


PRODUCTS = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mfma": r"\bv_mfma",
}
# Records of the section .nv.info of a cubin: the registers of a thread, and the bytes of its local memory.
REGISTERS, FRAME = 0x2F, 0x11
AMD_NUMBERS = ("vgpr_count", "private_segment_fixed_size")  # the same two in AMD's text


def registers_and_local_memory(kernel) -> tuple[int, int]:
    """Registers of a thread, and its bytes of local memory, where registers that did not suffice are spilled."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        return tuple(
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in ("vgpr_count", "private_segment_fixed_size")
        )
    found = {REGISTERS: 0, FRAME: 0}
    for record, value in _info_records(kernel.asm["cubin"]):
        if record in found:
            found[record] = max(found[record], value)
    return found[REGISTERS], found[FRAME]


def _info_records(cubin: bytes) -> Iterator[tuple[int, int]]:
    """The records (kind, value) of every function in .nv.info of an ELF file of 64 bits."""
    (sections_at,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, sections_at + i * size) for i in range(count)]
    for name, _, _, _, at, length, *_ in headers:
        text = cubin[headers[names][4] + name :]
        if text[: text.index(0)] != b".nv.info":
            continue
        end = at + length
        while at < end:
            form, kind, length_or_value = struct.unpack_from("<BBH", cubin, at)
            at += 4
            if form == 4:  # the length of a value follows: a function's number and 32 bits
                if length_or_value == 8:
                    yield kind, struct.unpack_from("<II", cubin, at)[1]
                at += length_or_value
