"""The comparison: its figures against independent ones, how much of the cache they see, resuming, peers, bytes."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_kvquant import KVQuantConfig, QuantizedCache, QuantizedTensor, QuantSpec, quantize, score_by_decoding
from hf_kvquant.measure import (
    BLIND,
    Peer,
    Preset,
    Settings,
    caches,
    compare,
    markdown_table,
    metrics,
    notes,
    peers,
    presets,
    read_tasks,
    rich_table,
    task_table,
)
from hf_kvquant.measure.caches import Dense
from hf_kvquant.measure.layer_errors import layer_errors
from hf_kvquant.measure.tables import rows, three_digits, with_error
from hf_kvquant.measure.weighing import LONG, bytes_per_element, bytes_per_element_long, held_bytes

LENGTH, CONTEXT, LAYERS, HEAD_DIM = 90, 40, 2, 32
SETTINGS = Settings(context=CONTEXT, greedy_tokens=12)
# Every logit comes from prefill, which is the usual way, and blind.
BLIND_SETTINGS = Settings(context=LENGTH, first_scored=1, greedy_tokens=0)
INT4 = KVQuantConfig(QuantSpec("int4"), QuantSpec("int4"))
FACTS = {"model": "tiny", "text": "noise", "machine": {"cpu": "a test's"}}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=1, head_dim=HEAD_DIM, max_position_embeddings=128, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def documents() -> torch.Tensor:
    return torch.randint(97, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def run(model, documents, *chosen, settings=SETTINGS, folder=None, facts=FACTS) -> dict:
    return compare(model, documents, chosen, settings, facts, folder=folder, progress=False)


class TestMetrics:
    def test_against_the_formulas(self, monkeypatch):
        # Two rows at a time: the pieces must not change the result.
        monkeypatch.setattr(metrics, "_AT_ONCE", 23)
        p, q = torch.randn(2, 5, 11, dtype=torch.float64) * 3
        targets = torch.tensor([3, 0, 10, 7, 7])
        found = metrics.compare_logits(p, q, targets)
        for row in range(5):
            a, b = p[row].softmax(0).tolist(), q[row].softmax(0).tolist()
            assert found["kl"][row] == pytest.approx(sum(x * math.log(x / y) for x, y in zip(a, b)))
            assert found["overlap"][row] == pytest.approx(1 - sum(abs(x - y) for x, y in zip(a, b)) / 2)
            assert found["nll"][row] == pytest.approx(-math.log(b[targets[row]]))
            assert found["agree"][row] == (a.index(max(a)) == b.index(max(b)))

    def test_impossible_tokens(self):
        p = torch.tensor([[0.0, 0.0, -math.inf]])
        same = metrics.compare_logits(p, p, torch.tensor([0]))
        assert same["kl"][0] == 0 and same["overlap"][0] == 1
        assert metrics.compare_logits(torch.zeros(1, 3), p, torch.tensor([0]))["kl"][0] == math.inf

    def test_means_and_standard_errors_are_over_documents(self):
        # Losses of two documents, and of the dense cache's: differences 0.1 and 0.3.
        losses, dense = [np.array([1.1, 1.1]), np.array([2.3, 2.3])], [np.array([1.0, 1.0]), np.array([2.0, 2.0])]
        parts = [{"nll": x, "kl": x / 10, "overlap": x / 4, "agree": x > 2} for x in losses]
        found = metrics.summarize(parts, [{"nll": x} for x in dense])
        assert found["tokens"] == 4
        assert found["perplexity"]["mean"] == pytest.approx(math.exp(1.7))
        assert found["perplexity"]["se"] == pytest.approx(math.exp(1.7) * 0.6)
        assert found["perplexity_change"]["mean"] == pytest.approx(math.exp(0.2) - 1)
        assert found["perplexity_change"]["se"] == pytest.approx(math.exp(0.2) * 0.1)
        assert found["kl"]["mean"] == pytest.approx(0.17) and found["kl"]["se"] == pytest.approx(0.06)
        assert found["agreement"] == {"mean": 0.5, "se": 0.5}
        assert metrics.summarize(parts[:1], [{"nll": dense[0]}])["kl"]["se"] is None

    @pytest.mark.parametrize("tokens", [1, 15, 16, 17, 1000])
    def test_positions_cover_every_token_once(self, tokens):
        bins = metrics.position_bins(tokens)
        assert [i for start, end in bins for i in range(start, end)] == list(range(tokens))
        assert len(bins) == min(16, tokens)


class TestCompare:
    def test_figures_are_those_of_real_decode(self, model, documents):
        """The figures equal those computed here from the logits of decoding token by token with `QuantizedCache`."""
        result = run(model, documents, Preset("int4", INT4))
        kl, agree, nll = [], [], []
        for ids in documents.split(1):
            scored = score_by_decoding(model, ids, CONTEXT, INT4)[0, CONTEXT:-1].double().log_softmax(-1)
            dense = model(ids).logits[0, CONTEXT:-1].detach().double().log_softmax(-1)
            kl.append((dense.exp() * (dense - scored)).sum(-1))
            agree.append(dense.argmax(-1) == scored.argmax(-1))
            nll.append(-scored.gather(-1, ids[0, CONTEXT + 1 :, None]))
        found = result["caches"]["int4"]
        assert result["cache_read_share"] == 1.0
        assert found["tokens"] == 3 * (LENGTH - CONTEXT - 1)
        assert found["kl"]["mean"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-2)
        assert found["kl"]["p99"] == pytest.approx(torch.cat(kl).quantile(0.99).item(), rel=2e-2)
        assert found["agreement"]["mean"] == pytest.approx(torch.cat(agree).double().mean().item(), abs=0.01)
        assert found["perplexity"]["mean"] == pytest.approx(torch.cat(nll).mean().exp().item(), rel=1e-3)
        start, end = result["positions"][0]
        first = torch.cat([x[start - CONTEXT - 1 : end - CONTEXT - 1] for x in kl]).mean().item()
        assert (start, result["positions"][-1][1]) == (CONTEXT + 1, LENGTH)
        assert found["by_position"]["kl"][0] == pytest.approx(first, rel=2e-2)

    def test_greedy_text_is_that_of_free_running_generation(self, model, documents):
        result = run(model, documents, Preset("int4", INT4))
        for i, ids in enumerate(documents.split(1)):
            options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
            dense = model.generate(ids[:, :CONTEXT], **options)[0]
            ours = model.generate(ids[:, :CONTEXT], cache_implementation="kvquant", cache_config=INT4, **options)[0]
            same = (dense == ours)[CONTEXT:].long().cumprod(0).sum().item()
            assert result["caches"]["int4"]["same_tokens"]["each"][i] == same
        assert result["caches"]["dense"]["same_tokens"]["each"] == [12] * 3
        assert min(result["caches"]["int4"]["same_tokens"]["each"]) < 12, "choose a model that is easier to mislead"

    def test_the_dense_cache_is_the_reference(self, model, documents):
        dense = run(model, documents)["caches"]["dense"]
        assert dense["kl"] == {"mean": 0.0, "se": 0.0, "p99": 0.0}
        assert dense["agreement"]["mean"] == 1 and dense["perplexity_change"]["mean"] == 0

    def test_formats_order_as_they_must(self, model, documents):
        chosen = presets(["fp16", "int8-plain", "fp8", "int4-small"])
        kl = {name: cache["kl"]["mean"] for name, cache in run(model, documents, *chosen)["caches"].items()}
        assert 0 < kl["fp16"] < kl["int8-plain"] < kl["fp8"] < kl["int4-small"]

    def test_result_is_plain_data(self, model, documents):
        result = run(model, documents, *presets(["int8"]))
        assert json.loads(json.dumps(result)) == result
        assert result["plan"]["caches"]["int8"] == {"kind": "preset", **KVQuantConfig.preset("int8").to_dict()}
        assert result["machine"] == FACTS["machine"] and "machine" not in result["plan"]

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            (Settings(context=0), "context: 0 is not allowed; expected 1 to 90"),
            (Settings(context=91), "context: 91"),
            (Settings(context=89), "context: 89 leaves no token to score; expected at most 88"),
            (Settings(context=20, first_scored=90), "first_scored: 90 leaves no token to score; expected at most 89"),
            (Settings(context=20, first_scored=0), "first_scored: 0"),
            (Settings(context=20, greedy_tokens=-1), "greedy_tokens: -1"),
            (Settings(context=70, greedy_tokens=70), "context . greedy_tokens: 140 .*the model's 128"),
        ],
        ids=lambda x: str(x),
    )
    def test_settings_that_do_not_fit(self, model, documents, settings, match):
        with pytest.raises(ValueError, match=match):
            run(model, documents, settings=settings)

    def test_a_document_longer_than_the_model(self, model):
        with pytest.raises(ValueError, match="document: 129 tokens are not allowed; expected at most the model's 128"):
            run(model, torch.zeros(1, 129, dtype=torch.long))


class TestWhatSeesTheCache:
    """Doubling stored values must change every figure whose share is above 0, and none whose share is 0."""

    @pytest.fixture
    def break_the_cache(self, monkeypatch):
        def apply():
            stored = QuantizedTensor.dequantize
            monkeypatch.setattr(QuantizedTensor, "dequantize", lambda self, *args: 2 * stored(self, *args))

        return apply

    def figures(self, result: dict) -> dict:
        cache = result["caches"]["int8-plain"]
        found = {
            name: cache[name]["mean"] for name in ("perplexity", "perplexity_change", "kl", "agreement", "overlap")
        }
        found |= {"p99": cache["kl"]["p99"], "positions": cache["by_position"]}
        return found | ({"same_tokens": cache["same_tokens"]["each"]} if cache["same_tokens"] else {})

    def test_share_above_zero(self, model, documents, break_the_cache):
        whole = self.figures(run(model, documents, *presets(["int8-plain"])))
        break_the_cache()
        broken = self.figures(run(model, documents, *presets(["int8-plain"])))
        assert [name for name in whole if whole[name] == broken[name]] == []
        assert broken["kl"] > 100 * whole["kl"]

    def test_share_zero(self, model, documents, break_the_cache):
        result = run(model, documents, *presets(["int8-plain"]), settings=BLIND_SETTINGS)
        assert result["cache_read_share"] == 0.0
        break_the_cache()
        broken = run(model, documents, *presets(["int8-plain"]), settings=BLIND_SETTINGS)
        assert self.figures(result) == self.figures(broken)

    def test_share_zero_is_said(self, model, documents):
        result = run(model, documents, *presets(["int8-plain"]), settings=BLIND_SETTINGS)
        assert rows(result)["int8-plain"].count(BLIND) == 1
        assert BLIND in " ".join(notes(result))
        seeing = run(model, documents, *presets(["int8-plain"]))
        assert BLIND not in markdown_table(seeing) + " ".join(notes(seeing))

    def test_a_share_between(self, model, documents):
        result = run(model, documents, settings=Settings(context=CONTEXT, first_scored=21, greedy_tokens=0))
        assert result["cache_read_share"] == (LENGTH - CONTEXT - 1) / (LENGTH - 21)


class StepwiseDense(Peer):
    """A cache that loses nothing, driven like a peer."""

    name = "stepwise"

    def __init__(self):
        pass

    def settings(self):
        return {}

    def build(self, config, max_length):
        return DynamicCache(config=config)


class TestPeers:
    @pytest.mark.parametrize(
        "settings", [SETTINGS, BLIND_SETTINGS, Settings(CONTEXT, 21, 0)], ids=["after", "blind", "across"]
    )
    def test_driving_token_by_token_changes_nothing_else(self, model, documents, settings):
        cache = run(model, documents, StepwiseDense(), settings=settings)["caches"]["stepwise"]
        assert cache["tokens"] == 3 * (LENGTH - 1 - settings.first)
        assert cache["kl"]["p99"] < 1e-9
        assert cache["agreement"]["mean"] == 1

    def test_a_peer_without_its_package_is_listed_with_the_reason(self, model, documents, monkeypatch):
        def missing(**options):
            raise ImportError("You need to install a package.\nSecond line.")

        monkeypatch.setattr(caches.transformers, "QuantizedCache", missing)
        result = run(model, documents, *peers())
        assert result["skipped"] == {peer.name: "ImportError: You need to install a package." for peer in peers()}
        assert list(result["caches"]) == ["dense"]
        assert "quanto-int2 was left out: ImportError: You need to install" in " ".join(notes(result))

    def test_a_preset_that_fails_is_an_error(self, model, documents, monkeypatch):
        monkeypatch.setattr(caches, "score", lambda *_, **__: pytest.fail("broken"))
        with pytest.raises(pytest.fail.Exception, match="broken"):
            run(model, documents, *presets(["int8"]))

    def test_real_ones(self, documents, quanto_in_python):
        """More bits mean more bytes and less divergence."""
        pytest.importorskip("optimum.quanto")
        pytest.importorskip("hqq")
        torch.manual_seed(0)
        # Their groups have 64 elements, so heads must have as many.
        config = LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=1,
            head_dim=64, max_position_embeddings=128, initializer_range=0.2,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        result = run(model, documents[:1], *peers(), settings=Settings(CONTEXT, greedy_tokens=0))
        caches = result["caches"]
        chain = ["hqq-int8", "quanto-int4", "quanto-int2"]
        assert set(chain) <= set(caches), result["skipped"]
        for better, worse in itertools.pairwise(chain):
            assert 0 < caches[better]["kl"]["mean"] < caches[worse]["kl"]["mean"]
            assert caches[better]["bytes_per_element"]["long"] > caches[worse]["bytes_per_element"]["long"]
        # Codes, two 16-bit numbers per group of 64, and 64 of 8192 tokens (keys and values) in 16 bits.
        body = (LONG - 64) / LONG
        for name, code_bits in zip(chain, (8, 4, 2)):
            expected = (code_bits + 32 / 64) / 8 * body + 2 * (1 - body)
            assert caches[name]["bytes_per_element"]["long"] == pytest.approx(expected, rel=2e-3)


class TestBytes:
    @pytest.mark.parametrize(
        ("preset", "expected"), [("int8-plain", 1 + 2 / 32), ("fp8", 1 + 2 / 32), ("int4-small", 0.5 + 2 / 32)]
    )
    def test_token_grids_by_hand(self, model, preset, expected):
        candidate = presets([preset])[0]
        # Two counters of faults per layer, independent of the length.
        counters = 2 * 8 * LAYERS / (2 * LAYERS * HEAD_DIM)
        assert bytes_per_element(model, candidate, LENGTH - 1, LENGTH) == pytest.approx(expected + counters / LENGTH)
        assert bytes_per_element_long(model, candidate) == pytest.approx(expected, rel=1e-3)

    def test_dense_ones(self, model):
        assert bytes_per_element(model, Dense(), CONTEXT, LENGTH) == 4.0
        assert bytes_per_element(model, presets(["fp16"])[0], CONTEXT, LENGTH) == 2.0

    def test_windows_weigh_most_on_short_texts(self, model):
        int4 = presets(["int4"])[0]
        assert bytes_per_element(model, int4, CONTEXT, LENGTH) > 2 * bytes_per_element_long(model, int4)

    def test_the_walk_over_tensors_counts_what_memory_report_counts(self, model):
        cache = QuantizedCache(model.config, "int4", max_length=70)
        for layer_idx in range(LAYERS):
            cache.update(torch.randn(1, 1, 70, HEAD_DIM), torch.randn(1, 1, 70, HEAD_DIM), layer_idx)
        walked = 0
        for layer in cache.layers:
            held = [*layer._keys.stored, *layer._values.stored, *vars(layer).values()]
            walked += sum(t.untyped_storage().nbytes() for t in held if isinstance(t, torch.Tensor))
        assert held_bytes(cache) == walked == cache.memory_report()["total"]

    def test_the_walk_counts_a_storage_once(self):
        cache = DynamicCache()
        both = torch.zeros(2, 1, 1, 8, 4)
        cache.update(both[0], both[1], 0)
        cache.layers[0].keys, cache.layers[0].values = both[0], both[1]
        assert held_bytes(cache) == both.nbytes


class Killed(KeyboardInterrupt):
    pass


class Counting(Preset):
    """Counts the documents that it scores, and dies on request."""

    def rows(self, model, ids, context, first):
        self.calls.append(ids.shape)
        if len(self.calls) == self.dies_at:
            raise Killed
        yield from super().rows(model, ids, context, first)


def counting(dies_at=None) -> Counting:
    candidate = Counting("int4", INT4)
    candidate.calls = []
    candidate.dies_at = dies_at
    return candidate


class TestResuming:
    def test_a_killed_run_goes_on(self, model, documents, tmp_path):
        settings = replace(SETTINGS, greedy_tokens=0)
        with pytest.raises(Killed):
            run(model, documents, counting(dies_at=2), settings=settings, folder=tmp_path)
        assert json.loads((tmp_path / "plan.json").read_text())["settings"]["context"] == CONTEXT
        assert sorted(f.relative_to(tmp_path).as_posix() for f in tmp_path.rglob("*.npz")) == [
            "documents/dense/0.npz", "documents/dense/1.npz", "documents/int4/0.npz",
        ]  # fmt: skip
        # The file that a kill in the middle of writing leaves behind.
        (tmp_path / "documents" / "int4" / "1.partial").write_bytes(b"PK")
        again = counting()
        resumed = run(model, documents, again, settings=settings, folder=tmp_path)
        assert len(again.calls) == 2
        whole = run(model, documents, counting(), settings=settings)
        for result in (resumed, whole):
            for cache in result["caches"].values():
                del cache["seconds"]
        assert resumed == whole
        saved = json.loads((tmp_path / "result.json").read_text())
        assert saved["caches"]["int4"]["kl"] == resumed["caches"]["int4"]["kl"]

    def test_a_finished_run_measures_nothing_again(self, model, documents, tmp_path):
        first = run(model, documents, counting(), folder=tmp_path)
        again = counting()
        second = run(model, documents, again, folder=tmp_path)
        assert again.calls == []
        assert first == second

    def test_other_settings_in_the_same_folder_are_refused(self, model, documents, tmp_path):
        run(model, documents, counting(), folder=tmp_path)
        for changed, name in (
            ({"settings": replace(SETTINGS, context=41)}, "settings.context: 40 became 41"),
            ({"facts": {**FACTS, "text": "other"}}, "text: 'noise' became 'other'"),
        ):
            with pytest.raises(
                ValueError, match=f"other settings .*{name}.*expected the same ones, or another folder"
            ):
                run(model, documents, counting(), folder=tmp_path, **changed)
        with pytest.raises(ValueError, match="documents_sha256"):
            run(model, documents.flip(1), counting(), folder=tmp_path)
        with pytest.raises(ValueError, match=r"caches\.int4\.recent_length: 0 became 8"):
            run(model, documents, Preset("int4", replace(INT4, recent_length=8)), folder=tmp_path)
        run(model, documents, counting(), folder=tmp_path, facts={**FACTS, "machine": {"cpu": "another"}})

    def test_other_weights_are_refused(self, model, documents, tmp_path):
        run(model, documents, folder=tmp_path)
        other = LlamaForCausalLM(model.config).eval()
        with pytest.raises(ValueError, match="weights: "):
            run(other, documents, folder=tmp_path)


class TestLayerErrors:
    def test_against_direct_quantization(self, model, documents):
        config = KVQuantConfig.from_dict(
            {
                "keys": {"format": "int4", "grid": "channel"},
                "values": {"format": "int8"},
                "layers": {1: {"values": {"format": "dense"}}},
            }
        )
        found = layer_errors(model, documents[:1], {"mine": config})["mine"]
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(documents[:1], past_key_values=cache)
        keys = cache.layers[1].keys
        error = (keys - quantize(keys, config.keys).dequantize()).norm() / keys.norm()
        assert found["keys"][1] == pytest.approx(error.item(), rel=1e-5)
        assert found["values"][1] == 0
        assert 0 < found["values"][0] < found["keys"][0] < 0.2


class TestPresets:
    def test_names_files_and_fp16(self, tmp_path):
        INT4.to_yaml(tmp_path / "mine.yaml")
        found = presets(["fp16", " int8", str(tmp_path / "mine.yaml")])
        assert [candidate.name for candidate in found] == ["fp16", "int8", "mine"]
        assert found[2].config == INT4

    @pytest.mark.parametrize(
        ("names", "match"),
        [(["int5"], "presets: .*'int5' is neither a preset nor a file"), (["int8", "int8"], "'int8' stands twice")],
    )
    def test_what_is_refused(self, names, match):
        with pytest.raises(ValueError, match=match):
            presets(names)


class TestTables:
    @pytest.mark.parametrize(
        ("mean", "se", "text"),
        [
            (2.113, 0.2, "2.1 ± 0.2"),
            (2.113, 0.13, "2.11 ± 0.13"),
            (20.7, 4.7, "21 ± 5"),
            (-0.02, 0.75, "0.0 ± 0.8"),
            (0.000198, 0.000058, "0.00020 ± 0.00006"),
            (1e-9, 1e-10, "below 0.00001"),
            (1.23456, None, "1.23"),
            (math.nan, math.nan, "nan"),
        ],
    )
    def test_digits_follow_the_error(self, mean, se, text):
        assert with_error({"mean": mean, "se": se}) == text

    @pytest.mark.parametrize(
        ("x", "text"),
        [
            (2934.4, "2934"),
            (81.72, "81.7"),
            (0.0, "0.00"),
            (0.01234, "0.0123"),
            (1.83e-5, "0.000018"),
            (math.inf, "inf"),
        ],
    )
    def test_three_digits(self, x, text):
        assert three_digits(x) == text

    def test_terminal_and_markdown_say_the_same(self, model, documents, capsys):
        result = run(model, documents, *presets(["int8"]))
        cells = rows(result)["int8"]
        line = next(line for line in markdown_table(result).splitlines() if line.startswith("| **int8**"))
        assert [cell.strip() for cell in line.strip("|").split("|")] == ["**int8**", *cells[1:]]
        table = rich_table(result)
        assert [list(column.cells)[1] for column in table.columns] == cells


LM_EVAL = {
    "results": {
        "lambada": {"alias": "lambada", "acc,none": 0.5, "acc_stderr,none": 0.01, "perplexity,none": 9.0,
                    "perplexity_stderr,none": "N/A", "cache_read_share,none": 0.75},
        "mmlu": {"acc,strict": 0.25, "acc_stderr,strict": 0.02},
    },
    "cache_read_share": {"mmlu": 0.0},
    "config": {"model": "hf-kvquant", "model_args": "pretrained=models/nano,kv_config=configs/int4.yaml"},
}  # fmt: skip


class TestTasks:
    def test_reading_lm_eval(self):
        found = read_tasks(LM_EVAL)
        assert {(task["model"], task["cache"]) for task in found} == {("nano", "int4")}
        assert [(t["task"], t["metric"], t["value"], t["se"], t["cache_read_share"]) for t in found] == [
            ("lambada", "acc", 0.5, 0.01, 0.75),
            ("lambada", "perplexity", 9.0, None, 0.75),
            ("mmlu", "acc (strict)", 0.25, 0.02, 0.0),
        ]

    @pytest.mark.parametrize(
        "arguments", [{"pretrained": "m"}, "pretrained=m", {"pretrained": "m", "kv_config": "none"}]
    )
    def test_without_a_kv_config_it_is_the_dense_cache(self, arguments):
        assert {task["cache"] for task in read_tasks({**LM_EVAL, "config": {"model_args": arguments}})} == {"dense"}

    def test_share_is_printed(self):
        cells = [list(column.cells) for column in task_table(read_tasks(LM_EVAL)).columns]
        assert cells[-1] == ["75.0%", "75.0%", BLIND]
        assert cells[4] == ["0.500 ± 0.010", "9", "0.25 ± 0.02"]

    def test_what_is_not_a_result(self):
        with pytest.raises(ValueError, match="lm-eval result: .*expected a mapping with `results`"):
            read_tasks({"scores": {}})
