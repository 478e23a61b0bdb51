"""PTX text to functions of instructions. Knows PTX's shape, not what an opcode means: that is opcodes.py's."""

import re
from dataclasses import dataclass, field

GUARD = re.compile(r"@(!?)([\w%$.]+)\s+")
PIECE = re.compile(
    r"\s*(?:(?P<label>[\w$]+):(?!:)|(?P<open>\{)|(?P<close>\})|(?P<statement>[^;]*;)|(?P<rest>\S.*))"
)
HEADER = re.compile(
    r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\s*(\([^)]*\))?\s*([\w$]+)\s*(\([^)]*\))?"
)
LINE_ONLY = (
    ".loc",
    ".file",
    ".version",
    ".target",
    ".address_size",
    ".maxntid",
    ".minnctapersm",
    ".reqntid",
    ".pragma",
)


class PtxError(Exception):
    """The PTX has something that this tool does not know. Says the line."""

    def __init__(self, line, what):
        super().__init__(f"PTX line {line}: {what}")
        self.line = line


@dataclass
class Instruction:
    line: int  # of the PTX
    source: tuple  # (file number, line) of the CUDA source; the innermost, where code was inlined
    opcode: str  # with all of its modifiers
    operands: list  # as text; registers have their scope's name
    guard: str = None  # predicate register
    negated: bool = False


@dataclass
class Label:
    name: str


@dataclass
class Variable:
    """Of .param or .shared: where it lies is the assembler's to say."""

    name: str
    bytes: int
    align: int


@dataclass
class Function:
    name: str
    entry: bool
    line: int
    results: list = field(default_factory=list)  # Variables
    parameters: list = field(default_factory=list)
    locals: list = field(default_factory=list)  # .param variables of its calls
    registers: dict = field(default_factory=dict)  # name -> type; a range %r<n> under its prefix
    body: list = field(default_factory=list)  # Instructions and Labels; None: only declared


@dataclass
class Module:
    functions: dict = field(default_factory=dict)
    shared: list = field(default_factory=list)  # static; the dynamic one has 0 bytes
    files: dict = field(default_factory=dict)


