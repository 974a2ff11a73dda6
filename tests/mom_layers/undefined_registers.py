"""Finds uniform registers that a compiled kernel reads although no instruction before wrote them.

ptxas of CUDA 12.8, which Triton 3.5 to 3.7 bring, compiles some of Hopper's asynchronous products so: where the memory
of one operand is later that of another operand with another swizzle, the address of the later operand is computed from
a register that holds nothing. The kernel then reads whatever shared memory the register names: results are wrong and
differ from run to run, or the launch ends in an illegal memory access. ptxas of CUDA 12.9 computes the address.
"""

from __future__ import annotations

import re
import subprocess
import tempfile

from triton import knobs

_INSTRUCTION = re.compile(
    r"\s*/\*[0-9a-f]{4,}\*/\s+(?P<guard>@!?U?P\w+\s+)?(?P<name>[A-Z][A-Za-z0-9_.]*)\s*(?P<operands>.*?);"
)
_LABEL = re.compile(r"\s*(\.L_x_\w+):")
# Instructions that begin with U and write no uniform register, and others that write one.
_NO_RESULT = {"UISETP", "UPLOP3", "UBLKCP", "UBLKPF", "UCGABAR_ARV", "UCGABAR_WAIT", "USETMAXREG"}
_TO_UNIFORM = {"S2UR", "R2UR", "REDUX", "VOTEU", "CS2UR"}


def _registers(text: str) -> set[int]:
    return {int(number) for number in re.findall(r"\bUR(\d+)\b", text)}


def operands_of(text: str) -> list[str]:
    """Split at the commas outside of brackets."""
    return [part.strip() for part in re.findall(r"(?:\[[^\]]*\]|\([^)]*\)|[^,\[(])+", text)]


def _written_and_read(name: str, text: str) -> tuple[set[int], set[int]]:
    """The uniform registers that an instruction writes and reads."""
    kind, operands = name.split(".")[0], operands_of(text)
    written, read = set(), set()
    has_result = kind in _TO_UNIFORM or (kind.startswith("U") and kind not in _NO_RESULT and "UTMA" not in kind)
    pairs = ".64" in name and kind not in ("USHF", "ULDC")
    if has_result and operands and operands[0].startswith("UR"):
        (first,) = _registers(operands.pop(0)) or {None}
        if first is not None:
            two = (".64" in name and kind != "USHF") or ".WIDE" in name
            written = {first, first + 1} if two else {first}
    for operand in operands:
        for first in _registers(operand):
            if "gdesc[" in operand:  # the addresses of two operands, or of one where the left is in registers
                count = 2 if re.match(r"R\d+", operands[1]) else 4
            else:
                count = 2 if "desc[" in operand or (kind.startswith("U") and pairs) or f"UR{first}.64" in operand else 1
            read |= set(range(first, first + count))
    return written, read


def instructions_of(listing: str) -> tuple[list[re.Match], dict[str, int]]:
    """The instructions of nvdisasm's listing of one function, and where its labels stand."""
    instructions, labels = [], {}
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            instructions.append(found)
    return instructions, labels


def listing_of(kernel) -> str:
    """nvdisasm's listing of a kernel that Triton compiled for an NVIDIA chip."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def undefined_in(listing: str) -> list[str]:
    """The instructions of nvdisasm's listing of one function that read a uniform register that nothing wrote on any way
    from the function's start."""
    instructions, labels = instructions_of(listing)
    accesses = [_written_and_read(found["name"], found["operands"]) for found in instructions]
    written_before: dict[int, set[int]] = {}
    ways = [(0, set())]
    while ways:
        i, written = ways.pop()
        if i >= len(instructions) or (i in written_before and written <= written_before[i]):
            continue
        written_before[i] = written = written_before.get(i, set()) | written
        name, after = instructions[i]["name"], written | accesses[i][0]
        conditional = instructions[i]["guard"] is not None or re.match(r"!?U?P\d", instructions[i]["operands"])
        if name.startswith("BRA"):
            target = re.search(r"\.L_x_\w+", instructions[i]["operands"])
            if target and target[0] in labels:
                ways.append((labels[target[0]], after))
        if not name.startswith(("BRA", "EXIT", "RET")) or conditional:
            ways.append((i + 1, after))
    return [
        instructions[i].group().split("*/")[1].strip()
        for i in sorted(written_before)
        if accesses[i][1] - written_before[i]
    ]


def undefined_registers(kernel) -> list[str]:
    """`undefined_in` of a kernel that Triton compiled for an NVIDIA chip."""
    return undefined_in(listing_of(kernel))
