"""All opcodes of tools/ptx compared with arithmetic on Python's integers and fractions."""

import math
import random
import re
import struct
from fractions import Fraction

import pytest
import torch
from ptx.opcodes import EXTRA, FORMS
from ptx_machine import kernel, library, run, write

LANES, BLOCKS = 32, 4
OF_TYPE = {"16": "%rs", "32": "%r", "64": "%rd", "f32": "%f", "f64": "%fd"}
SKIPPED = re.compile(
    r"ld\.|st\.|atom|red\.|bra|ret|exit|call|bar|fence|membar|mbarrier|cp\.|shfl|vote|cvta"
)  # tested in tests/ptx/test_ptx_machine.py
ARITHMETIC = sorted(name for name in FORMS if not SKIPPED.match(name))


def f32(bits):
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]


def f64(bits):
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


def bits32(value):
    """Return the bits of the nearest float, ties to even; one NaN."""
    if isinstance(value, Fraction):
        value = nearest(value)
    if value != value:
        return 0x7FFFFFFF
    try:
        return struct.unpack("<I", struct.pack("<f", value))[0]
    except OverflowError:
        return 0x7F800000 if value > 0 else 0xFF800000


def nearest(value):
    """Return the float32 nearest to a fraction; rounding twice would be wrong."""
    if abs(value) >= Fraction(2) ** 128 - Fraction(2) ** 103:
        return math.copysign(math.inf, value)
    if value == 0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))) - 1, -126)
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return math.copysign(float(round(value / unit) * unit), value)  # round() rounds to even


def signed(v, width):
    v &= (1 << width) - 1
    return v - (1 << width) if v >> (width - 1) else v


def value(v, t):
    """Return bits as a value of a PTX type."""
    if t == "f32":
        return f32(v)
    if t == "f64":
        return f64(v)
    width = int(t[1:])
    return signed(v, width) if t[0] == "s" else v & (1 << width) - 1


def divide(a, b):
    q = abs(a) // abs(b)
    return -q if (a < 0) != (b < 0) else q


def quotient(a, b):
    if b == 0:
        return math.nan if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1, b)
    return a / b


def extreme(a, b, low):
    if a != a or b != b:
        return b if a != a else a
    if a == b == 0:
        return math.copysign(
            0.0,
            -1
            if (
                math.copysign(1, a) < 0 or math.copysign(1, b) < 0
                if low
                else math.copysign(1, a) < 0 and math.copysign(1, b) < 0
            )
            else 1,
        )
    return min(a, b) if low else max(a, b)


def product_and_sum(a, b, c):
    if not all(map(math.isfinite, (a, b, c))):
        p = a * b
        return p + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return a * b + c if a * b == 0 else 0.0
    return exact


def compare(c, a, b):
    name, unordered = (c[:-1], True) if len(c) == 3 and c.endswith("u") else (c, False)
    if c in ("num", "nan"):
        return (a == a and b == b) == (c == "num")
    if a != a or b != b:
        return unordered
    return {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}[name]


def permuted(a, b, c):
    both = (b & 0xFFFFFFFF) << 32 | a & 0xFFFFFFFF
    out = 0
    for k in range(4):
        pick = c >> 4 * k & 15
        byte = both >> 8 * (pick & 7) & 255
        out |= (255 * (byte >> 7) if pick & 8 else byte) << 8 * k
    return out


def inserted(a, b, at, length, width):
    at, length = at & 255, length & 255
    mask = ((1 << length) - 1) << at
    return (b & ~mask | a << at & mask) & (1 << width) - 1


def converted(d, s, v):
    """Return the result of cvt as bits."""
    if d[0] in "us" and s[0] in "us":
        return value(v, s)
    if s == "f16":
        x = torch.tensor([signed(v, 16)], dtype=torch.int16).view(torch.float16).to(torch.float32)
        return bits32(x.item())
    if s == "bf16":
        return (v & 0xFFFF) << 16
    x = value(v, s)
    if d == "f16":
        return (
            0x7FFF
            if x != x
            else torch.tensor([x], dtype=torch.float32).to(torch.float16).view(torch.int16).item()
        )
    if d == "bf16":
        return (
            0x7FFF
            if x != x
            else torch.tensor([x], dtype=torch.float32).to(torch.bfloat16).view(torch.int16).item()
        )
    if d == "f64":
        return struct.unpack("<Q", struct.pack("<d", x))[0]
    if d == "f32":
        return bits32(Fraction(x) if x != 0 and (isinstance(x, int) or math.isfinite(x)) else float(x))
    width = int(d[1:])
    low, high = (-(1 << width - 1), (1 << width - 1) - 1) if d[0] == "s" else (0, (1 << width) - 1)
    return 0 if x != x else high if x >= high + 1 else low if x <= low else int(x)


