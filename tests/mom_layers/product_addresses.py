"""Finds products of Hopper's tensor cores whose operands' addresses a compiled kernel takes from data or from nothing.

An address of an operand in shared memory follows from constants, the thread's number and loop counters alone. So the
instructions on integers are executed here for one thread, from the kernel's start through a few rounds of each loop,
with every number from memory unknown; a product with an unknown address is a fault of the compiler.
`undefined_registers` says where such faults come from; that check misses a wrong register that held something else.
"""

from __future__ import annotations

import re

from undefined_registers import instructions_of, listing_of, operands_of

ROUNDS = 2
"""How often a loop is repeated, so that addresses which change from round to round are seen."""
_MASK = 2**32 - 1
_REGISTER = re.compile(r"U?R\d+$")
_PREDICATE = re.compile(r"!?U?P(T|\d)$")
_COMPARISONS = {
    "GT": int.__gt__, "GE": int.__ge__, "LT": int.__lt__, "LE": int.__le__, "EQ": int.__eq__, "NE": int.__ne__,
}  # fmt: skip


def _signed(number: int) -> int:
    return (number ^ 2**31) - 2**31


def _next(register: str, by: int = 1) -> str:
    name, number = re.match(r"(U?R)(\d+)$", register).groups()
    return f"{name}{int(number) + by}"


