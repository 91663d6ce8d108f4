"""The published divergence along long decoding: its table matches the JSON, which is of the shipped model and presets;
and its script."""

from __future__ import annotations

import json
from dataclasses import replace

import broken_models
import pytest
import torch
from scripts import script

from hf_kvquant import KVQuantConfig, score_by_decoding
from hf_kvquant.measure import Preset, Settings, compare
from hf_kvquant.measure.caches import Decoded
from hf_kvquant.saving import weights_sum

long_decode = script("long_decode")


@pytest.fixture(scope="module")
def result() -> dict:
    return json.loads(long_decode.FILE.read_text(encoding="utf-8"))


class TestPublished:
    def test_the_table_says_what_the_results_say(self, result):
        readme = long_decode.README.read_text(encoding="utf-8")
        assert long_decode.with_table(readme, result) == readme, "python eval/long_decode.py --table"

    def test_it_is_of_the_shipped_model_and_presets(self, result):
        assert result["weights"] == weights_sum(broken_models.healthy())
        configs = {name: KVQuantConfig.from_dict(config) for name, config in result["configs"].items()}
        # This model has no latent attention, where alone this field acts.
        configs = {name: replace(config, rotary_keys="keys") for name, config in configs.items()}
        presets = {name: KVQuantConfig.preset(name) for name in KVQuantConfig.preset_names()}
        assert configs == {name: replace(preset, rotary_keys="keys") for name, preset in presets.items()}
        assert result["length"] == broken_models.healthy().config.max_position_embeddings == 2048

    @pytest.mark.parametrize("how", long_decode.WRITTEN)
    def test_the_cache_was_read_from_the_first_to_the_last_token(self, result, how):
        assert result["positions"][0][0] == result["prompt"] + 1 and result["positions"][-1][1] == result["length"]
        for cache in result["caches"][how].values():
            assert len(cache["by_position"]) == len(result["positions"])
            assert min(cache["by_position"]) > 0


class TestScript:
    def test_its_figures_are_those_of_real_decode(self, tmp_path, capsys):
        out = tmp_path / "long.json"
        long_decode.main(["--length", "96", "--prompt", "40", "--documents", "2", "--presets", "int4-small",
                          "--out", str(out)])  # fmt: skip
        result = json.loads(out.read_text(encoding="utf-8"))
        assert capsys.readouterr().out.strip().endswith(long_decode.table(result))
        assert set(result["caches"]) == {"greedy", "sampled"}
        model = broken_models.healthy()
        prompts, _ = long_decode.windows(long_decode.AutoTokenizer.from_pretrained(long_decode.bundled_model()), 2, 40)
        ids = model.generate(prompts, max_new_tokens=56, do_sample=False, eos_token_id=None)
        with torch.no_grad():
            dense = model(ids).logits[:, 40:-1].double().log_softmax(-1)
        ours = score_by_decoding(model, ids, 40, "int4-small")[:, 40:-1].double().log_softmax(-1)
        kl = (dense.exp() * (dense - ours)).sum(-1)
        assert result["caches"]["greedy"]["int4-small"]["kl"]["mean"] == pytest.approx(kl.mean().item(), rel=1e-3)
        first, last, _ = long_decode.stretches(result)[0]
        cell = float(long_decode.table(result).splitlines()[-1].split(" | ")[1])
        assert cell == pytest.approx(1000 * kl[:, first - 41 : last - 40].mean().item(), rel=2e-2)

    def test_token_by_token_equals_one_pass(self):
        """Up to rounding, so what is scored in one pass elsewhere is real decode, too."""
        model, config = broken_models.healthy(), KVQuantConfig.preset("int4")
        documents = torch.randint(4096, (1, 150))
        candidates = [Decoded("decoded", config), Preset("scored", config)]
        found = compare(model, documents, candidates, Settings(30, greedy_tokens=0), {}, progress=False,
                        by_layer=False, weigh=False)["caches"]  # fmt: skip
        assert found["scored"]["kl"]["mean"] > 1e-5
        assert found["decoded"]["kl"]["mean"] == pytest.approx(found["scored"]["kl"]["mean"], rel=0.02)
        assert "bytes_per_element" not in found["decoded"]