def oracle(name, a, b, c, d, p, q):
    """Return (bits, width) of an opcode's result from registers a to d and predicates p and q."""
    parts = name.split(".")
    op, t = parts[0], parts[-1]
    if op == "cvt":
        to, of = parts[-2], parts[-1]
        return converted(to, of, a), {"f": 32, "b": 16}.get(to[0], 0) if to in ("f32", "bf16") else int(
            re.sub(r"\D", "", to)
        )
    if t == "pred":
        return {"and": p & q, "or": p | q, "xor": p ^ q, "not": not p, "mov": p}[op], 1
    width = int(t[1:])
    if op == "setp":
        return compare(parts[1], value(a, t), value(b, t)), 1
    if op in ("selp", "mov"):
        return (a if op == "mov" or p else b), width
    if op == "prmt":
        return permuted(a, b, c), 32
    if op == "bfi":
        return inserted(a & (1 << width) - 1, b & (1 << width) - 1, c, d, width), width
    if op in ("popc", "clz"):
        v = a & (1 << width) - 1
        return v.bit_count() if op == "popc" else width - v.bit_length(), 32
    x, y, z = value(a, t), value(b, t), value(c, t)
    if t[0] == "f":
        with_nan = {
            "add": lambda: x + y,
            "sub": lambda: x - y,
            "mul": lambda: x * y,
            "div": lambda: quotient(x, y),
            "neg": lambda: -x,
            "abs": lambda: abs(x),
            "min": lambda: extreme(x, y, True),
            "max": lambda: extreme(x, y, False),
            "fma": lambda: product_and_sum(x, y, z),
            "rcp": lambda: quotient(1.0, x),
        }
        try:
            r = with_nan[op]()
        except OverflowError:  # of Python's floats
            r = math.inf
        return (bits32(r), 32) if t == "f32" else (struct.unpack("<Q", struct.pack("<d", r))[0], 64)
    if op in ("shl", "shr"):
        n = min(b & 0xFFFFFFFF, width)
        return (x << n if op == "shl" else x >> n), width
    if op in ("mul", "mad") and parts[1] == "wide":
        return x * y + (0 if op == "mul" else value(c, t[0] + str(2 * width))), 2 * width
    if op == "mul" and parts[1] == "hi":
        return x * y >> width, width
    return {
        "add": lambda: x + y,
        "sub": lambda: x - y,
        "mul": lambda: x * y,
        "mad": lambda: x * y + z,
        "div": lambda: divide(x, y),
        "rem": lambda: x - y * divide(x, y),
        "min": lambda: min(x, y),
        "max": lambda: max(x, y),
        "and": lambda: x & y,
        "or": lambda: x | y,
        "xor": lambda: x ^ y,
        "not": lambda: ~x,
        "neg": lambda: -x,
        "abs": lambda: abs(x),
    }[op](), width


def types_of(name):
    """Return (type of the result, types of the sources) as names of registers."""
    parts = name.split(".")
    t = parts[-1]

    def register(t):
        return t if t in ("f32", "f64") else "16" if t in ("f16", "bf16") else str(max(16, int(t[1:])))

    if parts[0] == "cvt":
        return register(parts[-2]), [register(t)]
    if t == "pred":
        return "pred", []
    own = register(t)
    if parts[0] == "setp":
        return "pred", [own, own]
    if parts[0] in ("shl", "shr"):
        return own, [own, "32"]
    if parts[0] == "bfi":
        return own, [own, own, "32", "32"]
    if parts[0] in ("popc", "clz"):
        return "32", [own]
    if "wide" in parts:
        return str(2 * int(own)), [own, own, str(2 * int(own))]
    return own, [own] * 4


