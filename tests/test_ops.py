"""The two operators as torch sees them (schema, fake, mutation), their clear errors, and their backends."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import processes
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_kvquant import QuantSpec, ops, reference
from hf_kvquant.backends import AUTO, NAMES

PAIRS = {
    "int8": (QuantSpec("int8"), QuantSpec("int8")),
    "int4": (QuantSpec("int4", "channel", block_length=16), QuantSpec("int4", group_size=16, rotate=True)),
    "fp8": (QuantSpec("fp8", "channel", block_length=32), QuantSpec("fp8")),
    "dense-keys": (QuantSpec("dense"), QuantSpec("int4")),
}
by_pair = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS.keys())
TOLERANCE = {torch.float32: 2e-5}


@pytest.fixture
def setting(outlier, store):
    """Queries `[2, 4, q_len, 32]` and states of 40 columns with 2 heads."""

    def make(pair=PAIRS["int4"], q_len=2, dtype=torch.float32, backend="reference"):
        key, value = outlier(2, 2, 40, 32, dtype=dtype), outlier(2, 2, 40, 32, dtype=dtype)
        options = {"sink_length": 2, "recent_length": 5, "append": reference.quantize_append}
        keys, values = store(key, value, *pair, backend=backend, **options)
        return torch.randn(2, 4, q_len, 32, dtype=dtype), keys, values

    return make


@pytest.fixture
def latents(outlier, store):
    """Queries of 4 heads for latents of 32 elements and for rotary keys of 16, and states of 40 columns."""

    def make(on_device=False):
        specs = QuantSpec("int8", "channel", block_length=16), QuantSpec("int4", group_size=16)
        states = store(outlier(2, 1, 40, 32), outlier(2, 1, 40, 16), *specs, sink_length=2, recent_length=5)
        if on_device:
            states = [dataclasses.replace(s, device_length=torch.tensor(33)) for s in states]
        return torch.randn(2, 4, 2, 32), torch.randn(2, 4, 2, 16), *states

    return make


def attention_arguments(query, keys, values, mask=None, s_aux=None) -> tuple:
    """The operator's arguments, as the schema lists them."""
    return (
        *(query, *keys.stored, *values.stored),
        *(keys.sink_positions, keys.device_length, mask, s_aux, keys.spec.code, values.spec.code),
        *(keys.length, keys.recent_length),
        *(0.2, 0.0, keys.backend),
    )


def latent_arguments(query, rotary_query, latents, rotary, mask=None) -> tuple:
    return (
        *(query, rotary_query, *latents.stored, *rotary.stored, latents.sink_positions, latents.device_length, mask),
        *(None, latents.spec.code, rotary.spec.code, latents.length, latents.recent_length, 0.2, latents.backend),
    )


def append_arguments(key, value, keys, values, padding=None, appends=None, factors=(None, None)) -> tuple:
    return (
        *(key, value, *keys.stored, *values.stored, keys.sink_positions),
        *(torch.zeros(2, dtype=torch.int64), padding, keys.device_length, appends, *factors),
        *(keys.spec.code, values.spec.code, keys.length, keys.backend),
    )


