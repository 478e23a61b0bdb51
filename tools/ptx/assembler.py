"""Functions of instructions to the text that the machine loads: names have become places.

A register becomes a slot of the warp's file: one that lives inside a basic block shares it with others,
since most do. A constant becomes a slot that is filled once. Predicates have a file of their own. No
function calls itself, so every function's registers and parameters have places of their own, and a call
needs no stack but of return addresses.
"""

import re
import struct
from itertools import chain

from .opcodes import FORMS, ORDERS, SCOPES
from .parser import Instruction, Label, PtxError

SPECIAL = {"%tid.x": 0, "%ntid.x": 1, "%ctaid.x": 2, "%nctaid.x": 3}
MEMORY = re.compile(r"\[\s*([%\w$.@]+)\s*(?:\+\s*(-?\d+))?\s*\]")
ENDS_BLOCK = ("bra", "ret", "call")
COLLECTIVES = ("bar.warp", "shfl.idx", "shfl.bfly", "vote.any", "vote.all")
WRITTEN, PREDICATES = "dDV2", "DQ"


class Assembler:
    """Of one module."""

    def __init__(self, module):
        self.module = module
        self.rows, self.constants, self.functions = [], {}, {}
        self.slots, self.predicates, self.locals = len(SPECIAL), 0, 0
        self.places, self.shared_bytes = {}, 0
        for v in module.shared:
            if v.bytes:
                self.shared_bytes = -(-self.shared_bytes // v.align) * v.align
                self.places[v.name] = self.shared_bytes
                self.shared_bytes += v.bytes
        for v in module.shared:
            if not v.bytes:
                self.shared_bytes = -(-self.shared_bytes // v.align) * v.align
                self.places[v.name] = self.shared_bytes

    # -- places ----------------------------------------------------------------------------------------------

    def lay_out(self, variables):
        """Places in every lane's memory of parameters; {name: offset}."""
        found = {}
        for v in variables:
            self.locals = -(-self.locals // max(v.align, 8)) * max(v.align, 8)
            found[v.name] = self.locals
            self.locals += v.bytes
        return found

    def constant(self, text, kind, line):
        """The slot of an immediate."""
        if text in self.places:
            bits = self.places[text]
        elif re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            bits = int(text[2:], 16)
            if kind == "f64":
                bits = struct.unpack(
                    "<Q", struct.pack("<d", struct.unpack("<f", struct.pack("<I", bits))[0])
                )[0]
        elif re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            bits = int(text[2:], 16)
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            bits = int(text.rstrip("U"), 0) & (1 << 64) - 1
        else:
            raise PtxError(line, f"an operand that is no register, number or shared variable: {text!r}")
        return self.constants.setdefault(bits, -2 - len(self.constants))

    # -- functions -------------------------------------------------------------------------------------------

    def assemble(self):
        """The machine's text."""
        called = {}
        for f in self.module.functions.values():
            if f.entry:
                offset = 0
                names = {}
                for v in f.parameters:
                    offset = -(-offset // v.align) * v.align
                    names[v.name] = offset
                    offset += v.bytes
                called[f.name] = names, offset, [(names[v.name], v.bytes) for v in f.parameters]
            else:
                called[f.name] = self.lay_out([*f.results, *f.parameters]), 0, []
        lines = []
        for f in self.module.functions.values():
            if f.body is None:
                continue
            start = len(self.rows)
            Body(self, f, called).run()
            _, size, parts = called[f.name]
            lines.append(
                f"function {f.name} {int(f.entry)} {start} {len(self.rows)} {size} {len(parts)} "
                + " ".join(f"{at} {n}" for at, n in parts)
            )
        starts = {line.split()[1]: int(line.split()[3]) for line in lines if line.startswith("function")}
        for row in self.rows:
            if row[0] == "call":
                row[11] = starts[row.pop()]
        n = len(self.constants)
        head = [
            f"machine 2 {len(self.rows)} {self.slots + n} {self.predicates} {self.locals} {self.shared_bytes}"
        ]
        head += [f"file {k} {v}" for k, v in sorted(self.module.files.items())]
        head += [f"constant {self.slots - 2 - slot} {bits}" for bits, slot in self.constants.items()]
        return "\n".join([*head, *lines, *(" ".join(map(str, self.placed(row))) for row in self.rows)]) + "\n"

    def placed(self, row):
        """Constants lie behind the registers, whose number is known now."""
        return [
            *row[:4],
            *(self.slots - 2 - r if r < -1 and kind else r for r, kind in zip(row[4:11], row[14])),
            *row[11:14],
            sum(1 << k for k, kind in enumerate(row[14]) if kind is True),
            sum(1 << k for k, kind in enumerate(row[14]) if kind == "w"),
        ]


class Body:
    """Of one function."""

    def __init__(self, owner, function, called):
        self.owner, self.f, self.called = owner, function, called
        self.parameters = called[function.name][0]
        self.locals = owner.lay_out(function.locals)
        self.slot_of, self.pred_of, self.labels, self.jumps = {}, {}, {}, []

    def kind(self, name, line):
        """Type of a register."""
        found = self.f.registers.get(name) or self.f.registers.get(re.sub(r"\d+$", "", name))
        if found is None:
            raise PtxError(line, f"an unknown register: {name!r}")
        return found

    def run(self):
        """Emit the rows."""
        self.allocate()
        for item in self.f.body:
            if isinstance(item, Label):
                self.labels[item.name] = len(self.owner.rows)
            else:
                self.emit(item)
        for row, label, line in self.jumps:
            if label not in self.labels:
                raise PtxError(line, f"an unknown label: {label!r}")
            row[11] = self.labels[label]

    # -- registers -------------------------------------------------------------------------------------------

    def mentions(self, i):
        """(registers read, registers written) by an instruction."""
        form = self.form(i)
        read, written = [i.guard] if i.guard else [], []
        for letter, text in zip(form.operands, i.operands):
            names = re.findall(r"%[\w.]+(?:@\d+)?|\b\w+@\d+", text)
            (written if letter in WRITTEN else read).extend(
                n
                for n in names
                if n not in SPECIAL and not n.startswith("%globaltimer") and n not in self.locals
            )
        return read, written

    def allocate(self):
        """Slots: shared between registers that live inside one basic block each."""
        where, block, first = {}, 0, {}
        for item in self.f.body:
            if isinstance(item, Label):
                block += 1
                continue
            read, written = self.mentions(item)
            for name in [*read, *written]:
                where.setdefault(name, set()).add(block)
            for name in read:
                first.setdefault(name, False)
            for name in written:
                first.setdefault(name, item.guard is None)
            if self.form(item).op in ENDS_BLOCK:
                block += 1
        inside = {n for n, blocks in where.items() if len(blocks) == 1 and first[n]}
        last = {}
        for at, item in enumerate(self.f.body):
            if isinstance(item, Instruction):
                for name in chain.from_iterable(self.mentions(item)):
                    last[name] = at
        free = {True: [], False: []}
        for at, item in enumerate(self.f.body):
            if not isinstance(item, Instruction):
                continue
            names = dict.fromkeys(chain.from_iterable(self.mentions(item)))
            for name in names:
                is_pred = self.kind(name, item.line) == "pred"
                table = self.pred_of if is_pred else self.slot_of
                if name in table:
                    continue
                if name in inside and free[is_pred]:
                    table[name] = free[is_pred].pop()
                elif is_pred:
                    table[name] = self.owner.predicates
                    self.owner.predicates += 1
                else:
                    table[name] = self.owner.slots
                    self.owner.slots += 1
            for name in names:
                if name in inside and last[name] == at:
                    is_pred = name in self.pred_of
                    free[is_pred].append((self.pred_of if is_pred else self.slot_of)[name])

    # -- instructions ----------------------------------------------------------------------------------------

    def form(self, i):
        """What runs an instruction.

        Raises
        ------
        PtxError
            Its opcode is not known, or it has another number of operands than it should.
        """
        found = FORMS.get(i.opcode)
        if found is None:
            raise PtxError(i.line, f"unknown opcode {i.opcode!r}")
        if len(i.operands) != len(found.operands) and found.op not in ("call", "barrier"):
            raise PtxError(
                i.line, f"{i.opcode} has {len(i.operands)} operands; expected {len(found.operands)}"
            )
        return found

    def source(self, text, kind, line):
        """The slot of a value that is read."""
        if text in SPECIAL:
            return SPECIAL[text]
        if text in self.slot_of:
            return self.slot_of[text]
        if text.startswith("%"):
            raise PtxError(line, f"an unknown register: {text!r}")
        return self.owner.constant(text, kind, line)

    def predicate(self, text, line):
        """A predicate that is read: the machine's number, or -1 and -2 for false and true."""
        if text in self.pred_of:
            return self.pred_of[text]
        if re.fullmatch(r"-?\d+", text):
            return -2 if int(text) else -1
        raise PtxError(line, f"an unknown predicate: {text!r}")

    def address(self, text, line):
        """(space or None, slot or -1, offset) of [base + offset]."""
        m = MEMORY.fullmatch(text)
        if not m:
            raise PtxError(line, f"an address of another form: {text!r}")
        base, offset = m[1], int(m[2] or 0)
        if base in self.parameters:
            return "param" if self.f.entry else "local", -1, self.parameters[base] + offset
        if base in self.locals:
            return "local", -1, self.locals[base] + offset
        if base in self.owner.places:
            return "shared", -1, self.owner.places[base] + offset
        return None, self.source(base, "u64", line), offset

    def emit(self, i):
        """One row: operation, order, scope, guard, seven places, integer, PTX line, source; which places are
        slots that are read (True) or written ("w")."""
        form, owner = self.form(i), self.owner
        op, places, integer = form.op, [], 0
        slots = []

        def put(place, is_slot):
            places.append(place)
            slots.append(is_slot)

        if op == "call":
            self.call(i)
            return
        if op.startswith("mov.u"):
            special = self.move(i, form)
            if special:
                op, places, slots, integer = special
                form = FORMS["ret"]
        for letter, text in zip(form.operands, i.operands):
            if letter == "d":
                put(self.slot_of[text] if text != "_" else -1, "w")
            elif letter == "D":
                put(self.pred_of[text], False)
            elif letter == "s":
                put(self.source(text, form.type, i.line), True)
            elif letter == "Q":
                put(self.predicate(text, i.line), False)
            elif letter == "2":
                value, _, valid = text.partition("|")
                put(self.slot_of[value], "w")
                put(self.pred_of[valid] if valid else -1, False)
            elif letter == "x":
                if text != "_":
                    raise PtxError(i.line, f"{i.opcode}: got the result {text!r}; expected _")
            elif letter == "n":
                integer = int(text)
            elif letter == "l":
                pass
            elif letter == "m":
                space, slot, offset = self.address(text, i.line)
                if op.startswith(("ld.", "st.")):
                    head, declared, rest = op.split(".", 2)
                    if declared == "param":
                        if space == "shared":
                            raise PtxError(i.line, f"{i.opcode} of shared memory: {text!r}")
                        op = f"{head}.{space or 'global'}.{rest}"  # a register has a parameter's generic address here
                    elif space:
                        op = f"{head}.{space}.{rest}"
                    integer = offset
                elif offset:
                    raise PtxError(i.line, f"{i.opcode}: an address with an offset: {text!r}")
                put(slot, True)
            elif letter in "vV":
                values = [v.strip() for v in text.strip("{} ").split(",")]
                if len(values) != int(op.split(".")[2]):
                    raise PtxError(i.line, f"{i.opcode} of {len(values)} values")
                for v in values:
                    put(
                        -1
                        if v == "_"
                        else self.slot_of[v]
                        if letter == "V"
                        else self.source(v, form.type, i.line),
                        letter == "v" or "w",
                    )
        if op == "barrier" and len(places) == 1:
            put(SPECIAL["%ntid.x"], True)
        if op in COLLECTIVES:  # the mask of members has a place of its own
            places, slots = (
                [*places[:-1], *[-1] * (7 - len(places)), places[-1]],
                [*slots[:-1], *[False] * (7 - len(slots)), slots[-1]],
            )
        row = self.row(op, form, i, places, slots, integer)
        if op == "bra":
            self.jumps.append((row, i.operands[0], i.line))
        owner.rows.append(row)

    def row(self, op, form, i, places, slots, integer):
        guard = -1 if i.guard is None else self.predicate(i.guard, i.line) * 2 + i.negated
        places, slots = [*places, *[-1] * (7 - len(places))], [*slots, *[False] * (7 - len(slots))]
        return [
            op,
            ORDERS[form.order],
            SCOPES[form.scope],
            guard,
            *places,
            integer,
            i.line,
            f"{i.source[0]}:{i.source[1]}",
            slots,
        ]

    def move(self, i, form):
        """mov that packs, unpacks, or takes the address of a parameter; None where it does none of these."""
        to, what = i.operands
        width = int(i.opcode[-2:])
        if what == "%globaltimer":
            return "globaltimer", [self.slot_of[to]], ["w"], 0
        if what.startswith("{"):
            values = [v.strip() for v in what.strip("{} ").split(",")]
            return (
                f"pack.{len(values)}",
                [self.slot_of[to], *(self.source(v, "u64", i.line) for v in values)],
                ["w", *[True] * len(values)],
                width // len(values),
            )
        if to.startswith("{"):
            values = [v.strip() for v in to.strip("{} ").split(",")]
            return (
                f"unpack.{len(values)}",
                [self.source(what, "u64", i.line), *(-1 if v == "_" else self.slot_of[v] for v in values)],
                [True, *["w"] * len(values)],
                width // len(values),
            )
        if what in self.parameters:
            if not self.f.entry:
                raise PtxError(i.line, "the address of a function's parameter")
            return "mov.param", [self.slot_of[to]], ["w"], self.parameters[what]
        return None

    def call(self, i):
        """Copies of the arguments into the callee's places, the call, a copy of the result."""
        m = re.fullmatch(
            r"(?:\(([^)]*)\),)?([\w$]+)(?:,\(([^)]*)\))?",
            "".join("".join(i.operands if not i.operands else ",".join(i.operands)).split()),
        )
        if not m:
            raise PtxError(i.line, f"a call of another form: {i.operands}")
        name = m[2]
        target = self.owner.module.functions.get(name)
        if target is None or target.body is None:
            raise PtxError(i.line, f"a call of {name}, which has no body here")
        theirs = self.called[name][0]
        form = FORMS["call"]

        def copy(to, source, n):
            self.owner.rows.append(self.row("copy.local", form, i, [to, source], [False, False], n))

        arguments = [a for a in (m[3] or "").split(",") if a]
        if len(arguments) != len(target.parameters):
            raise PtxError(
                i.line, f"a call of {name} with {len(arguments)} arguments; expected {len(target.parameters)}"
            )
        for mine, v in zip(arguments, target.parameters):
            copy(theirs[v.name], self.locals[mine], v.bytes)
        self.owner.rows.append([*self.row("call", form, i, [], [], 0), name])
        for mine, v in zip([a for a in (m[1] or "").split(",") if a], target.results):
            copy(self.locals[mine], theirs[v.name], v.bytes)


def assemble(module):
    """The machine's text of a parsed module.

    Raises
    ------
    PtxError
        An opcode, a modifier or a form of operand is not known; says the line.
    """
    return Assembler(module).assemble()
