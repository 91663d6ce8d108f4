"""The seam to transformers: missing names are reported, and a cache arrives by every way of passing it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import families
import pytest
import torch
import transformers
from transformers import EncoderDecoderCache, PreTrainedTokenizerFast, pipeline

import hf_kvquant
from hf_kvquant import QuantizedCache, host

PACKAGE = Path(hf_kvquant.__file__).parent
TESTED = f"tested with transformers {host.OLDEST} to {host.NEWEST}"


def import_anew() -> None:
    """Import the seam again, as `import hf_kvquant` does first, without touching the module in use."""
    spec = importlib.util.find_spec("hf_kvquant.host")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def holders(need: host.Need) -> tuple[list[object], str]:
    """The last part of the name, and the objects that hold it: for an inherited name, each class that defines it."""
    module, _, names = need.path.partition(":")
    *outer, last = names.split(".")
    found = importlib.import_module(f"transformers.{module}")
    for name in outer:
        found = getattr(found, name)
    owners = found.__mro__ if isinstance(found, type) else [found, *type(found).__mro__]
    return [owner for owner in owners if last in vars(owner)], last


@pytest.mark.parametrize("need", host.NEEDS, ids=lambda need: need.path)
def test_a_missing_name_is_named(need, monkeypatch):
    owners, name = holders(need)
    try:
        for owner in owners:
            monkeypatch.delattr(owner, name)
    except (AttributeError, TypeError):
        # Members of enumerations and C types cannot be replaced, so the object that has them is.
        module, _, names = need.path.partition(":")
        monkeypatch.setattr(f"transformers.{module}.{names.split('.')[0]}", object())
    with pytest.raises(ImportError) as error:
        import_anew()
    message = str(error.value)
    assert f"transformers {transformers.__version__} has no {need.path.replace(':', '.')}" in message
    assert TESTED in message


@pytest.mark.parametrize("need", [n for n in host.NEEDS if n.parameters], ids=lambda need: need.path)
def test_a_renamed_parameter_is_named(need, monkeypatch):
    owners, name = holders(need)
    monkeypatch.setattr(owners[0], name, lambda anything=None: None)
    with pytest.raises(ImportError, match=re.escape(f"with the parameter {need.parameters[0]!r}")) as error:
        import_anew()
    assert TESTED in str(error.value)


def test_a_renamed_cache_is_named(monkeypatch):
    def prepare(self, input_ids, kv_store=None, **kwargs):
        """The signature that a later version may have."""

    monkeypatch.setattr(transformers.GenerationMixin, "prepare_inputs_for_generation", prepare)
    with pytest.raises(ImportError, match="prepare_inputs_for_generation with the parameter") as error:
        import_anew()
    assert TESTED in str(error.value)


def test_this_version_passes():
    import_anew()
    assert host.CACHE in ("cache", "past_key_values")


def sources() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file.name != "host.py"]


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_the_seam_knows_private_names_and_versions(file):
    """Other files may use public names of `transformers` itself, and names that users of generation import too."""
    public = {"transformers", "transformers.utils.logging", "transformers.generation.BaseStreamer"}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers":
            names = {node.module if node.module == "transformers" else f"{node.module}.{a.name}" for a in node.names}
            assert names <= public, ast.unparse(node)
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "transformers.__version__"
            private = node.attr.startswith(("_attn", "_supports", "_can_set"))
            assert not private or ast.unparse(node).startswith("self."), ast.unparse(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in host.CACHE_NAMES[1:], node.value


# --- every way of handing a cache over


def model_and_cache(name: str = "llama"):
    model = families.build(name)
    return model, QuantizedCache(model.config, "int8")


def decode(call, cache: QuantizedCache) -> None:
    """Feed a prompt and three tokens, each by `call(ids)`."""
    ids = families.prompt(1, 40)
    with torch.no_grad():
        call(ids[:, :37])
        for i in range(37, 40):
            call(ids[:, i : i + 1])
    assert cache.routes["decode_fused"] == 3 * len(cache.quantized_layers)
    assert cache.routes["decode_dequantized"] == 0


def keywords() -> list[str]:
    """The names that the installed version takes; if there are two, the old one is deprecated."""
    return ["past_key_values"] if host.CACHE == "past_key_values" else ["cache", "past_key_values"]


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
class TestHandingOver:
    @pytest.mark.parametrize("keyword", keywords())
    def test_by_keyword(self, keyword):
        model, cache = model_and_cache()
        with hf_kvquant.attention(model):
            decode(lambda ids: model(ids, **{keyword: cache}), cache)

    def test_by_position(self):
        model, cache = model_and_cache()
        with hf_kvquant.attention(model):
            decode(lambda ids: model(ids, None, None, cache), cache)

    def test_nested(self):
        model, cache = model_and_cache()

        class Outer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, ids, model_kwargs):
                return self.inner(ids, **model_kwargs["inputs"])

        outer = Outer()
        with hf_kvquant.attention(outer):
            decode(lambda ids: outer(ids, {"inputs": {host.CACHE: cache}}), cache)
        assert cache._unfinished is None

    def test_through_a_wrapper_that_takes_anything(self):
        """Adapters do this: the model is an attribute, and generate and forward pass their arguments on."""
        model, cache = model_and_cache()

        class Wrapper(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.base_model = model

            def forward(self, *args, **kwargs):
                return self.base_model(*args, **kwargs)

            def generate(self, *args, **kwargs):
                return self.base_model.generate(*args, **kwargs)

        wrapper = Wrapper()
        with hf_kvquant.attention(wrapper):
            decode(lambda ids: wrapper(ids, **{host.CACHE: cache}), cache)
        out = wrapper.generate(
            families.prompt(), cache_implementation="kvquant-int8", max_new_tokens=5, return_dict_in_generate=True
        )
        assert host.cache_of(out).routes["decode_fused"] == 2 * 4

    @pytest.mark.parametrize("keyword", keywords())
    def test_to_generate_and_again(self, keyword):
        model, cache = model_and_cache()
        ids = families.prompt()
        for turn in (1, 2):
            out = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
                                 **{keyword: cache})  # fmt: skip
            assert host.cache_of(out) is cache is getattr(out, keyword)
            ids = torch.cat([out.sequences, families.prompt(length=3)], dim=1)
            fused = (6 - 1) * 2 * turn + (turn - 1) * 2
            assert cache.routes["decode_fused"] == fused
            assert cache.routes["decode_dequantized"] == 0

    def test_inside_an_encoder_decoder_cache(self):
        model = families.build("t5")
        cache = QuantizedCache(model.config, "int8")
        both = EncoderDecoderCache(cache, transformers.DynamicCache(config=model.config))
        encoded = model.encoder(families.prompt(1, 20))
        with hf_kvquant.attention(model):
            decode(lambda ids: model(encoder_outputs=encoded, decoder_input_ids=ids, **{host.CACHE: both}), cache)

    def test_through_a_pipeline(self, tmp_path):
        model, cache = model_and_cache()
        tokenizer = pytest.importorskip("tokenizers")
        words = tokenizer.Tokenizer(tokenizer.models.WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
        words.pre_tokenizer = tokenizer.pre_tokenizers.Whitespace()
        generator = pipeline("text-generation", model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))
        generator("w5 w6 w7", max_new_tokens=5, do_sample=False, **{host.CACHE: cache})
        assert cache.routes["decode_fused"] == 2 * 4
        assert cache.routes["decode_dequantized"] == 0

    def test_a_cache_that_was_filled_outside_learns_inside(self):
        """One warning says what to do; inside the context nothing is de-quantized."""
        model, cache = model_and_cache()
        ids = families.prompt(1, 40)
        with torch.no_grad():
            model(ids[:, :37], **{host.CACHE: cache})
            with pytest.warns(UserWarning, match=r"outside of hf_kvquant.attention\(model\).*call the model inside"):
                model(ids[:, 37:38], **{host.CACHE: cache})
            with hf_kvquant.attention(model):
                model(ids[:, 38:39], **{host.CACHE: cache})
                assert cache.routes["decode_fused"] == 2
                assert all(layer.takes_states for layer in cache.quantized_layers)
                model(ids[:, 39:40], **{host.CACHE: cache})
        assert cache.routes["decode_fused"] == 2 * 2
        assert cache.routes["decode_dequantized"] == 2
