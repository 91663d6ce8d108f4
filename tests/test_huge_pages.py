"""Large storage asks the system for huge pages; small storage, and memory beside large storage, does not."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from hf_kvquant import huge_pages
from hf_kvquant.huge_pages import HUGE_PAGE, LARGE_BYTES, empty_storage, with_huge_pages
from hf_kvquant.quantization import QuantSpec
from hf_kvquant.storage import Side

pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="needs Linux")


def mapping_of(address: int) -> str:
    """The facts about the mapping that holds `address` (proc(5), smaps)."""
    for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        start, end = (int(x, 16) for x in mapping.split(maxsplit=1)[0].split("-"))
        if start <= address < end:
            return mapping
    raise AssertionError(hex(address))


def asks_for_huge_pages(address: int) -> bool:
    return " hg" in re.search(r"VmFlags:.*", mapping_of(address))[0]


def fresh(nbytes: int) -> torch.Tensor:
    """Memory that was not used before: reused memory may have asked for huge pages already."""
    return torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("nbytes", "asks"), [(LARGE_BYTES - 1, False), (LARGE_BYTES, True), (5 * LARGE_BYTES + 13, True)]
)
def test_large_tensors_ask(nbytes, asks):
    plain = fresh(nbytes)
    assert not asks_for_huge_pages(plain.data_ptr() + nbytes // 2)
    tensor = with_huge_pages(plain)
    assert tensor is plain
    assert asks_for_huge_pages(tensor.data_ptr() + nbytes // 2) == asks


def test_storage_asks():
    states = torch.zeros(1, 2, 3, 64)
    side = Side(QuantSpec("int8").resolve(64), states, LARGE_BYTES // 128, sink_length=0, recent_length=0)
    assert side.data.nbytes == LARGE_BYTES and asks_for_huge_pages(side.data.data_ptr() + LARGE_BYTES // 2)


@pytest.mark.parametrize(
    ("tokens", "dtype", "on_huge_pages"),
    [
        (LARGE_BYTES // 64 - 1, torch.uint8, False),
        (LARGE_BYTES // 64, torch.uint8, True),
        (LARGE_BYTES // 64 + 3, torch.bfloat16, True),
    ],
)
def test_storage_begins_with_a_huge_page(tokens, dtype, on_huge_pages, monkeypatch):
    mapped = Mock(wraps=mmap.mmap)
    monkeypatch.setattr(mmap, "mmap", mapped)
    new = empty_storage(1, tokens, 64, dtype=dtype, device=torch.device("cpu"))
    assert new.shape == (1, tokens, 64) and new.dtype == dtype and new.is_contiguous()
    assert new.untyped_storage().nbytes() == new.nbytes
    assert mapped.called == on_huge_pages
    if on_huge_pages:
        assert new.data_ptr() % HUGE_PAGE == 0 and asks_for_huge_pages(new.data_ptr())
        # A child process has a copy.
        assert mapping_of(new.data_ptr()).split()[1] == "rw-p"
    new.fill_(1)
    assert new.sum(dtype=torch.float64) == new.numel()


def test_memory_of_others_is_left_alone():
    whole = fresh(3 * LARGE_BYTES)
    with_huge_pages(whole[LARGE_BYTES + 1 : 2 * LARGE_BYTES + 2])
    assert not asks_for_huge_pages(whole.data_ptr() + LARGE_BYTES)
    assert not asks_for_huge_pages(whole.data_ptr() + 2 * LARGE_BYTES + 2)


@pytest.mark.parametrize(("device", "system"), [("meta", "linux"), ("cpu", "darwin")])
def test_other_devices_and_systems_are_left_alone(device, system, monkeypatch):
    advise, mapped = Mock(), Mock()
    monkeypatch.setattr(huge_pages, "_madvise", advise)
    monkeypatch.setattr(mmap, "mmap", mapped)
    monkeypatch.setattr(sys, "platform", system)
    tensor = empty_storage(LARGE_BYTES, dtype=torch.uint8, device=torch.device(device))
    assert with_huge_pages(tensor) is tensor and tensor.device.type == device and tensor.nbytes == LARGE_BYTES
    assert not advise.called and not mapped.called
