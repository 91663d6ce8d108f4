"""Reads PTX, the text that NVRTC's optimizer writes, into kernels of decoded instructions.

Only what NVRTC writes of kernels/cuda is understood: one module, entries without calls, registers declared by ranges,
and scopes of inline assembly, whose registers get names of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SIZES = {"pred": 1} | {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (8, 16, 32, 64)}
SIZES |= {"f16x2": 4, "bf16x2": 4}


@dataclass(frozen=True)
class Instruction:
    """`opcode`: its words between dots. `operands`: names, numbers, addresses or, of vectors, tuples of names.
    `guard`: the predicate under which it is executed, or its negation."""

    opcode: tuple[str, ...]
    operands: tuple[str | tuple[str, ...], ...]
    guard: str | None
    negated: bool
    text: str


@dataclass
class Kernel:
    """`parameters`: byte offsets by name. `registers`: the type of each name, without its number. `labels`: indices
    into `code`. `shared`: bytes and alignment of static arrays. `launch`: threads and bytes of dynamic shared memory,
    from the constant that KVQUANT_KERNEL leaves."""

    name: str
    launch: tuple[int, int]
    parameters: dict[str, int] = field(default_factory=dict)
    parameter_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)
    dynamic_shared: set[str] = field(default_factory=set)


_COMMENT = re.compile(r"//[^\n]*")
_ENTRY = re.compile(r"\.entry (\w+)\((.*?)\)[^{]*\n\{(.*?)\n\}", re.S)
_PARAMETER = re.compile(r"\.param (?:\.align (\d+) )?\.(\w+) (\w+)(?:\[(\d+)\])?")
_LAUNCH = re.compile(r"\.const \.align 4 \.b8 (\w+)_launch\[8\] = \{([\d, ]+)\}")
_EXTERN = re.compile(r"\.extern \.shared [^;]*?(\w+)\[\];")
_SHARED = re.compile(r"^\s*\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\];", re.M)
_STATEMENT = re.compile(r"\s*(?:(\$\w+):|([{}])|([^;]*);)")
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?(\S+)\s*(.*)", re.S)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module, by name.

    Raises:
        ValueError: a statement that is not understood.
    """
    text = _COMMENT.sub("", text)
    launches = {name: _launch(numbers) for name, numbers in _LAUNCH.findall(text)}
    entries = _ENTRY.findall(text)
    outside = _ENTRY.sub("", text)
    kernels = {}
    for name, parameters, body in entries:
        kernel = kernels[name] = Kernel(name, launches[name])
        kernel.dynamic_shared.update(_EXTERN.findall(text))
        kernel.shared.update((n, (int(size), int(align))) for align, n, size in _SHARED.findall(outside + body))
        at = 0
        for align, kind, parameter, count in _PARAMETER.findall(parameters):
            size = int(count) if count else SIZES[kind]
            step = int(align or size)
            kernel.parameters[parameter] = at = -(-at // step) * step
            at += size
        kernel.parameter_bytes = at
        _parse_body(kernel, body)
    return kernels


def _launch(numbers: str) -> tuple[int, int]:
    # Zeros at the end are left out.
    content = bytes(map(int, numbers.split(","))).ljust(8, b"\0")
    return int.from_bytes(content[:4], "little"), int.from_bytes(content[4:], "little")


def _parse_body(kernel: Kernel, body: str) -> None:
    scopes: list[dict[str, str]] = []
    at = count = 0
    body = body.strip()
    while at < len(body):
        found = _STATEMENT.match(body, at)
        if found is None:
            raise ValueError(f"{kernel.name}: {body[at : at + 100]!r} is not understood")
        at = found.end()
        label, brace, statement = found.groups()
        if label:
            kernel.labels[label] = len(kernel.code)
        elif brace == "{":
            scopes.append({})
        elif brace == "}":
            scopes.pop()
        elif statement.startswith(".reg"):
            _, kind, names = statement.split(maxsplit=2)
            for name in names.split(","):
                name = name.strip()
                if "<" in name:
                    name = name.partition("<")[0]
                elif scopes:
                    count += 1
                    scopes[-1][name] = name = f"%{name}.scope{count}."
                kernel.registers[name] = kind[1:]
        elif not statement.startswith("."):
            kernel.code.append(_instruction(statement, scopes))


def _instruction(statement: str, scopes: list[dict[str, str]]) -> Instruction:
    negated, guard, opcode, rest = _INSTRUCTION.match(statement.strip()).groups()

    def renamed(name: str) -> str:
        return next((scope[name] for scope in reversed(scopes) if name in scope), name)

    operands = []
    for operand in _OPERAND.findall(rest):
        if operand[0] == "{":
            operands.append(tuple(renamed(name.strip()) for name in operand[1:-1].split(",")))
        else:
            operands.append(operand if operand[0] == "[" else renamed(operand))
    return Instruction(tuple(opcode.split(".")), tuple(operands), guard, negated == "!", " ".join(statement.split()))