class _Thread:
    """Registers, predicates and local memory of one thread; None stands for an unknown number."""

    def __init__(self, number: int):
        self.number, self.registers, self.predicates, self.local = number, {"R1": 0}, {}, {}

    def value(self, operand: str) -> int | None:
        sign = re.match(r"[-~]?(?=U?R)", operand)
        name = operand[sign.end() :] if sign else operand
        if name in ("RZ", "URZ"):
            number = 0
        elif _REGISTER.match(name):
            number = self.registers.get(name)
        else:
            number = int(name, 0) & _MASK if re.match(r"-?(0x[0-9a-f]+|\d+)$", name) else None
        if number is None or not sign or not sign[0]:
            return number
        return (-number if sign[0] == "-" else ~number) & _MASK

    def pair(self, operand: str) -> int | None:
        if not _REGISTER.match(operand.lstrip("-")):
            return int(operand, 0) & (2**64 - 1) if re.match(r"-?0x", operand) else self.value(operand)
        name = operand.lstrip("-")
        low, high = self.registers.get(name), self.registers.get(_next(name))
        if low is None or high is None:
            return None
        return (low | high << 32) * (-1 if operand.startswith("-") else 1) & (2**64 - 1)

    def holds(self, predicate: str) -> bool | None:
        found = True if predicate.lstrip("!") in ("PT", "UPT") else self.predicates.get(predicate.lstrip("!"))
        return found if found is None else found != predicate.startswith("!")

    def write(self, register: str, number: int | None, words: int = 1) -> None:
        for word in range(words):
            self.registers[_next(register, word)] = None if number is None else number >> 32 * word & _MASK

    def execute(self, name: str, guard: str | None, operands: list[str]) -> None:
        """Any instruction that is no branch and no product."""
        runs = True if guard is None else self.holds(guard.removeprefix("@"))
        if runs is False:
            return
        kind, forms = name.split(".")[0], name.split(".")[1:]
        if kind in ("STL", "LDL"):
            self._local_memory(kind, forms, operands)
            return
        base = kind if kind in ("UR", "R2UR") else kind.removeprefix("U")
        while operands and _PREDICATE.match(operands[0]) and base != "ISETP":
            self.predicates[operands[0].lstrip("!")] = None
            operands = operands[1:]
        if base == "ISETP":
            self._compare(forms, operands, runs)
            return
        if not operands or not _REGISTER.match(operands[0]):
            return
        target, sources = operands[0], operands[1:]
        words = 4 if "128" in forms or kind == "LDSM" else 2 if {"64", "WIDE"} & {*forms} or kind == "CS2R" else 1
        number = self._result(base, forms, sources, words)
        self.write(target, number if runs else None, words)

    def _result(self, base: str, forms: list[str], sources: list[str], words: int) -> int | None:
        carries = []
        while base in ("IADD3", "LEA") and sources and _PREDICATE.match(sources[0]):
            carries.append(sources.pop(0))
        numbers = [
            self.pair(x) if base == "IADD3" and "64" in forms else self.value(x)
            for x in sources
            if not _PREDICATE.match(x)
        ]
        carried = [self.holds(x) for x in sources if _PREDICATE.match(x)]
        for carry in carries:
            self.predicates[carry] = None
        if base == "S2R" or base == "S2UR":
            special = {"SR_TID.X": self.number, "SR_LANEID": self.number % 32, "SR_CTAID.X": 0, "SR_CgaCtaId": 0}
            return special.get(sources[0])
        if base == "CS2R":
            return 0 if sources[0] == "SRZ" else None
        if base == "IMAD" and not {"WIDE", "HI", "X"} & {*forms} and 0 in numbers[:2]:
            return numbers[2]
        if base == "SEL":
            return numbers[0] if numbers[0] == numbers[1] or carried[0] else numbers[1] if carried[0] is False else None
        if None in numbers or not numbers or (None in carried and "X" in forms):
            return None
        carried_in = sum(carried) if "X" in forms else 0
        if base in ("IADD3", "IADD", "VIADD"):
            total = sum(numbers) + carried_in
            for place, carry in enumerate(carries):
                self.predicates[carry] = total > _MASK if place == 0 else False
            return total & (2**64 - 1 if words == 2 else _MASK)
        if base == "IMAD" and "WIDE" not in forms and "HI" not in forms:
            return numbers[0] * numbers[1] + numbers[2] + carried_in & _MASK
        if base in ("MOV", "R2UR"):
            return numbers[0]
        if base == "LEA" and not forms:
            return (numbers[0] << numbers[2]) + numbers[1] & _MASK
        if base == "LEA" and forms == ["HI"] and not carries:
            return ((numbers[2] << 32 | numbers[0]) << numbers[3] >> 32) + numbers[1] & _MASK
        if base == "SHF":
            low, count, high = numbers[:3]
            if forms[0] == "L":
                return (high << 32 | low) << count >> 32 & _MASK if "HI" in forms else low << count & _MASK
            return (_signed(high) if "S32" in forms else high) >> count & _MASK if "HI" in forms else None
        if base == "SGXT":
            part = numbers[0] & 2 ** numbers[1] - 1
            return part if "U32" in forms or not part >> numbers[1] - 1 else part - 2 ** numbers[1] & _MASK
        if base == "LOP3":
            a, b, c, table = numbers[:4]
            rows = [
                (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if table >> i & 1
            ]
            return sum(rows) & _MASK
        return None

    def _compare(self, forms: list[str], operands: list[str], runs: bool | None) -> None:
        target, left, right = operands[0], self.value(operands[2]), self.value(operands[3])
        also = self.holds(operands[4]) if len(operands) > 4 else True
        found = None
        if None not in (left, right, also) and "EX" not in forms and "AND" in forms and forms[0] in _COMPARISONS:
            sides = (left, right) if "U32" in forms else (_signed(left), _signed(right))
            found = _COMPARISONS[forms[0]](*sides) and also
        self.predicates[target] = found if runs else None

    def _local_memory(self, kind: str, forms: list[str], operands: list[str]) -> None:
        place = re.search(r"\[R1(?:\+(-?0x[0-9a-f]+))?\]", operands[kind == "LDL"])
        register = operands[kind == "STL"]
        for word in range(4 if "128" in forms else 2 if "64" in forms else 1):
            name = register if register == "RZ" else _next(register, word)
            if kind == "STL" and place:
                self.local[int(place[1] or "0", 16) + 4 * word] = self.value(name)
            elif kind == "LDL":
                self.registers[name] = self.local.get(int(place[1] or "0", 16) + 4 * word) if place else None


def unknown_in(listing: str, thread: int = 0) -> list[str]:
    """The products of nvdisasm's listing of one function with an operand at an unknown address, for one thread."""
    instructions, labels = instructions_of(listing)
    state, unknown, rounds, i = _Thread(thread), {}, {}, 0
    while i < len(instructions):
        found = instructions[i]
        name, operands = found["name"], [x.replace(".reuse", "") for x in operands_of(found["operands"])]
        guard = found["guard"].strip() if found["guard"] else None
        conditional = guard is not None or re.match(r"!?U?P\d", found["operands"]) is not None
        if name.startswith("BRA"):
            target = labels.get(re.search(r"\.L_x_\w+", found["operands"])[0], len(instructions))
            if target == i:
                break
            rounds[i] = rounds.get(i, 0) + 1
            if rounds[i] <= ROUNDS if target < i else not conditional:
                i = target
                continue
        elif name.startswith(("EXIT", "RET")):
            if not conditional:
                break
        elif name.startswith("HGMMA"):
            first = int(re.search(r"gdesc\[UR(\d+)\]", found["operands"])[1])
            count = 2 if re.match(r"R\d+", operands[1]) else 4
            if any(state.registers.get(f"UR{first + word}") is None for word in range(count)):
                unknown[i] = f"{name} {found['operands'].strip()}"
            columns = int(re.search(r"\.64x(\d+)x", name)[1])
            state.write(operands[0], None, columns // 2)
        elif name != "LDC" or operands[0] != "R1":  # the start of local memory, where offsets count from
            state.execute(name, guard, operands)
        i += 1
    return [unknown[i] for i in sorted(unknown)]


def unknown_addresses(kernel) -> list[str]:
    """`unknown_in` for a thread of every group of four warps of a kernel that Triton compiled for Hopper."""
    listing, warps = listing_of(kernel), kernel.metadata.num_warps
    return [line for group in range(max(1, warps // 4)) for line in unknown_in(listing, 128 * group)]
