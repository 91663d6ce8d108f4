"""Fixtures for several test files: the seed, keys as trained models have them, states stored in poisoned memory."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable
from types import SimpleNamespace

import families
import once
import pytest
import stored
import torch

from hf_kvquant import QuantizedStates, config, route


def pytest_collection_modifyitems(items):
    """Files whose tests start processes come first: these tests take longest, and one that begins last would keep the
    other processors waiting."""
    items.sort(key=lambda item: {"subprocess", "processes"}.isdisjoint(vars(item.module)))


# Imports leave millions of objects that stay. No collection of garbage looks at them, neither while they are made nor
# later: transformers' continuous batching alone asks for two whole ones whenever it stops.
gc.disable()


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Test processes share what one of them has compiled."""
    base = tmp_path_factory.getbasetemp()
    once.folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """Warnings that are given once per process are given once per test."""
    monkeypatch.setattr(route, "_said", set())


@pytest.fixture
def narrow_windows(request, monkeypatch):
    """For the families with quantized sliding layers the presets take windows as narrow as theirs."""
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if given.get("name") in families.SLIDING:
        read = config._read_preset
        monkeypatch.setattr(config, "_read_preset", lambda name: dataclasses.replace(read(name), sliding=24))


@pytest.fixture
def quanto_in_python(monkeypatch):
    """quanto unpacks its codes here, where it would compile C++ for a minute."""
    try:
        from optimum.quanto.library.extensions import cpp
    except ImportError:
        return

    def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
        return torch.cat([packed >> at & 2**bits - 1 for at in range(0, 8, bits)])

    monkeypatch.setattr(cpp.ext, "_lib", SimpleNamespace(unpack=unpack))


@pytest.fixture
def outlier() -> Callable[..., torch.Tensor]:
    return _outlier


@pytest.fixture
def store() -> Callable[..., tuple[QuantizedStates, QuantizedStates]]:
    return stored.store


def _outlier(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Keys or values `[batch, num_kv_heads, kv_len, head_dim]` as trained models make them: one channel in eight is
    ten times larger, one in eight sits far from zero, and some tokens are large."""
    batch, num_kv_heads, kv_len, head_dim = shape
    size = torch.where(torch.rand(num_kv_heads, 1, head_dim) < 1 / 8, 10.0, 1.0)
    offset = torch.where(torch.rand(num_kv_heads, 1, head_dim) < 1 / 8, 20.0, 0.0) * torch.randn(num_kv_heads, 1, 1)
    token = 1 + 3 * (torch.rand(batch, 1, kv_len, 1) < 1 / 16)
    return (torch.randn(shape) * size * token + offset).to(dtype)
