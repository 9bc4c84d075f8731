"""Faults put into a kernel before it runs: instructions left out or changed, all of a kind or one of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from .accesses import space_of
from .parse import Address, Instruction, Kernel, Literal
from .programs import Edit

Which = Callable[[Instruction], bool]
How = Callable[[Instruction], Instruction]


def edit(which: Which, how: How, index: int | None = None) -> Edit:
    """An edit of all instructions that `which` chooses, or of the one of that index among them."""

    def edited(kernel: Kernel) -> Kernel:
        places = [k for k, i in enumerate(kernel.instructions) if which(i)]
        chosen = places if index is None else places[index : index + 1]
        if not chosen:
            raise LookupError(f"{kernel.name} has {len(places)} such instructions")
        instructions = list(kernel.instructions)
        for k in chosen:
            instructions[k] = how(instructions[k])
        return dataclasses.replace(kernel, instructions=instructions)

    return edited


def opcode(*parts: str) -> Which:
    return lambda i: i.opcode[0] == parts[0] and set(parts) <= set(i.opcode)


def access(name: str, space: str, vector: str = "") -> Which:
    return lambda i: i.name == name and space_of(i) == space and (not vector or vector in i.opcode)


def guarded(which: Which) -> Which:
    return lambda i: which(i) and i.predicate is not None


def left_out(i: Instruction) -> Instruction:
    """The rest keeps its place, and labels stay right."""
    return dataclasses.replace(i, opcode=("fence",), operands=(), predicate=None)


def always(i: Instruction) -> Instruction:
    return dataclasses.replace(i, predicate=None)


def otherwise(i: Instruction) -> Instruction:
    return dataclasses.replace(i, negated=not i.negated)


def moved(by: int) -> How:
    """The address of an access, by so many bytes."""

    def further(i: Instruction) -> Instruction:
        shift = (dataclasses.replace(o, offset=o.offset + by) if isinstance(o, Address) else o for o in i.operands)
        return dataclasses.replace(i, operands=tuple(shift))

    return further


def with_operand(index: int, value: int) -> How:
    """The operand of that index, counted from the last if negative, is a constant."""

    def changed(i: Instruction) -> Instruction:
        operands = list(i.operands)
        operands[index] = Literal(value)
        return dataclasses.replace(i, operands=tuple(operands))

    return changed


def increased(index: int) -> How:
    """A constant operand by one."""

    def changed(i: Instruction) -> Instruction:
        constant = i.operands[index]
        assert isinstance(constant, Literal)
        return with_operand(index, constant.bits + 1)(i)

    return changed


def renamed(before: str, after: str) -> How:
    """A part of the opcode."""
    return lambda i: dataclasses.replace(i, opcode=tuple(after if part == before else part for part in i.opcode))
