"""Loading and launching on a GPU, with a stand-in for the driver: the calls that reach the driver, and their order.

cuda-core and cuda-bindings are the real ones; tests/stand_in_driver.cc writes down what they call. It runs in a
process of its own, because a driver is loaded once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch

from hf_kvquant import QuantSpec
from hf_kvquant.backends import disk_cache, gpu, nvrtc
from hf_kvquant.backends.specialisation import specialisation

HERE = Path(__file__).parent
SHARED_LIMIT = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
EARLY = "with attribute 6 of 1"  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
SHARED_SHARE = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
THREADS = """
import threading, time
from hf_kvquant.backends import nvrtc

def use(i):
    time.sleep(0.01 * i)
    # In one piece: threads share the line.
    print(f"{nvrtc.missing()}\\n", end="")

threads = [threading.Thread(target=use, args=(i,)) for i in range(24)]
for thread in threads:
    thread.start()
"""
KERNEL = """
struct Two { unsigned long long a, b; };
extern "C" __global__ void decode_attention_kernel(Two s, float* p) { p[0] = s.a; }
extern "C" __global__ void merge_splits_kernel(Two s, const float* p) {}
extern "C" {
__constant__ int decode_attention_kernel_launch[2] = {128, 0};
__constant__ int merge_splits_kernel_launch[2] = {64, 60000};
}
"""

SCRIPT = """
import ctypes, sys, threading
from contextlib import contextmanager
from pathlib import Path
import torch
from hf_kvquant import QuantSpec
from hf_kvquant.backends import gpu, nvrtc
from hf_kvquant.backends.specialisation import specialisation
from cuda.bindings import driver

nvrtc.source_folder = lambda: Path(sys.argv[1])
state = {"device": 0, "stream": 0x77, "capturing": False, "capability": (9, 0)}

@contextmanager
def on(index):
    before, state["device"] = state["device"], index
    driver.cuCtxSetCurrent(0x1000 + index)
    yield
    state["device"] = before
    driver.cuCtxSetCurrent(0x1000 + before)

torch.cuda.get_device_capability = lambda index: state["capability"]
torch.cuda.current_device = lambda: state["device"]
torch.cuda.device = on
torch.cuda.is_current_stream_capturing = lambda: state["capturing"]
torch._C._cuda_getCurrentRawStream = lambda index: state["stream"] + index