def body(name):
    """Return the opcode between loads and a store of 8 bytes; sources a to d are 32 bytes apart for each thread."""
    form = FORMS[name]
    made, sources = types_of(name)
    lines = [
        "mul.wide.u32 %rd3, %r0, 40;",
        "add.s64 %rd3, %rd0, %rd3;",
        "mul.wide.u32 %rd4, %r0, 8;",
        "add.s64 %rd4, %rd1, %rd4;",
        "ld.global.u32 %r18, [%rd3+32];",
        "and.b32 %r19, %r18, 1;",
        "setp.eq.s32 %p10, %r19, 1;",
        "and.b32 %r19, %r18, 2;",
        "setp.eq.s32 %p11, %r19, 2;",
    ]
    operands, taken, predicates = [], 0, ["%p10", "%p11"]
    for letter in form.operands:
        if letter == "d":
            operands.append(OF_TYPE[made] + "9")
        elif letter == "D":
            operands.append("%p9")
        elif letter == "s":
            register = f"{OF_TYPE[sources[taken]]}{5 + taken}"
            lines.append(
                f"ld.global.{'b' + sources[taken] if sources[taken].isdigit() else sources[taken]} "
                f"{register}, [%rd3+{8 * taken}];"
            )
            operands.append(register)
            taken += 1
        else:
            operands.append(predicates.pop(0))
    lines.append(f"{name} {', '.join(operands)};")
    if made == "pred":
        lines += ["selp.u32 %r9, 1, 0, %p9;", "st.global.u32 [%rd4], %r9;"]
    else:
        lines.append(f"st.global.{'b' + made if made.isdigit() else made} [%rd4], {OF_TYPE[made]}9;")
    return "\n".join(lines)


INTERESTING = [
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 63,
    (1 << 63) - 1,
    (1 << 64) - 1,
    0x3F800000,
    0x7F800000,
    0xFF800000,
    0x7FC00001,
    0x00000001,
    0x00800000,
    0x3FF0000000000000,
    0x7FF0000000000000,
    0x7FF8000000000000,
    0x4F000000,
    0xCF000000,
    0x5F000000,
    0x477FE000,
    0x477FF000,
    0x33000000,
    0x33000001,
    0x3C00,
    0x7C00,
    0x7E01,
    0x0001,
]


def sources(name, seed):
    """Return numbers at the limits of every width."""
    r = random.Random(seed)
    picks = [
        lambda: r.choice(INTERESTING),
        lambda: r.getrandbits(64),
        lambda: r.getrandbits(r.randrange(1, 64)),
        lambda: r.randrange(70),
        lambda: bits32(r.uniform(-4, 4)),
        lambda: struct.unpack("<Q", struct.pack("<d", r.uniform(-1e9, 1e9)))[0],
        lambda: bits32(r.uniform(-3e9, 3e9)),
    ]
    found = [[r.choice(picks)() for _ in range(4)] + [r.randrange(4)] for _ in range(LANES * BLOCKS)]
    if name.split(".")[0] in ("div", "rem") and name.split(".")[-1][0] != "f":
        width = int(name.split(".")[-1][1:])
        for row in found:
            row[1] = row[1] if row[1] & (1 << width) - 1 else 7
    return found


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("ptx") / "opcodes.machine"
    return write(path, *(kernel("k_" + re.sub(r"\W", "_", name) + "_", body(name)) for name in ARITHMETIC))


@pytest.mark.parametrize("group", sorted({name.split(".")[0] for name in ARITHMETIC}))
def test_opcodes(module, group):
    for name in (n for n in ARITHMETIC if n.split(".")[0] == group):
        given = sources(name, name)
        x = torch.tensor([[signed(v, 64) for v in row] for row in given], dtype=torch.int64)
        out = torch.zeros(len(given), dtype=torch.int64)
        assert run(module, "k_" + re.sub(r"\W", "_", name) + "_", [x, out], BLOCKS, LANES) is None
        for row, got in zip(given, out.tolist()):
            want, width = oracle(name, *row[:4], bool(row[4] & 1), bool(row[4] & 2))
            mask = (1 << width) - 1
            got, want = got & mask, int(want) & mask
            if (
                name.endswith(".f64")
                and name.split(".")[0] not in ("setp", "cvt", "selp", "mov")
                and f64(want) != f64(want)
            ):
                assert f64(got) != f64(got), (
                    f"{name} {[hex(v) for v in row]}"
                )  # the payload of a double's NaN is not specified
                continue
            assert got == want, f"{name} of {[hex(v) for v in row]}: got {got:#x}, expected {want:#x}"


def test_the_machine_and_the_table_of_opcodes_have_the_same_operations():
    ours = {form.op for form in FORMS.values()} | set(EXTRA) | {"copy.local"}
    theirs = set(library().ptx_operations().decode().split())
    spaces = {op for op in theirs if re.match(r"(ld|st)\.(local|param)\.", op)}  # the operand selects these
    assert not {op for op in ours - theirs if not op.startswith(("st.param", "ld.local", "st.local"))}
    assert not theirs - ours - spaces
