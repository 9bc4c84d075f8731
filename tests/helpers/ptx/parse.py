"""PTX text, read into kernels: parameters, shared memory, registers, labels and instructions. Nothing is run here.

Only what nvcc and Triton emit for kernels without function calls is understood; anything else is an error that shows
the statement.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

#: Bytes of a PTX type.
WIDTHS = {f"{kind}{8 * size}": size for kind in "busf" for size in (1, 2, 4, 8)}
WIDTHS |= {"bf16": 2, "bf16x2": 4, "f16x2": 4, "pred": 1}


@dataclass(frozen=True)
class Literal:
    bits: int  # two's complement, or the bits of a float
    is_float: bool = False


@dataclass(frozen=True)
class Address:
    base: str  # a register, a parameter or a symbol
    offset: int


Operand = str | Literal | Address | tuple["str | Literal", ...]


class Variable(NamedTuple):
    offset: int
    size: int


@dataclass(frozen=True)
class Instruction:
    opcode: tuple[str, ...]  # ("ld", "global", "v4", "b32")
    operands: tuple[Operand, ...]
    predicate: str | None  # a register; the instruction is run where it is true …
    negated: bool  # … or false
    line: int  # in the PTX text
    text: str

    @property
    def name(self) -> str:
        return self.opcode[0]

    @property
    def type(self) -> str:
        return self.opcode[-1]


@dataclass
class Kernel:
    name: str
    parameters: dict[str, Variable]
    shared: dict[str, Variable]  # arrays of a fixed size, and the one that begins where they end (size 0)
    constants: dict[str, bytes]
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    labels: dict[str, int] = field(default_factory=dict)  # name -> index of an instruction
    instructions: list[Instruction] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The name of the function, without what a C++ compiler puts around it."""
        found = re.search(r"([a-z][a-z_]*_kernel)", self.name)
        return found[1] if found else self.name

    @property
    def parameter_bytes(self) -> int:
        return max((v.offset + v.size for v in self.parameters.values()), default=0)

    @property
    def static_shared_bytes(self) -> int:
        return max((v.offset + v.size for v in self.shared.values()), default=0)


def parse(text: str, only: str = "") -> dict[str, Kernel]:
    """The kernels of a module by their (mangled) names, or the one that `only` names."""
    text = re.sub(r"//[^\n]*|^\s*\.(?:loc|file)\b[^\n]*", "", text, flags=re.M)  # lines stay where they are
    text = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), text, flags=re.S)
    shared = shared_variables(text)
    constants = dict(initialised(text))
    kernels = {}
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{;]*\{", text):
        if only not in ("", entry[1]):
            continue
        kernel = Kernel(entry[1], parameters_of(entry[2]), dict(shared), constants)
        read_body(kernel, text, entry.end())
        kernels[kernel.name] = kernel
    return kernels


def shared_variables(text: str) -> dict[str, Variable]:
    """The arrays of shared memory behind one another, the one of the launch's size last."""
    found = re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*;", text)
    variables, end = {}, 0
    for align, kind, name, count in sorted(found, key=lambda variable: variable[3] == ""):
        size = WIDTHS[kind] * int(count or 0)
        end = -(-end // int(align)) * int(align)
        variables[name] = Variable(end, size)
        end += size
    return variables


def initialised(text: str) -> Iterator[tuple[str, bytes]]:
    """Tables in global or constant memory."""
    pattern = r"\.(?:global|const)\s+\.align\s+\d+\s+\.(\w+)\s+([\w$]+)\s*(?:\[\d+\])?\s*=\s*\{([^}]*)\}\s*;"
    for kind, name, values in re.findall(pattern, text):
        width = WIDTHS[kind]
        yield name, b"".join((int(v, 0) % (1 << 8 * width)).to_bytes(width, "little") for v in values.split(","))


def parameters_of(text: str) -> dict[str, Variable]:
    parameters, end = {}, 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        kind, name, count = re.search(r"\.([busf]\d+)\b.*?([\w$]+)(?:\[(\d+)\])?$", declaration, re.S).groups()
        align = re.search(r"\.align\s+(\d+)", declaration)
        boundary = int(align[1]) if align and ".ptr" not in declaration else WIDTHS[kind]
        end = -(-end // boundary) * boundary
        parameters[name] = Variable(end, WIDTHS[kind] * int(count or 1))
        end += parameters[name].size
    return parameters


def read_body(kernel: Kernel, text: str, start: int) -> None:
    """Statements up to the brace that closes the kernel. Registers of an inner scope get a name of their own."""
    scopes: list[dict[str, str]] = [{}]
    at, line, counted = start, text.count("\n", 0, start) + 1, start
    while True:
        at = re.compile(r"\s*").match(text, at).end()
        line, counted = line + text.count("\n", counted, at), at
        if text[at] == "{":
            scopes.append({})
            at += 1
        elif text[at] == "}":
            scopes.pop()
            at += 1
            if not scopes:
                return
        elif label := re.compile(r"([\w$]+)\s*:(?!:)").match(text, at):
            kernel.labels[label[1]] = len(kernel.instructions)
            at = label.end()
        else:
            end = text.index(";", at)
            statement = " ".join(text[at:end].split())
            at = end + 1
            if statement.startswith(".reg"):
                declare(kernel, statement, scopes)
            elif statement and not statement.startswith((".pragma", ".loc")):
                if statement.startswith("."):
                    raise ValueError(f"{kernel.name}, PTX line {line}: {statement!r} is not understood")
                kernel.instructions.append(instruction(statement, line, scopes))


def declare(kernel: Kernel, statement: str, scopes: list[dict[str, str]]) -> None:
    _, kind, names = statement.split(None, 2)
    for name in (part.strip() for part in names.split(",")):
        counted = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
        for declared in [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]:
            unique = declared if len(scopes) == 1 else f"{declared}@{len(kernel.instructions)}"
            scopes[-1][declared] = unique
            kernel.registers[unique] = kind[1:]


def instruction(statement: str, line: int, scopes: list[dict[str, str]]) -> Instruction:
    def renamed(name: str) -> str:
        return next((scope[name] for scope in reversed(scopes) if name in scope), name)

    def operand(text: str) -> Operand:
        if text[0] == "{":
            return tuple(simple(part.strip()) for part in text[1:-1].split(","))  # type: ignore[return-value]
        if text[0] == "[":
            base, sign, offset = re.fullmatch(r"\[\s*([\w$%.]+)\s*(?:([+-])\s*(-?\w+))?\s*\]", text).groups()
            return Address(renamed(base), int(f"{sign if sign == '-' else ''}{offset}", 0) if offset else 0)
        return simple(text)

    def simple(text: str) -> str | Literal:
        if text[:2].lower() in ("0f", "0d"):
            return Literal(int(text[2:], 16), is_float=True)
        if re.fullmatch(r"-?\d\w*", text):
            return Literal(int(text.rstrip("U"), 0))
        return renamed(text)

    guard = re.match(r"@(!?)(%?[\w$]+)\s+", statement)
    opcode, _, rest = statement[guard.end() if guard else 0 :].partition(" ")
    operands = tuple(operand(part) for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,|]+", rest))
    predicate = renamed(guard[2]) if guard else None
    return Instruction(tuple(opcode.split(".")), operands, predicate, bool(guard and guard[1]), line, statement)
