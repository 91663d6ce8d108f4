"""Compiles a CUDA source for many architectures in half the time: NVRTC's optimizer runs once, then ptxas for each.

NVRTC translates to PTX, and PTX to machine code. The first step takes half of the time, and gives the same text for
several architectures. For the second, ptxas of the wheel nvidia-cuda-nvcc writes the same bytes as NVRTC of the same
version. test_cuda_compile.py compares both.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from once import once

from hf_kvquant.backends import nvrtc


def program() -> Path | None:
    """The program `ptxas` of the wheel: another version on the PATH would write other code."""
    folders = find_spec("nvidia").submodule_search_locations if find_spec("nvidia") else []
    return next((file for folder in folders for file in sorted(Path(folder).glob("cu1*/bin/ptxas*"))), None)


def missing() -> str | None:
    """None if this can be used here, else what is missing and how to get it."""
    return nvrtc.missing() or (None if program() else "there is no ptxas; pip install 'nvidia-cuda-nvcc==13.*'")


def ptx(source: str, specialisation: Mapping[str, int], arch: str, text: str | None = None) -> str:
    """The PTX of `source`, a name in `nvrtc.SOURCES`, for `arch` ("sm_90"), with the package's options;
    `text` is compiled in its place. Once in a session, so a changed header needs a folder of its own.

    Raises:
        nvrtc.CompileError: with NVRTC's log.
    """
    # Not with cuda-core, which needs a GPU's driver to return PTX.
    from cuda.bindings import nvrtc as library

    def call(function, *arguments):
        error, *results = function(*arguments)
        assert error == library.nvrtcResult.NVRTC_SUCCESS, (function, error)
        return results[0] if results else None

    options = nvrtc.options(source, specialisation, arch.replace("sm_", "compute_")).as_bytes("nvrtc", "ptx")
    text = nvrtc.source_text(source) if text is None else text

    def translate(target: Path) -> None:
        unit = call(library.nvrtcCreateProgram, text.encode(), source.encode(), 0, [], [])
        if library.nvrtcCompileProgram(unit, len(options), options)[0] != library.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(call(library.nvrtcGetProgramLogSize, unit))
            call(library.nvrtcGetProgramLog, unit, log)
            raise nvrtc.CompileError(f"{source} for {arch} ({specialisation}) does not compile: {log.decode()}")
        code = bytearray(call(library.nvrtcGetPTXSize, unit))
        call(library.nvrtcGetPTX, unit, code)
        call(library.nvrtcDestroyProgram, unit)
        target.write_bytes(code.rstrip(b"\0"))

    return once(".ptx", [*map(str, options), source, text], translate).read_text()


def assemble(text: str, arch: str) -> tuple[bytes, dict[str, nvrtc.Usage]]:
    """Machine code for `arch` from PTX, whichever architecture that was made for, and the usage of its kernels.

    Raises:
        nvrtc.CompileError: with the log of ptxas.
    """
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        before.write_text(re.sub(r"(?m)^\.target .*$", f".target {arch}", text))
        command = [program(), "-v", f"-arch={arch}", before, "-o", after]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise nvrtc.CompileError(f"ptxas for {arch}: {done.stderr}")
        return after.read_bytes(), nvrtc.read_usage(done.stderr)


def sections(cubin: bytes) -> dict[str, bytes]:
    """The content of the sections of an ELF file by name; empty for sections without bytes in the file."""
    at, size, count, names = *struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<HHH", cubin, 58)
    # Each header has the offset of its name, type, flags, address, offset in the file, length.
    headers = [struct.unpack_from("<IIQQQQ", cubin, at + i * size) for i in range(count)]
    begin, has_none = headers[names][4], 8
    found = {}
    for name, kind, _, _, place, length in headers:
        text = cubin[begin + name : cubin.index(0, begin + name)].decode()
        found[text] = b"" if kind == has_none else cubin[place : place + length]
    return found