def split(text):
    """Operands: commas outside of brackets and braces."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*found, last] if last else found


def variable(text, line):
    """`.param .align 8 .b8 name[40]` and its like."""
    m = re.fullmatch(
        r"\.(?:param|shared)\s+(?:\.align\s+(\d+)\s+)?\.([a-z]+)(\d+)\s+([\w$]+)(?:\[(\d*)\])?", text.strip()
    )
    if not m:
        raise PtxError(line, f"a variable of another form: {text.strip()!r}")
    size = int(m[3]) // 8
    return Variable(m[4], size * int(m[5] or 0) if "[" in text else size, int(m[1] or size))


class Reader:
    """Goes through the lines once."""

    def __init__(self):
        self.module, self.function, self.pending, self.pending_line = Module(), None, "", 0
        self.scopes, self.scope_count, self.source, self.skipped = [], 0, (0, 0), 0

    def read(self, text):
        """The module of a PTX text."""
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        for number, line in enumerate(text.split("\n"), 1):
            line = line.split("//", 1)[0] if ".file" not in line else line
            if self.skipped or line.lstrip().startswith(".section"):  # of the debugger
                self.skipped += (
                    line.count("{")
                    - line.count("}")
                    + (1 if line.lstrip().startswith(".section") and "{" not in line else 0)
                )
                if line.strip() == "{" and self.skipped > 1:
                    self.skipped -= 1
                continue
            while line.strip():
                line = self.piece(number, line)
        if self.pending.strip() or self.function:
            raise PtxError(number, "the text ends inside a statement or a function")
        return self.module

    def piece(self, number, line):
        """Take what stands first; returns the rest of the line."""
        if not self.pending and line.split(None, 1)[0] in LINE_ONLY:
            return self.directive(number, line.strip())
        if self.function is None:
            return self.outside(number, line)
        if self.pending:
            end = line.find(";")
            self.pending += " " + (line if end < 0 else line[:end])
            if end >= 0:
                statement, self.pending = self.pending, ""
                self.statement(self.pending_line, statement)
            return "" if end < 0 else line[end + 1 :]
        m = PIECE.match(line)
        if m["label"]:
            self.function.body.append(Label(m["label"]))
        elif m["open"]:
            self.scope_count += 1
            self.scopes.append((self.scope_count, {}))
        elif m["close"]:
            self.scopes.pop()
            if not self.scopes:
                self.function = None
        elif m["statement"]:
            self.statement(number, m["statement"][:-1])
        else:
            self.pending, self.pending_line = m["rest"], number
        return line[m.end() :]

    def directive(self, number, text):
        word = text.split()
        if word[0] == ".loc":
            self.source = int(word[1]), int(word[2])
        elif word[0] == ".file":
            self.module.files[int(word[1])] = re.search(r'"([^"]*)"', text)[1]
        elif word[0] == ".target" and not word[1].startswith("sm_9"):
            raise PtxError(number, f"made for {word[1]}; expected sm_90")
        return ""

    def outside(self, number, line):
        """Headers of functions and variables of the module; both may go on over several lines."""
        self.pending_line = self.pending_line if self.pending else number
        end = re.search(r"[;{]", line)
        self.pending += " " + (line if not end else line[: end.start()])
        if not end:
            return ""
        text, self.pending = self.pending.strip(), ""
        if text:
            self.header(self.pending_line, text, end[0] == "{")
        return line[end.end() :]

    def header(self, line, text, defined):
        """A function, or a variable of shared memory."""
        if ".shared" in text and not re.search(r"\.(entry|func)\b", text):
            self.module.shared.append(variable(re.sub(r"\.(extern|visible|weak)\s+", "", text), line))
            return
        m = HEADER.match(text)
        if not m:
            raise PtxError(line, f"neither a function nor shared memory: {text[:80]!r}")
        take = lambda part: [variable(p, line) for p in split(part.strip()[1:-1])] if part else []  # noqa: E731
        f = Function(m[3], m[1] == "entry", line, take(m[2]), take(m[4]))
        if not defined:
            f.body = None
            self.module.functions.setdefault(f.name, f)
            return
        self.module.functions[f.name] = self.function = f
        self.scopes = [(0, {})]

    def statement(self, line, text):
        """A declaration or an instruction."""
        text = " ".join(text.split())
        if not text:
            return
        f = self.function
        if text.startswith(".reg"):
            kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()
            for name in split(names):
                many = re.fullmatch(r"(%\w+)<\d+>", name)
                if many:
                    f.registers[many[1]] = kind
                else:
                    self.scopes[-1][1][name] = f"{name}@{self.scopes[-1][0]}"
                    f.registers[f"{name}@{self.scopes[-1][0]}"] = kind
        elif text.startswith(".param"):
            v = variable(text, line)
            self.scopes[-1][1][v.name] = f"{v.name}@{self.scopes[-1][0]}"
            v.name = self.scopes[-1][1][v.name]
            f.locals.append(v)
        elif text.startswith(".shared"):
            self.module.shared.append(variable(text, line))
        elif text.startswith("."):
            raise PtxError(line, f"an unknown directive: {text!r}")
        else:
            self.instruction(line, text)

    def scoped(self, text):
        """Names that an enclosing block has declared, made unique."""
        if len(self.scopes) == 1 and not self.scopes[0][1]:
            return text
        names = {}
        for _, declared in self.scopes:
            names.update(declared)
        return re.sub(r"[%$\w]+(?:\.\w+)*", lambda m: names.get(m[0], m[0]), text)

    def instruction(self, line, text):
        guard = GUARD.match(text)
        if guard:
            text = text[guard.end() :]
        opcode, _, rest = text.partition(" ")
        i = Instruction(line, self.source, opcode, split(self.scoped(rest)))
        if guard:
            i.guard, i.negated = self.scoped(guard[2]), guard[1] == "!"
        self.function.body.append(i)


def parse(text):
    """Functions, variables and file names of a PTX text.

    Raises
    ------
    PtxError
        A directive or a form that is not in the subset which nvcc makes of these kernels.
    """
    return Reader().read(text)
