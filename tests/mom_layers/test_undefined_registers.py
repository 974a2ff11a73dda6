"""Which uniform registers a listing of machine code reads although nothing wrote them, and where addresses of products
are unknown."""

from product_addresses import unknown_in
from undefined_registers import undefined_in


def listing(*lines):
    """Lines as nvdisasm writes them: a label alone, or an instruction."""
    return "\n".join(
        f"{line}:" if line.startswith(".L") else f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines)
    )


def test_an_address_from_a_register_that_nothing_wrote():
    """As ptxas of CUDA 12.8 compiled the address of a product's operand."""
    code = listing(
        "S2UR UR16, SR_CTAID.X",
        "USHF.R.U32.HI UR56, URZ, 0x4, UR16",
        "UIADD3 UR34, UP0, UR34, 0x20, URZ",
        "UIADD3.X UR35, UR35, -0x3ffffff0, URZ, UP0, !UPT",
        "EXIT",
    )
    assert [line.split()[1] for line in undefined_in(code)] == ["UR34,", "UR35,"]


def test_pairs_loops_and_operands_of_products():
    code = listing(
        "ULDC.64 UR4, c[0x0][0x210]",
        "UMOV UR8, UR4",
        "UMOV UR9, 0x40000040",
        "UMOV UR10, UR5",
        "UISETP.GT.AND UP0, UPT, UR4, 0x1, UPT",
        ".L_x_1",
        "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8].tnspB, R24, gsb0",
        "LDG.E R2, desc[UR4][R2.64]",
        "UIMAD.WIDE UR12, UR4, 0x4, UR8",
        "UIADD3.64 UR14, UR12, 0x2, URZ",
        "@P0 BRA `(.L_x_1)",
        "EXIT",
    )
    (product,) = undefined_in(code)  # the fourth of its registers, UR11
    assert product.startswith("HGMMA")


def test_a_register_that_one_of_two_ways_wrote_is_no_fault():
    code = listing("@P0 BRA `(.L_x_1)", "UMOV UR4, 0x1", ".L_x_1", "UIADD3 UR5, UR4, 0x1, URZ", "EXIT", "UMOV UR6, UR7")
    assert undefined_in(code) == []


PRODUCT = "HGMMA.64x16x16.F32.BF16 R24, gdesc[UR8].tnspB, R24, gsb0"


def product_with_right_operand(*lines):
    """A product whose left operand has a known address, and whose right one follows from R4."""
    return listing(
        "S2R R2, SR_CgaCtaId",
        "MOV R3, 0x400",
        "LEA R3, R2, R3, 0x18",
        "R2UR UR4, R3",
        "USHF.R.U32.HI UR8, URZ, 0x4, UR4",
        "UMOV UR9, 0x40000040",
        *lines,
        "R2UR UR10, R4",
        "UMOV UR11, 0xc0000010",
        PRODUCT,
        "EXIT",
    )


def test_an_address_from_data_is_unknown():
    """As ptxas of CUDA 12.8 compiled an address from a register that held rows."""
    (product,) = unknown_in(product_with_right_operand("LDG.E.128 R4, desc[UR6][R2.64]", "IADD3 R4, P0, R4, 0x1, RZ"))
    assert product == PRODUCT
    assert unknown_in(product_with_right_operand("SHF.R.U32.HI R4, RZ, 0x4, R3", "IADD3 R4, P0, R4, 0x20, RZ")) == []


def test_an_address_may_follow_from_the_thread_and_the_round():
    lines = ("S2R R5, SR_TID.X", "SHF.R.U32.HI R5, RZ, 0x7, R5", "LEA R4, R5, R3, 0x4")
    assert unknown_in(product_with_right_operand(*lines), thread=128) == []
    start = product_with_right_operand("MOV R4, RZ").replace("EXIT ;", "NOP ;")
    loop = listing(".L_x_1", "R2UR UR10, R4", "LDG.E R4, desc[UR6][R2.64]", PRODUCT, "@P0 BRA `(.L_x_1)")
    assert unknown_in(f"{start}\n{loop}") == [PRODUCT]