class TestSchema:
    def test_names_and_results(self):
        attention = torch.ops.kvquant.decode_attention.default._schema
        append = torch.ops.kvquant.quantize_append.default._schema
        assert attention.name == "kvquant::decode_attention"
        assert [str(r.type) for r in attention.returns] == ["Tensor", "Tensor"]
        assert append.name == "kvquant::quantize_append"
        assert len(append.returns) == 0

    def test_only_storage_is_written(self):
        """Appending declares every tensor of the storage, and the counter, as written; attention writes nothing."""

        def written(operator):
            arguments = operator.default._schema.arguments
            return [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]

        assert written(torch.ops.kvquant.decode_attention) == []
        sides = [f"{side}_{name}" for side in "kv" for name in ("data", "scale", "zero_point", "recent", "sink")]
        assert written(torch.ops.kvquant.quantize_append) == [*sides, "sink_positions", "faults", "length", "appends"]

    @pytest.mark.parametrize("on_device", [False, True], ids=["length-known", "length-on-device"])
    @pytest.mark.parametrize("mask", ["none", "padding", "additive"])
    @by_pair
    def test_opcheck_attention(self, pair, mask, on_device, setting):
        query, keys, values = setting(pair)
        if on_device:
            keys = dataclasses.replace(keys, device_length=torch.tensor(33))
        masks = {"none": None, "padding": torch.ones(2, 40, dtype=torch.long), "additive": torch.zeros(2, 1, 2, 40)}
        s_aux = torch.randn(4) if mask == "additive" else None
        torch.library.opcheck(
            torch.ops.kvquant.decode_attention.default,
            attention_arguments(query, keys, values, masks[mask], s_aux),
        )

    @pytest.mark.parametrize("on_device", [False, True], ids=["length-known", "length-on-device"])
    @pytest.mark.parametrize("mask", ["none", "padding", "additive"])
    def test_opcheck_latent_attention(self, mask, on_device, latents):
        arguments, masks = latents(on_device), {"padding": torch.ones(2, 40, dtype=torch.long)}
        masks |= {"none": None, "additive": torch.zeros(2, 1, 2, 40)}
        torch.library.opcheck(torch.ops.kvquant.latent_attention.default, latent_arguments(*arguments, masks[mask]))

    @pytest.mark.parametrize("on_device", [False, True], ids=["length-known", "length-on-device"])
    @by_pair
    def test_opcheck_append(self, pair, on_device, setting, outlier):
        _, keys, values = setting(pair)
        if on_device:
            keys = dataclasses.replace(keys, device_length=torch.tensor(40))
        appends = torch.zeros(2, dtype=torch.int64) if on_device else None
        padding = torch.zeros(2, 50, dtype=torch.bool)
        factors = [torch.ones(2, 32, 32).tril(-1) if x.spec.is_channel else None for x in (keys, values)]
        torch.library.opcheck(
            torch.ops.kvquant.quantize_append.default,
            append_arguments(outlier(2, 2, 10, 32), outlier(2, 2, 10, 32), keys, values, padding, appends, factors),
        )


class TestFake:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("v_format", ["int8", "int4", "fp8", "dense"])
    def test_attention(self, v_format, dtype):
        """The fake gives shapes without computing elements; values have a head_dim of their own."""
        rows = {"int8": 48, "int4": 24, "fp8": 48, "dense": 48}
        with FakeTensorMode():
            query = torch.empty(2, 6, 3, 64, dtype=dtype)
            k_data, v_data = (torch.empty(2, 2, 40, row, dtype=torch.uint8) for row in (64, rows[v_format]))
            if v_format == "dense":
                v_data = v_data.to(dtype)
            scale = torch.empty(2, 2, 40, 1, dtype=torch.float16)
            output, lse = torch.ops.kvquant.decode_attention(
                query, k_data, scale, None, None, None, v_data, None if v_format == "dense" else scale, None, None,
                None, None, None, None, None, "int8:token:64", QuantSpec(v_format).code, 40, 0, 0.2, 0.0, "auto",
            )  # fmt: skip
        assert (output.shape, output.dtype) == ((2, 6, 3, 48), dtype)
        assert (lse.shape, lse.dtype) == ((2, 6, 3), torch.float32)
        assert output.is_contiguous()

    def test_append(self):
        with FakeTensorMode():
            x = torch.empty(2, 2, 1, 64)
            data, scale = torch.empty(2, 2, 40, 64, dtype=torch.uint8), torch.empty(2, 2, 40, 1, dtype=torch.float16)
            storage = (data, scale, None, None, None)
            code = "int8:token:64"
            faults = torch.zeros(2, dtype=torch.int64)
            result = torch.ops.kvquant.quantize_append(
                x, x, *storage, *storage, None, faults, None, None, None, None, None, code, code, 39, "auto"
            )
        assert result is None