class Two(ctypes.Structure):
    _fields_ = [("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]

def said(call):
    try:
        call()
    except RuntimeError as error:
        print(error)

fp8 = QuantSpec("fp8").resolve(64)
kind = specialisation(2, fp8, fp8, 64, 64)
memory = torch.zeros(4)
print(hex(memory.data_ptr()))
zero, one = gpu.Gpu(0), gpu.Gpu(1)

def launch(device, kernel="decode_attention_kernel"):
    device.launch({kernel: (3, 2, 1)}, kind, Two(0xaaa, 0xbbb), memory)

state["capturing"] = True
said(lambda: launch(zero))
state["capturing"] = False
launch(zero)
launch(zero)
launch(one)
launch(zero, "merge_splits_kernel")
state["capturing"] = True
launch(zero)
another = threading.Thread(target=launch, args=(zero,))
another.start()
another.join()
driver.cuCtxSetCurrent(0)
launch(zero)
state["stream"] = 0xbad
said(lambda: launch(zero))
state.update(stream=0x77, capturing=False, capability=(8, 0))
launch(gpu.Gpu(0))
state["capability"] = (9, 0)
newer, driver.cuDriverGetVersion = driver.cuDriverGetVersion, lambda: (0, 12020)
launch(gpu.Gpu(0))
driver.cuDriverGetVersion = newer
nvrtc.compiled = lambda *_: nvrtc.Compiled(b"too new for this driver", {}, {}, True, 0.0)
said(lambda: launch(gpu.Gpu(0)))
"""


@pytest.mark.skipif(nvrtc.missing() is not None, reason=f"{nvrtc.missing()}")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stand-in is a Linux library")
def test_what_reaches_the_driver(tmp_path, monkeypatch):
    folder = tmp_path / "kernels"
    (folder / "cuda").mkdir(parents=True)
    (folder / "include").mkdir()
    (folder / "cuda" / "decode_attention.cu").write_text(KERNEL)
    monkeypatch.setenv(disk_cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc, "source_folder", lambda: folder)
    nvrtc._sources_hash.cache_clear()
    # Compiled here, because NVRTC looks for a driver too, and would take the stand-in for a complete one.
    fp8 = QuantSpec("fp8").resolve(64)
    for arch in ("sm_80", "sm_90"):
        nvrtc.compiled("decode_attention.cu", specialisation(2, fp8, fp8, 64, 64), arch)

    library, trace = tmp_path / "libcuda.so.1", tmp_path / "trace"
    compiler = shutil.which("g++") or shutil.which("c++")
    source = HERE / "stand_in_driver.cc"
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library), "-ldl"], check=True)
    environment = processes.environment(
        LD_LIBRARY_PATH=os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]),
        STAND_IN_TRACE=str(trace),
    )
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    address, while_capturing, failed, too_new = done.stdout.splitlines()
    share = f"set 4000, attribute {SHARED_SHARE} to 100"
    first = f"grid 3 2 1 threads 128 shared 0 stream 77: aaa bbb, {int(address, 16):x}"
    lines = [line for line in trace.read_text().splitlines() if line != "unload"]
    assert lines == [
        # Compiled and loaded after the refused capture, in the GPU's own context; then only launched.
        # Kernels may start before the ones ahead have ended, and get all of the shared memory.
        "context 1000", "kernel decode_attention_kernel", share, "load 4000, attribute 4",
        f"launch 4000 {first}", EARLY,
        f"launch 4000 {first}", EARLY,
        # A second GPU has a function and a stream of its own, and the first is current again afterwards.
        "context 1001", "context 1001", "kernel decode_attention_kernel", share.replace("4000", "4001"),
        "load 4001, attribute 4", f"launch 4001 {first.replace('stream 77', 'stream 78')}", EARLY, "context 1000",
        # More than 48 KB of shared memory must be requested.
        "context 1000", "kernel merge_splits_kernel", f"set 4000, attribute {SHARED_LIMIT} to 60000",
        share, "load 4000, attribute 4",
        f"launch 4000 {first.replace('threads 128 shared 0', 'threads 64 shared 60000')}", EARLY,
        # Loaded kernels may be captured, and launched by another thread.
        f"launch 4000 {first}", EARLY,
        f"launch 4000 {first}", EARLY,
        # A thread without a context gets one.
        "context 0", "launch without a context", "context 1000", f"launch 4000 {first}", EARLY,
        # Before sm_90, and with a driver that cannot capture such launches, a kernel starts after the one ahead.
        *("context 1000", "kernel decode_attention_kernel", share, "load 4000, attribute 4",
          f"launch 4000 {first}") * 2,
        # A kernel whose code the driver refuses.
        "context 1000",
    ]  # fmt: skip
    assert while_capturing.startswith("decode_attention_kernel (bfloat16, head_dim 64, keys fp8 token 64")
    assert "used for the first time while a CUDA graph is captured; call it once before" in while_capturing
    assert "cannot be launched on cuda:0: CUDA_ERROR_INVALID_VALUE, grid (3, 2, 1)" in failed
    assert f"compiled by NVRTC {nvrtc.version_name()} for sm_90, cannot be loaded on cuda:0" in too_new
    assert "CUDA_ERROR_INVALID_IMAGE; the driver is for CUDA 13.0" in too_new
    assert "pip install cuda-core" in too_new


@pytest.mark.skipif(nvrtc.missing() is not None, reason=f"{nvrtc.missing()}")
def test_threads_may_compile_first_at_once(tmp_path):
    """Without a lock, one of two threads that import cuda-core at once would find only half of it."""
    done = subprocess.run(
        # Not in the repository's folder, where Python would import the source instead of the installed package.
        [sys.executable, "-W", "ignore", "-c", THREADS],
        env=processes.environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.stdout == "None\n" * 24, done.stderr


def test_a_gpu_that_is_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.raises(RuntimeError, match=r"cuda:0: compute capability 7\.5 is too old; expected 8\.0 or newer"):
        gpu.Gpu(0)


def test_tensors_that_are_not_on_a_gpu_are_refused():
    with pytest.raises(ValueError, match="states on cpu are not allowed"):
        gpu.of(torch.zeros(1))
