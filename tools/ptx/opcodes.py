"""Every opcode that this tool runs, with all of its modifiers, and which of the machine's operations it is.

An opcode that is not in FORMS is an error. Several opcodes can be one operation: signed and unsigned additions are, and
the order of a load and its scope are fields of the instruction.
"""

from dataclasses import dataclass

ORDERS = {
    "weak": 0,
    "relaxed": 1,
    "acquire": 2,
    "release": 3,
    "acq_rel": 4,
    "volatile": 5,
}  # volatile: as relaxed, and no poll
SCOPES = {"none": 0, "cta": 1, "gpu": 2, "sys": 3}
WIDTHS = (16, 32, 64)
INTEGERS = tuple(f"{sign}{w}" for sign in "us" for w in WIDTHS)
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


@dataclass(frozen=True)
class Form:
    """How one opcode is run. `operands` has a letter for each: d and D a register and a predicate that are
    written, s and Q that are read; 2 is `d|D`; m an address; v values to store and V registers to load,
    alone or in braces; l a label; n an integer; x nothing (`_`)."""

    op: str
    operands: str
    type: str = "u32"  # of immediates
    order: str = "weak"
    scope: str = "none"


def unsigned(t):
    """The operation's type where the sign makes no difference."""
    return "u" + t[1:] if t[0] in "sub" else t


def _arithmetic():
    forms = {}
    for t in INTEGERS:
        for name in ("add", "sub"):
            forms[f"{name}.{t}"] = Form(f"{name}.{unsigned(t)}", "dss", t)
        for name in ("div", "rem", "min", "max", "mul.hi"):
            forms[f"{name}.{t}"] = Form(f"{name}.{t}", "dss", t)
        forms[f"mul.lo.{t}"] = Form(f"mul.{unsigned(t)}", "dss", t)
        forms[f"mad.lo.{t}"] = Form(f"mad.{unsigned(t)}", "dsss", t)
        forms[f"neg.{t}"] = Form(f"neg.{unsigned(t)}", "ds", t)
        forms[f"abs.{t}"] = Form(f"abs.{t}", "ds", t)
        forms[f"shr.{t}"] = Form(f"shr.{t}", "dss", t)
        if not t.endswith("64"):
            forms[f"mul.wide.{t}"] = Form(f"mul.wide.{t}", "dss", t)
            forms[f"mad.wide.{t}"] = Form(f"mad.wide.{t}", "dsss", t)
    for w in WIDTHS:
        for name in ("and", "or", "xor"):
            forms[f"{name}.b{w}"] = Form(f"{name}.u{w}", "dss", f"u{w}")
        forms[f"not.b{w}"] = Form(f"not.u{w}", "ds", f"u{w}")
        forms[f"shl.b{w}"] = Form(f"shl.u{w}", "dss", f"u{w}")
        forms[f"shr.b{w}"] = Form(f"shr.u{w}", "dss", f"u{w}")
    for w in (32, 64):
        forms[f"bfi.b{w}"] = Form(f"bfi.u{w}", "dssss", f"u{w}")
        forms[f"popc.b{w}"] = Form(f"popc.u{w}", "ds", f"u{w}")
        forms[f"clz.b{w}"] = Form(f"clz.u{w}", "ds", f"u{w}")
    forms["prmt.b32"] = Form("prmt.u32", "dsss")
    for t in ("f32", "f64"):
        for name in ("add", "sub", "mul", "min", "max", "div"):
            if name != "div":
                forms[f"{name}.{t}"] = Form(f"{name}.{t}", "dss", t)
            if name not in ("min", "max"):
                forms[f"{name}.rn.{t}"] = Form(f"{name}.{t}", "dss", t)
        for name in ("neg", "abs"):
            forms[f"{name}.{t}"] = Form(f"{name}.{t}", "ds", t)
    forms["fma.rn.f32"] = Form("fma.f32", "dsss", "f32")
    forms["rcp.rn.f32"] = Form("rcp.f32", "ds", "f32")
    return forms


