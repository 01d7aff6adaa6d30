"""What `bench.gpu_faults` finds in machine code and PTX, right and spoilt.

The listings are cut out of compiled cases; `make gpu-compile` reads the whole ones.
"""

import pytest

from bench import gpu_faults

LOOP = """
        /*2140*/                   WARPGROUP.ARRIVE
        /*2150*/                   CS2R R32, SRZ
.L_x_6:
        /*21e0*/                   BAR.SYNC.DEFER_BLOCKING R2, 0x80
        /*22f0*/                   LDS R88, [R16+0x14000]
        /*2320*/                   LDS R89, [R16+0x14200]
        /*23d0*/                   WARPGROUP.ARRIVE
        /*23e0*/                   HGMMA.SP.64x16x32.F32.BF16 R24, gdesc[UR8].tnspB, R24, R88, 0x0
        /*24c0*/                   PLOP3.LUT P1, PT, PT, PT, UP1, 0x80, 0x0
        /*24d0*/                   HGMMA.SP.64x16x32.F32.BF16 R24, gdesc[UR8].tnspB, R24, R88, 0x1
        /*2500*/                   HGMMA.SP.64x16x32.F32.BF16 R24, gdesc[UR16].tnspB, R24, R89, 0x0
        /*2520*/                   HGMMA.SP.64x16x32.F32.BF16 R24, gdesc[UR8].tnspB, R24, R89, 0x1, gsb0
        /*2530*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0
        /*2540*/               @P1 BRA `(.L_x_4)
        /*2570*/                   IMAD.MOV.U32 R18, RZ, RZ, 0x80
.L_x_4:
        /*2670*/               @P0 BRA `(.L_x_6)
        /*2680*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0
        /*2690*/                   STG.E desc[UR28][R4.64], R24
        /*26a0*/                   EXIT
"""  # noqa: E501

WAIT = "        /*2530*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0\n"
DRAIN = "        /*2680*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0\n"


def test_machine_code_that_waits_for_every_product_has_no_fault():
    assert gpu_faults.machine_faults(LOOP) == []


@pytest.mark.parametrize(
    "right, wrong, fault",
    [
        (WAIT, WAIT.replace("0x0", "0x1"), "R88, metadata"),  # around the loop
        (WAIT, "", "R88, metadata"),
        ("IMAD.MOV.U32 R18", "IMAD.MOV.U32 R18", None),
        (WAIT, "/*2525*/ IMAD.WIDE R88, RZ, RZ, 0x1\n" + WAIT, "R88, metadata"),
        ("PLOP3.LUT P1, PT", "LDS.64 R87, [R1]", "R88, metadata"),
        (WAIT, "/*2525*/ STG.E desc[UR28][R4.64], R31\n" + WAIT, "R31, a sum"),
        (WAIT + "        /*2540", WAIT.replace("0x0", "0x1") + DRAIN + "/*2540", None),
    ],
)
def test_touching_registers_of_a_product_in_flight_is_told(right, wrong, fault):
    assert right in LOOP
    faults = gpu_faults.machine_faults(LOOP.replace(right, wrong))
    if fault is None:
        assert faults == []
    else:
        assert any(text.startswith(fault) for text in faults), faults


def test_metadata_may_be_written_where_products_are_taken_to_have_read_them():
    early = LOOP.replace(WAIT, WAIT.replace("0x0", "0x1"))
    assert gpu_faults.machine_faults(early)
    assert gpu_faults.machine_faults(early, latched=True) == []
    spoilt = early.replace(DRAIN, "")
    assert gpu_faults.machine_faults(spoilt, latched=True)[0].startswith("R24, a sum")


def product(k, a, b, word, selector, turned):
    return (
        f"add.s64 %rd{10 + k}, %rd1, {a};\n add.s64 %rd{20 + k}, %rd2, {b};\n"
        "{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sp.sync.aligned.m64n16k32"
        f".f32.bf16.bf16 {{%r113,%r114}}, %rd{10 + k}, %rd{20 + k}, %r{word}, "
        f"{selector}, p, 1, 1, 0, {turned}; }}\n"
    )