class Watch(TorchDispatchMode):
    """Notes the operators of this package that torch's dispatcher calls."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kvquant":
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("watch", [nullcontext, Watch], ids=["direct", "watched"])
class TestCalls:
    @pytest.mark.parametrize("mask", ["none", "padding", "additive"])
    @by_pair
    def test_attention_passes_everything_on(self, pair, mask, watch, setting):
        """Each argument changes the result, so losing or swapping one would show."""
        query, keys, values = setting(pair)
        masks = {"none": None, "padding": torch.rand(2, 40) < 0.5, "additive": torch.randn(2, 4, 2, 40)}
        arguments = (query, keys, values, masks[mask], torch.randn(4))
        with watch():
            actual = ops.decode_attention(*arguments, scaling=0.3, softcap=4.0)
        expected = reference.decode_attention(*arguments, scaling=0.3, softcap=4.0)
        for a, e in zip(actual, expected):
            assert torch.equal(a, e)

    @pytest.mark.parametrize("on_device", [False, True], ids=["length-known", "length-on-device"])
    @pytest.mark.parametrize("mask", ["none", "padding", "additive"])
    def test_rotary_keys_are_a_second_part_of_the_keys(self, mask, on_device, watch, latents):
        """Each query over the numbers that it reads, in one softmax over both parts."""
        query, rotary_query, states, rotary = latents(on_device)
        length = 33 if on_device else 40
        masks = {"none": None, "padding": torch.rand(2, 40) < 0.5, "additive": torch.randn(2, 4, 2, 40)}
        with watch():
            output, lse = ops.latent_attention(
                query, rotary_query, states, rotary, masks[mask], torch.full((4,), 1.5), scaling=0.3
            )
        for j in range(2):
            at = length - 2 + j
            a, b = (x.dequantize(at)[:, :, : at + 1] for x in (states, rotary))
            scores = 0.3 * (query[:, :, j, None] @ a.mT + rotary_query[:, :, j, None] @ b.mT)[:, :, 0]
            if mask == "padding":
                scores = scores.masked_fill(~masks[mask][:, None, : at + 1], -torch.inf)
            if mask == "additive":
                if j == 0:
                    continue  # a complete mask has no causal order
                scores = scores + masks[mask][:, :, j, : at + 1]
            weights = torch.cat([scores, torch.full((2, 4, 1), 1.5)], -1)
            expected = (weights.softmax(-1)[..., None, :-1] @ a)[:, :, 0]
            torch.testing.assert_close(lse[:, :, j], weights.logsumexp(-1), rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(output[:, :, j], expected, rtol=1e-5, atol=1e-3)

    @by_pair
    def test_append_passes_everything_on(self, pair, watch, outlier, store):
        key, value = outlier(2, 2, 70, 32), outlier(2, 2, 70, 32)
        key[0, 0, 3, 3] = torch.nan
        padding = torch.zeros(2, 70, dtype=torch.bool)
        padding[1, :20] = True
        results = []
        for append in (ops.quantize_append, reference.quantize_append):
            faults = torch.zeros(2, dtype=torch.int64)
            options = {"padding": padding, "chunks": [30, 3, 1, 36], "faults": faults, "recent_length": 9}
            with watch():
                states = store(key, value, *pair, append=append, **options)
            tensors = [t for s in states for t in (s.data, s.scale, s.zero_point, s.recent) if t is not None]
            results.append([t.view(torch.uint8) for t in tensors])
            assert faults.tolist() == [1, 0]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_auto_equals_the_reference(self, watch, setting):
        """This holds for whichever backend `auto` picks here."""
        query, keys, values = setting(backend="auto")
        tolerance = TOLERANCE[torch.float32]
        for q in (query, query[:, :, :1]):
            with watch():
                actual = ops.decode_attention(q, keys, values, scaling=0.2)
            expected = reference.decode_attention(q, keys, values, scaling=0.2)
            for a, e in zip(actual, expected):
                torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


class TestWhoSeesTheOperators:
    """A call goes through torch's dispatcher if anything could see it there, else straight to the backend."""

    def call(self, setting, outlier) -> None:
        query, keys, values = setting()
        ops.quantize_append(
            *(outlier(2, 2, 1, 32) for _ in range(2)), keys, values, torch.zeros(2, dtype=torch.int64), start=40
        )
        ops.decode_attention(query, keys, values, scaling=0.2)

    def test_a_dispatch_mode(self, setting, outlier):
        with Watch() as watch:
            self.call(setting, outlier)
        assert watch.seen == ["kvquant::quantize_append", "kvquant::decode_attention"]

    def test_the_profiler(self, setting, outlier):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            self.call(setting, outlier)
        seen = {event.key for event in profile.key_averages()}
        assert {"kvquant::quantize_append", "kvquant::decode_attention"} <= seen

    def test_a_subclass_of_tensors(self, setting):
        seen = []

        class Named(torch.Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                seen.append(str(func))
                return super().__torch_function__(func, types, args, kwargs or {})

        query, keys, values = setting()
        plain, _ = ops.decode_attention(query, keys, values, scaling=0.2)
        output, _ = ops.decode_attention(query.as_subclass(Named), keys, values, scaling=0.2)
        assert "kvquant.decode_attention.default" in seen
        assert type(output) is Named
        assert torch.equal(output.as_subclass(torch.Tensor), plain)

    def test_nobody(self, setting, outlier, monkeypatch):
        def unexpected(*_):
            raise AssertionError("went through the dispatcher")

        monkeypatch.setattr(ops, "_sides", unexpected)
        self.call(setting, outlier)


BACKENDS = [
    name if ops.backend_status(name) is None else pytest.param(name, marks=pytest.mark.skip(ops.backend_status(name)))
    for name in ("reference", "cpu")
]


@pytest.mark.parametrize("backend", BACKENDS)
class TestLengthOnTheDevice:
    """The number of columns is a tensor; the host knows only its limit."""

    @pytest.mark.parametrize("length", [16, 31, 40])
    @pytest.mark.parametrize("mask", ["none", "padding", "additive"])
    @by_pair
    def test_attention(self, backend, pair, mask, length, outlier, store):
        """Columns beyond the length are not read, and neither is their mask."""
        x, query = outlier(2, 2, 40, 32), torch.randn(2, 4, 3, 32)
        options = {"sink_length": 2, "recent_length": 5, "append": reference.quantize_append, "backend": backend}
        states = store(x[:, :, :length], x[:, :, :length], *pair, capacity=40, **options)
        masks = {"none": None, "padding": torch.rand(2, 40) < 0.8, "additive": torch.randn(2, 4, 3, 40)}
        given = masks[mask]
        within = None if given is None else given[..., :length]
        expected = ops.decode_attention(query, *states, within, scaling=0.2)
        wide = [dataclasses.replace(s, length=40, device_length=torch.tensor(length)) for s in states]
        for got, right in zip(ops.decode_attention(query, *wide, given, scaling=0.2), expected):
            assert torch.equal(got, right)

    @by_pair
    def test_append(self, backend, pair, outlier, store):
        x = outlier(2, 2, 40, 32)

        def stored(on_device: bool) -> list[torch.Tensor]:
            length = torch.zeros((), dtype=torch.int64)

            def append(key, value, *states, start):
                length.fill_(start)
                first, *rest = states
                first = dataclasses.replace(first, device_length=length) if on_device else first
                ops.quantize_append(key, value, first, *rest, start=-99 if on_device else start)

            options = {"sink_length": 3, "recent_length": 5, "chunks": [2, 20, 1, 17], "append": append}
            sides = store(x, x, *pair, capacity=50, backend=backend, **options)
            tensors = [t for s in sides for t in (s.data, s.scale, s.zero_point, s.recent, s.sink, s.sink_positions)]
            return [t.view(torch.uint8) for t in tensors if t is not None]

        for got, right in zip(stored(on_device=True), stored(on_device=False), strict=True):
            assert torch.equal(got, right)

    @by_pair
    def test_an_append_without_room_stores_nothing(self, backend, pair, outlier, store):
        x, faults = outlier(2, 2, 40, 32), torch.tensor([0, 7])
        options = {"sink_length": 2, "recent_length": 5, "append": reference.quantize_append, "backend": backend}
        keys, values = store(x, x, *pair, capacity=42, **options)
        before = [t.clone() for s in (keys, values) for t in (s.data, s.scale, s.recent, s.sink) if t is not None]
        keys = dataclasses.replace(keys, device_length=torch.tensor(40))
        ops.quantize_append(x[:, :, :3], x[:, :, :3], keys, values, faults, start=0)
        after = [t for s in (keys, values) for t in (s.data, s.scale, s.recent, s.sink) if t is not None]
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(before, after, strict=True))
        assert faults.tolist() == [0, 10]
        ops.quantize_append(x[:, :, :2], x[:, :, :2], keys, values, faults, start=0)
        assert faults.tolist() == [0, 10]