def _predicates():
    forms = {f"{name}.pred": Form(f"{name}.pred", "DQQ") for name in ("and", "or", "xor")}
    forms["not.pred"] = Form("not.pred", "DQ")
    forms["mov.pred"] = Form("mov.pred", "DQ")
    for t in INTEGERS:
        forms |= {
            f"setp.{c}.{t}": Form(f"setp.{c}.{t if c not in ('eq', 'ne') else unsigned(t)}", "Dss", t)
            for c in COMPARISONS
        }
    for w in WIDTHS:
        forms |= {f"setp.{c}.b{w}": Form(f"setp.{c}.u{w}", "Dss", f"u{w}") for c in ("eq", "ne")}
    for t in ("f32", "f64"):
        forms |= {
            f"setp.{c}{u}.{t}": Form(f"setp.{c}{u}.{t}", "Dss", t) for c in COMPARISONS for u in ("", "u")
        }
        forms |= {f"setp.{c}.{t}": Form(f"setp.{c}.{t}", "Dss", t) for c in ("num", "nan")}
    for t in (*INTEGERS, "b16", "b32", "b64", "f32", "f64"):
        forms[f"selp.{t}"] = Form(f"selp.u{t[1:]}", "dssQ", t)
    forms["vote.sync.any.pred"] = Form("vote.any", "DQs")
    forms["vote.sync.all.pred"] = Form("vote.all", "DQs")
    return forms


def _conversions():
    forms, whole = {}, (*INTEGERS, "u8", "s8")
    for d in whole:
        forms |= {f"cvt.{d}.{s}": Form(f"cvt.{unsigned(d)}.{s}", "ds", s) for s in whole}
    for i in ("u32", "s32", "u64", "s64"):
        forms[f"cvt.rn.f32.{i}"] = Form(f"cvt.f32.{i}", "ds", i)
        forms[f"cvt.rzi.{i}.f32"] = Form(f"cvt.{i}.f32", "ds", "f32")
    forms["cvt.f64.f32"] = Form("cvt.f64.f32", "ds", "f32")
    forms["cvt.rn.f32.f64"] = Form("cvt.f32.f64", "ds", "f64")
    forms["cvt.f32.f16"] = Form("cvt.f32.f16", "ds", "u16")
    forms["cvt.rn.f16.f32"] = Form("cvt.f16.f32", "ds", "f32")
    forms["cvt.f32.bf16"] = Form("cvt.f32.bf16", "ds", "u16")
    forms["cvt.rn.bf16.f32"] = Form("cvt.bf16.f32", "ds", "f32")
    for t in (*INTEGERS, "b16", "b32", "b64", "f32", "f64"):
        forms[f"mov.{t}"] = Form(f"mov.u{t[1:]}", "ds", t)
    for space in ("global", "param"):
        forms |= {
            f"cvta.{space}.u64": Form("mov.u64", "ds", "u64"),
            f"cvta.to.{space}.u64": Form("mov.u64", "ds", "u64"),
        }
    forms |= {
        "cvta.shared.u64": Form("cvta.shared", "ds", "u64"),
        "cvta.to.shared.u64": Form("cvta.to.shared", "ds", "u64"),
    }
    return forms