def listing(a, b, turned, advance, words=(93, 93, 94, 94), selectors=(0, 1, 0, 1)):
    """PTX of one step with these descriptors, as LLVM writes it."""
    return "".join(
        product(k, a + 2 * k, b + advance[k], words[k], selectors[k], turned)
        for k in range(len(advance))
    )


A, K_MAJOR = 4611686293305294848, 4611686568183201792
#: Two tiles of 64 columns of x lie side by side, 1024 bytes apart.
ROWS = dict(a=A, b=K_MAJOR, turned=0, advance=(0, 4, 64, 68))
#: 16 tokens of x^T, 32-byte swizzle: atoms of 8 rows, 256 bytes apart.
GATHERED = dict(
    a=A, b=3 << 62 | 16 << 32 | 1 << 16, turned=1, advance=(0, 64, 128, 192)
)


#: 32 stored columns of 64 bytes, one tile of 64 columns of x.
HALF = dict(a=2 << 62 | 32 << 32 | 1 << 16, b=A, turned=0, advance=(0, 4))


@pytest.mark.parametrize("form", [ROWS, GATHERED, HALF])
def test_descriptors_that_meet_the_copies_have_no_fault(form):
    stored = 16 * len(form["advance"])
    assert gpu_faults.descriptor_faults(listing(**form), 16, stored) == []


def test_selector_0_alone_has_a_word_for_every_product():
    lone = ROWS | dict(words=(93, 94, 95, 96), selectors=(0, 0, 0, 0))
    assert gpu_faults.descriptor_faults(listing(**lone), 16, 64, 1) == []
    assert gpu_faults.descriptor_faults(listing(**ROWS), 16, 64, 1)
    assert gpu_faults.descriptor_faults(listing(**lone), 16, 64, 2)


@pytest.mark.parametrize(
    "change, fault",
    [
        (dict(a=1 << 62 | 32 << 32 | 1 << 16), "A, product 0"),
        (dict(b=A + (64 << 32)), "B, product 0"),
        (dict(advance=(0, 2)), "B, product 1"),
        (dict(words=(93, 94)), "metadata"),
        (dict(selectors=(0, 0)), "selectors"),
    ],
)
def test_descriptors_of_half_a_step_that_lead_elsewhere_are_told(change, fault):
    faults = gpu_faults.descriptor_faults(listing(**HALF | change), 16, 32)
    assert any(text.startswith(fault) for text in faults), faults


@pytest.mark.parametrize("form", [ROWS, GATHERED])
@pytest.mark.parametrize(
    "change, fault",
    [
        (dict(a=A + (32 << 32)), "A, product 0"),  # stride of the stored tile
        (dict(b=lambda b: b + (8 << 32)), "B, product 0"),
        (dict(b=lambda b: b & (1 << 62) - 1 | 2 << 62), "B"),  # another swizzle
        (dict(advance=lambda a: (a[0], a[1], a[1], a[3])), "B, product 2"),
        (dict(turned=lambda t: 1 - t), "B, product"),
        (dict(words=(93, 94, 93, 94)), "metadata"),
        (dict(words=(93, 93, 93, 93)), "metadata"),
        (dict(selectors=(0, 1, 1, 0)), "selectors"),
        (dict(a=A + (1 << 49)), "A: the descriptor"),
    ],
)
def test_descriptors_that_lead_elsewhere_are_told(form, change, fault):
    spoilt = form | {
        name: value(form[name]) if callable(value) else value
        for name, value in change.items()
    }
    faults = gpu_faults.descriptor_faults(listing(**spoilt), 16)
    assert any(text.startswith(fault) for text in faults), faults


def test_a_step_of_other_than_four_products_is_told():
    one = product(0, A, K_MAJOR, 93, 0, 0)
    assert "1 sparse products" in gpu_faults.descriptor_faults(one, 16)[0]
