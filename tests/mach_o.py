"""What macOS reads in a library before it loads it, from the bytes of the file, for tests that cannot run the library.

The format is that of <mach-o/loader.h> and <mach-o/nlist.h>, 64-bit and little-endian: a header, load commands with
their sizes, and tables that the commands point to.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

MAGIC, ARM64, MACOS = 0xFEEDFACF, 0x0100000C, 1
_SYMTAB, _LOAD_DYLIB, _CODE_SIGNATURE, _BUILD_VERSION = 0x2, 0xC, 0x1D, 0x32


@dataclass
class Library:
    """A loadable file: its processor, the oldest system (platform, major, minor), what it needs and offers."""

    processor: int
    system: tuple[int, int, int] | None = None
    needs: list[str] = field(default_factory=list)
    symbols: set[str] = field(default_factory=set)
    is_signed: bool = False


def read(data: bytes) -> Library:
    """Read a library.

    Raises:
        ValueError: it is none, or a command or table does not lie within the file.
    """
    magic, processor, _, _, commands, size = struct.unpack_from("<6I", data)
    if magic != MAGIC:
        raise ValueError(f"magic: {magic:#x} is not allowed; expected {MAGIC:#x}")
    library, at, end = Library(processor), 32, 32 + size
    for _ in range(commands):
        command, length = struct.unpack_from("<2I", data, at)
        if length < 8 or at + length > end:
            raise ValueError(f"command {command:#x}: {length} bytes at {at} do not fit; the commands end at {end}")
        if command == _BUILD_VERSION:
            platform, version = struct.unpack_from("<2I", data, at + 8)
            library.system = (platform, version >> 16, version >> 8 & 0xFF)
        elif command == _LOAD_DYLIB:
            (name,) = struct.unpack_from("<I", data, at + 8)
            library.needs.append(_text(data, at + name))
        elif command == _SYMTAB:
            library.symbols |= _symbols(data, *struct.unpack_from("<4I", data, at + 8))
        elif command == _CODE_SIGNATURE:
            offset, length_of_signature = struct.unpack_from("<2I", data, at + 8)
            library.is_signed = 0 < length_of_signature <= len(data) - offset
        at += length
    return library


def _symbols(data: bytes, table: int, count: int, strings: int, strings_size: int) -> set[str]:
    """The external symbols that the library defines, without the underscore that C puts in front."""
    if table + 16 * count > len(data) or strings + strings_size > len(data):
        raise ValueError(f"symbols: a table of {count} at {table} does not fit into {len(data)} bytes")
    found = set()
    for i in range(count):
        name, kind = struct.unpack_from("<IB", data, table + 16 * i)
        is_external, is_private, is_defined = kind & 0x01, kind & 0x10, kind & 0x0E == 0x0E
        if is_external and not is_private and is_defined:
            found.add(_text(data, strings + name).removeprefix("_"))
    return found


def _text(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()
