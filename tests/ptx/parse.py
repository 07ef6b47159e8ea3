"""PTX as Triton writes it, read into instructions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

SOURCE = re.compile(r"(\.loc\s)[^\n]*//\s*(\S+)")
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", re.DOTALL)
PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)[^,]*?\s(\w+)(?:\[(\d+)\])?\s*(?:,|$)", re.DOTALL)
LOCAL = re.compile(r"\.local\s[^;]*__local_depot\d+\[(\d+)\]\s*;")
THREADS = re.compile(r"\.reqntid\s+(\d+)")
TOKEN = re.compile(r"\{[^{};]*\}|\[[^\]]*\]|[^\s,{}\[\]|]+|\|")
WIDTH = {"rs": 16, "r": 32, "rd": 64, "p": 1}


@dataclass(frozen=True)
class Instruction:
    """One instruction. ``guard``: the predicate that it is under, and the value it must have."""

    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    guard: tuple[str, bool] | None
    text: str
    line: str
    """Of the source: file, line and column, where the compiler said them."""


@dataclass(eq=False)
class Kernel:
    """An entry point: its parameters (name and bytes, in order), and its code, where labels are positions."""

    name: str
    parameters: list[tuple[str, int]]
    threads: int
    local: int
    """Bytes of each thread's own memory."""
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(ptx: str) -> Kernel:
    """The one kernel of a module. ValueError: no entry point, or more than one."""
    text = COMMENT.sub("", SOURCE.sub(r"\1\2", ptx))
    entries = list(ENTRY.finditer(text))
    if len(entries) != 1:
        raise ValueError(f"{len(entries)} entry points")
    (entry,) = entries
    parameters = [
        (name, int(count) if count else int(re.sub(r"\D", "", kind)) // 8)
        for kind, name, count in PARAMETER.findall(entry[2])
    ]
    threads = THREADS.search(entry[3])
    if threads is None:
        raise ValueError("the entry point does not say how many threads it has")
    body = text[entry.end() :]
    local = LOCAL.search(body)
    kernel = Kernel(entry[1], parameters, int(threads[1]), int(local[1]) if local else 0)
    line = ""
    for statement, scope in _statements(body):
        if statement.startswith(".loc"):
            line = statement.split()[1]
        elif statement.endswith(":"):
            kernel.labels[scope(statement[:-1])] = len(kernel.code)
        else:
            kernel.code.append(_instruction(statement, scope, line))
    return kernel


class _Scope:
    """The names that a pair of braces declares are its own: inline assembly uses the same ones again and again."""

    def __init__(self, outer: _Scope | None, number: int) -> None:
        self.outer, self.number, self.names = outer, number, set[str]()

    def __call__(self, name: str) -> str:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return f"{name}@{scope.number}"
            scope = scope.outer
        return name


def _statements(body: str) -> Iterator[tuple[str, _Scope]]:
    """Labels, instructions and lines of the source, each with its scope, up to the brace that ends the kernel."""
    scope, scopes, at = _Scope(None, 0), 1, 0
    pattern = re.compile(
        r"\s*(?:(\{)(?=\s)|(\})|(\.(?:pragma|local)\s[^;]*;)|(\.reg[^;]*);|(\.loc\s[^\n]*|[\w$]+:(?!:))|([^;]*?);)",
        re.DOTALL,
    )
    while True:
        found = pattern.match(body, at)
        if found is None:
            raise ValueError(f"cannot be read: {body[at : at + 80]!r}")
        at = found.end()
        opened, closed, _, declared, mark, statement = found.groups()
        if opened:
            scope = _Scope(scope, scopes)
            scopes += 1
            scope.names |= set(re.findall(r"^\s*(\w+):", body[at : body.index("}", at)], re.MULTILINE))
        elif closed:
            if scope.outer is None:
                return
            scope = scope.outer
        elif declared and scope.outer is not None:
            scope.names |= set(re.findall(r"[%\w]+", declared.split(maxsplit=2)[2]))
        elif mark or statement:
            yield (mark or statement.strip()), scope


def _instruction(statement: str, scope: _Scope, line: str) -> Instruction:
    guard = None
    text = " ".join(statement.split())
    if text.startswith("@"):
        condition, text = text[1:].split(maxsplit=1)
        guard = (scope(condition.lstrip("!")), not condition.startswith("!"))
    opcode, _, rest = text.partition(" ")
    operands = tuple(re.sub(r"[%$\w]+", lambda found: scope(found[0]), token) for token in TOKEN.findall(rest))
    return Instruction(tuple(opcode.strip(".").split(".")), operands, guard, " ".join(statement.split()), line)


def width(register: str) -> int:
    """Bits of a register, by its name."""
    found = re.match(r"%(rs|rd|r|p)\d", register)
    return WIDTH[found[1]] if found else 1


def listed(operand: str) -> list[str]:
    """The registers of a vector, or the only one."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def address(operand: str) -> tuple[str, int]:
    """The register or name of ``[base + offset]``, and the offset."""
    base, _, offset = operand.strip("[] ").partition("+")
    return base.strip(), int(offset.strip() or "0", 0)