class TestClearErrors:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda q, k, v: (q[..., :16], k, v), ["query head_dim", "16", "expected 32"]),
            (lambda q, k, v: (q.half(), k, v), ["query dtype", "torch.float16", "expected torch.float32"]),
            (lambda q, k, v: (q[:1], k, v), ["query batch", "1", "expected 2"]),
            (lambda q, k, v: (q[:, :3], k, v), ["num_heads", "3", "a multiple of num_kv_heads 2"]),
            (lambda q, k, v: (q[:, :, :0], k, v), ["q_len", "0", "expected 1 to 32"]),
            (lambda q, k, v: (q.repeat(1, 1, 17, 1), k, v), ["q_len", "34", "expected 1 to 32"]),
            (
                lambda q, k, v: (q, dataclasses.replace(k, length=1), dataclasses.replace(v, length=1)),
                ["q_len", "2", "expected 1 to 1"],
            ),
            (lambda q, k, v: (q, k, dataclasses.replace(v, length=39)), ["values length", "39", "expected 40"]),
        ],
        ids=["head_dim", "dtype", "batch", "num_heads", "q_len 0", "q_len 34", "q_len beyond kv_len", "values length"],
    )
    def test_queries_and_states(self, change, words, setting):
        query, keys, values = change(*setting())
        with pytest.raises(ValueError) as error:
            ops.decode_attention(query, keys, values, scaling=0.2)
        assert all(word in str(error.value) for word in words), str(error.value)

    @pytest.mark.parametrize(
        ("shape", "expected"),
        [
            ((2, 39), r"\(2, 40\)"),
            ((3, 40), r"\(2, 40\)"),
            ((40,), r"\(2, 4, 2, 40\)"),
            ((2, 1, 40), r"\(2, 4, 2, 40\)"),
            ((2, 1, 2, 41), r"\(2, 4, 2, 40\)"),
            ((2, 1, 2, 1), r"\(2, 4, 2, 40\)"),
            ((2, 1, 3, 40), r"\(2, 4, 2, 40\)"),
            ((2, 2, 2, 40), r"\(2, 4, 2, 40\)"),
            ((3, 1, 1, 40), r"\(2, 4, 2, 40\)"),
        ],
        ids=str,
    )
    def test_mask(self, shape, expected, setting):
        with pytest.raises(ValueError, match=rf"mask: shape .*{', '.join(map(str, shape))}.*expected {expected}"):
            ops.decode_attention(*setting(), torch.ones(shape), scaling=0.2)

    @pytest.mark.parametrize("shape", [(1, 40), (2, 40), (1, 1, 1, 40), (1, 4, 2, 40), (2, 1, 2, 40), (2, 4, 1, 40)])
    def test_masks_that_broadcast(self, shape, setting):
        query, keys, values = setting()
        mask = torch.rand(shape) < 0.5
        output, _ = ops.decode_attention(query, keys, values, mask, scaling=0.2)
        full = (2, 40) if mask.ndim == 2 else (2, 4, 2, 40)
        expected, _ = reference.decode_attention(query, keys, values, mask.expand(full), scaling=0.2)
        assert torch.equal(output, expected)

    @pytest.mark.parametrize("shape", [(3,), (1,), (4, 1)], ids=str)
    def test_s_aux(self, shape, setting):
        with pytest.raises(ValueError, match=r"s_aux: shape .* expected \(4,\)"):
            ops.decode_attention(*setting(), None, torch.zeros(shape), scaling=0.2)

    def test_rotary_keys_that_do_not_fit(self, latents):
        query, rotary_query, states, rotary = latents()
        with pytest.raises(ValueError, match=r"rotary_query: \(2, 4, 1, 16\) .*; expected \(2, 4, 2, 16\)"):
            ops.latent_attention(query, rotary_query[:, :, :1], states, rotary, scaling=0.2)
        with pytest.raises(ValueError, match="rotary_query: .* torch.float16 .*; expected .* torch.float32"):
            ops.latent_attention(query, rotary_query.half(), states, rotary, scaling=0.2)
        with pytest.raises(ValueError, match=r"rotary: \(2, 1, 39, 16\) .*; expected \(2, 1, 40\) rows"):
            ops.latent_attention(query, rotary_query, states, dataclasses.replace(rotary, length=39), scaling=0.2)