def _memory():
    forms = {}
    kinds = [
        (f".{o}" if o else "", f".{s}" if s else "")
        for o, s in [
            ("", ""),
            ("weak", ""),
            ("volatile", ""),
            *((o, s) for o in ("relaxed", "acquire", "release") for s in ("cta", "gpu", "sys")),
        ]
    ]
    for order, scope in kinds:
        ordered = dict(
            order=order[1:] or "weak", scope="sys" if order == ".volatile" else scope[1:] or "none"
        )
        for space in ("", ".global", ".shared", ".shared::cta", ".param"):
            place = space[1:].split("::")[0] or "global"  # a generic address may be of shared memory, too
            for n in (1, 2, 4):
                for t in (
                    "b8",
                    "u8",
                    "s8",
                    "b16",
                    "u16",
                    "s16",
                    "b32",
                    "u32",
                    "s32",
                    "b64",
                    "u64",
                    "s64",
                    "f32",
                    "f64",
                ):
                    if n * int(t[1:]) > 128 or (order and space == ".param"):
                        continue
                    read = t if t[0] == "s" else f"u{t[1:]}"
                    name = f"{order}{scope}{space}{f'.v{n}' if n > 1 else ''}.{t}"
                    if order != ".release":
                        forms["ld" + name] = Form(f"ld.{place}.{n}.{read}", "Vm", t, **ordered)
                    if order != ".acquire":
                        forms["st" + name] = Form(f"st.{place}.{n}.u{t[1:]}", "mv", t, **ordered)
    for order in ("", "relaxed", "acquire", "release", "acq_rel"):
        for scope in ("cta", "gpu", "sys") if order else ("",):
            ordered = dict(order=order or "relaxed", scope=scope or "gpu")
            middle = f".{order}.{scope}" if order else ""
            for t in ("u32", "u64"):
                for space in (".global", ""):  # generic addresses are those of global memory here
                    forms[f"atom{middle}{space}.add.{t}"] = Form(f"atom.add.{t}", "dms", t, **ordered)
                    forms[f"atom{middle}{space}.cas.b{t[1:]}"] = Form(f"atom.cas.{t}", "dmss", t, **ordered)
                if order in ("", "relaxed", "release"):
                    forms[f"red{middle}.global.add.{t}"] = Form(f"red.add.{t}", "ms", t, **ordered)
    return forms


def _meetings():
    forms = {
        "bar.warp.sync": Form("bar.warp", "s"),
        "barrier.sync": Form("barrier", "ss"),
        "bar.sync": Form("barrier", "ss"),
        "shfl.sync.idx.b32": Form("shfl.idx", "2ssss"),
        "shfl.sync.bfly.b32": Form("shfl.bfly", "2ssss"),
        "bra": Form("bra", "l"),
        "bra.uni": Form("bra", "l"),
        "ret": Form("ret", ""),
        "exit": Form("ret", ""),
        "call.uni": Form("call", "c"),
        "call": Form("call", "c"),
        "fence.proxy.async.global": Form("fence.proxy", ""),
        "fence.proxy.async": Form("fence.proxy.both", ""),
        "fence.proxy.async.shared::cta": Form("fence.proxy.shared", ""),
        "fence.mbarrier_init.release.cluster": Form("fence.mbarrier_init", ""),
        "mbarrier.init.shared::cta.b64": Form("mbarrier.init", "ms"),
        "mbarrier.arrive.expect_tx.shared::cta.b64": Form("mbarrier.expect_tx", "xms"),
        "mbarrier.try_wait.parity.shared::cta.b64": Form(
            "mbarrier.try_wait", "Dms", order="acquire", scope="cta"
        ),
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes": Form("bulk.load", "mmsm"),
        "cp.async.bulk.global.shared::cta.bulk_group": Form("bulk.store", "mms"),
        "cp.async.bulk.commit_group": Form("bulk.commit", ""),
        "cp.async.bulk.wait_group": Form("bulk.wait", "n"),
        "cp.async.bulk.wait_group.read": Form("bulk.wait_read", "n"),
    }
    for scope in ("cta", "gpu", "sys"):
        forms[f"fence.acq_rel.{scope}"] = forms[f"fence.sc.{scope}"] = Form(
            "fence", "", order="acq_rel", scope=scope
        )
    for name, scope in (("cta", "cta"), ("gl", "gpu"), ("sys", "sys")):
        forms[f"membar.{name}"] = Form("fence", "", order="acq_rel", scope=scope)
    return forms


FORMS = {**_arithmetic(), **_predicates(), **_conversions(), **_memory(), **_meetings()}
# Where operands, not the opcode, choose the operation.
EXTRA = ("pack.2", "pack.4", "unpack.2", "unpack.4", "globaltimer", "mov.param", "ld.local", "st.local")
