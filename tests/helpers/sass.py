"""Machine code of a GPU, as nvdisasm prints it: which instructions one pass of a loop executes.

A loop's body has branches for what seldom happens (the ends of a row). What is counted is the path of a full step in
the middle of a row: of all paths through the body with the exponentials, 16-byte loads and stores and asynchronous
copies of such a step, the shortest.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

_LABEL = re.compile(r"^(\.L_x_\d+):")
_LINE = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/)?\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")


class Instruction(NamedTuple):
    opcode: str
    predicated: bool
    target: str  # of a branch, or ""


class Loop(NamedTuple):
    """One pass: its instructions, by opcode."""

    opcodes: Counter[str]

    @property
    def length(self) -> int:
        return self.opcodes.total()

    def count(self, start: str) -> int:
        """Instructions whose opcode starts like this."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(start))


def disassembled(cubin: Path) -> str:
    """nvdisasm's text; it comes with CUDA, and with Triton."""
    return subprocess.run([nvdisasm(), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout


def nvdisasm() -> str:
    """The path of the disassembler; "" where there is none."""
    return tool("nvdisasm")


@functools.cache
def tool(name: str) -> str:
    """The path of one of CUDA's programs for machine code, on PATH or installed with Triton; "" where there is none."""
    found = shutil.which(name)
    if not found:
        try:
            import triton
        except ImportError:
            return ""
        found = str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)
    return found if Path(found).exists() else ""


def functions(text: str) -> dict[str, list[Instruction | str]]:
    """By mangled name: the instructions in order, with the labels between them."""
    found: dict[str, list[Instruction | str]] = {}
    body: list[Instruction | str] = []
    for line in text.splitlines():
        if line.startswith(".text."):
            body = found.setdefault(line[len(".text.") :].rstrip(":"), [])
        elif label := _LABEL.match(line):
            body.append(label[1])
        elif parts := _LINE.match(line):
            target = re.search(r"`\((\.L_x_\d+)\)", parts[3]) if parts[2].startswith("BRA") else None
            uniform = re.match(r"(U?P\w+|!U?P\w+),", parts[3]) if parts[2].startswith("BRA") else None
            conditional = bool(parts[1]) or bool(uniform)
            body.append(Instruction(parts[2], conditional, target[1] if target else ""))
    return found


class _Block(NamedTuple):
    instructions: list[Instruction]
    following: list[int]


def _blocks(body: list[Instruction | str]) -> list[_Block]:
    starts: dict[str, int] = {}
    parts: list[list[Instruction]] = [[]]
    for item in body:
        if isinstance(item, str):
            if parts[-1]:
                parts.append([])
            starts[item] = len(parts) - 1
        else:
            parts[-1].append(item)
            if item.target or item.opcode in ("EXIT", "RET"):
                parts.append([])
    blocks = []
    for index, part in enumerate(parts):
        following = [index + 1] if index + 1 < len(parts) else []
        if part and (part[-1].target or part[-1].opcode == "EXIT"):
            last = part[-1]
            following = (following if last.predicated else []) + ([starts[last.target]] if last.target else [])
        blocks.append(_Block(part, following))
    return blocks


def loops(body: list[Instruction | str], least: dict[str, int]) -> list[Loop]:
    """The innermost loops in the order of the code; of each the shortest pass with at least these instructions.

    Args:
        body: a function's.
        least: how an opcode begins, and how many of those the pass has. A loop without such a pass is left out.
    """
    blocks = _blocks(body)
    starts, need = tuple(least), tuple(least.values())
    closing = {head: tail for tail, block in enumerate(blocks) for head in block.following if head <= tail}
    found = []
    for head, tail in sorted(closing.items()):
        if any(head < other <= tail and closing[other] <= tail for other in closing):
            continue  # not the innermost
        # block -> instructions so far (as many as are wanted, of each kind) -> the shortest way with so many
        ways: dict[int, dict[tuple[int, ...], Counter[str]]] = {head: {(0,) * len(need): Counter()}}
        for index in range(head, tail + 1):
            mine = Counter(item.opcode for item in blocks[index].instructions if item.opcode != "NOP")
            for had, opcodes in ways.get(index, {}).items():
                gained = (sum(n for opcode, n in mine.items() if opcode.startswith(start)) for start in starts)
                has = tuple(min(a + b, most) for a, b, most in zip(had, gained, need, strict=True))
                passed = opcodes + mine
                if index == tail and has == need:
                    found.append(Loop(passed))
                for after in blocks[index].following:
                    if index < after <= tail:
                        known = ways.setdefault(after, {})
                        if has not in known or passed.total() < known[has].total():
                            known[has] = passed
    return found