class TestBackends:
    def test_status(self):
        """None, or a reason in words."""
        assert ops.backend_status("reference") is None
        for name in NAMES:
            status = ops.backend_status(name)
            assert status is None or len(status) > 10, (name, status)

    def test_status_of_an_unknown_name(self):
        with pytest.raises(ValueError) as error:
            ops.backend_status("gpu")
        assert all(word in str(error.value) for word in ("backend", "'gpu'", AUTO, *NAMES))

    def test_an_unknown_backend(self):
        with pytest.raises(ValueError, match="backend: 'gpu' is unknown; expected one of"):
            ops.choose_backend("gpu", "cpu", torch.float32)

    def test_auto_picks_the_devices_own(self):
        for device in ("cpu", "cuda"):
            best = device if ops.backend_status(device) is None else "reference"
            assert ops.choose_backend(AUTO, device, torch.bfloat16) == best

    def test_auto_says_so_where_the_compiled_backend_does_not_take_the_states(self, monkeypatch):
        monkeypatch.setattr(ops, "backend_status", lambda name: None)
        with pytest.warns(
            RuntimeWarning, match="head_dim .* of 24 on 'cuda' run on the slow .* takes multiples of 16"
        ):
            assert ops.choose_backend.__wrapped__(AUTO, "cuda", torch.float16, 24) == "reference"

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("dtype", ops.DTYPES)
    def test_auto_picks_a_compiled_backend_or_says_why_not(self, dtype, device, monkeypatch, recwarn):
        choose = ops.choose_backend.__wrapped__
        monkeypatch.setattr(ops, "backend_status", lambda name: None)
        assert choose(AUTO, device, dtype) == device
        assert not recwarn.list
        monkeypatch.setattr(ops, "backend_status", lambda name: "no compiler")
        with pytest.warns(RuntimeWarning, match=f"on '{device}' run on the slow .*: the compiled one cannot run: no "):
            assert choose(AUTO, device, dtype) == "reference"

    @pytest.mark.parametrize(
        ("device", "dtype"),
        [("cpu", torch.float64), ("cuda", torch.float64), ("meta", torch.float32), ("mps", torch.float32)],
    )
    def test_auto_picks_the_reference_elsewhere(self, device, dtype, monkeypatch):
        """`auto` picks the reference for dtypes and devices without a compiled backend, even if all backends run."""
        monkeypatch.setattr(ops, "backend_status", lambda name: None)
        assert ops.choose_backend.__wrapped__(AUTO, device, dtype) == "reference"

    @pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
    def test_the_reference_runs_anywhere(self, device):
        assert ops.choose_backend("reference", device, torch.float64) == "reference"

    @pytest.mark.parametrize(
        ("name", "device", "dtype", "reason"),
        [
            ("cpu", "cuda", torch.float32, "device type 'cuda'"),
            ("cuda", "cpu", torch.float32, "device type 'cpu'"),
            ("cpu", "meta", torch.float32, "device type 'meta'"),
            ("cpu", "cpu", torch.float64, "float64 states need backend 'reference'"),
            ("cuda", "cuda", torch.float64, "float64 .* need backend 'reference'; 'cuda' takes float32, float16"),
        ],
    )
    def test_a_backend_that_runs_but_not_for_these_states(self, name, device, dtype, reason, monkeypatch):
        monkeypatch.setattr(ops, "backend_status", lambda name: None)
        with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run: .*{reason}"):
            ops.choose_backend.__wrapped__(name, device, dtype)

    def test_a_backend_that_cannot_run_says_why(self, monkeypatch):
        monkeypatch.setattr(ops, "backend_status", lambda name: "no compiler was found")
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: no compiler was found"):
            ops.choose_backend.__wrapped__("cuda", "cuda", torch.float32)

    def test_a_second_import_says_why_it_cannot_be(self):
        """torch registers operators once per process; its own message only names a line of our code."""
        again = (
            "import sys, hf_kvquant\n"
            "for name in [name for name in sys.modules if name.startswith('hf_kvquant')]: del sys.modules[name]\n"
            "import hf_kvquant\n"
        )
        # Not in the repository's folder, where Python would import the source instead of the installed package.
        command, folder = [sys.executable, "-c", again], Path(__file__).parent
        done = subprocess.run(command, cwd=folder, env=processes.environment(), capture_output=True, text=True)
        assert "ImportError: hf_kvquant was imported before in this process and has left sys.modules" in done.stderr

    @pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
    def test_no_silent_fallback(self, setting):
        """States that ask for a backend that cannot run make the operator raise; no other backend steps in."""
        query, keys, values = setting()
        keys, values = (dataclasses.replace(s, backend="cuda") for s in (keys, values))
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: "):
            ops.decode_attention(query, keys, values, scaling=0.2)
        x = torch.zeros(2, 2, 1, 32)
        with pytest.raises(RuntimeError, match="backend 'cuda' cannot run: "):
            ops.quantize_append(x, x, keys, values, torch.zeros(2, dtype=torch.int64), start=40)
