"""A model is accepted only if sampling and training give the log-probs of its own forward pass."""

import pytest
import torch
from conftest import tiny_llama, tiny_model
from model_types import examine
from model_types import tiny_model as model_of_type
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from thor.attention import UnsupportedModelError, causal_sdpa, use_layout_attention
from thor.engines import HFEngine
from thor.engines.kv_cache import CacheLayout

COMMON = ["gemma3_text", "gpt2", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe"]
# Several calls of attention per layer, keys and values of different sizes, one key head, sizes that differ by layer.
UNUSUAL = ["diffllama", "hrm_text", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "gpt_bigcode", "gemma4_text"]
REFUSED = {
    "bart": "several sequences in one row, its logits would differ",  # it ignores positions
    "bloom": "only 0 of its 2 layers use attention that can be replaced",
    "cohere": "it changes the logits after its output layer",
    "doge": "its attention receives a mask that the model creates",
    "gemma2": "its attention uses softcap",
    "gpt_oss": "its attention uses s_aux",
    "llama4_text": "layers of type chunked_attention",
    "mamba": "",
    "phimoe": "several sequences in one row, its logits would differ",  # its window is only in its mask
    "stablelm": "its attention receives no `layout`",
}


def examine_known(model_type: str, features: bool = False) -> tuple[str, str]:
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip("this version of transformers does not have this type")
    return examine(model_type, features)


@pytest.mark.parametrize("model_type", COMMON)
def test_common_types_are_accepted_and_right(model_type):
    assert examine_known(model_type) == ("accepted", "")


@pytest.mark.parametrize("model_type", ["mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe"])
def test_sliding_windows_are_accepted_and_right(model_type):
    """Windows of 8 tokens, in half of the layers of some types."""
    assert examine_known(model_type, features=True) == ("accepted", "")


@pytest.mark.parametrize("model_type", UNUSUAL)
def test_unusual_types_are_right_or_refused(model_type):
    """Their code differs between versions of transformers."""
    status, reason = examine_known(model_type)
    assert status == "accepted" or (status == "refused" and reason)


@pytest.mark.parametrize("model_type", REFUSED)
def test_refusals_say_what_differs(model_type):
    status, reason = examine_known(model_type, features=model_type == "phimoe")
    assert status == "refused" and REFUSED[model_type] in reason and "\n" not in reason


@pytest.mark.parametrize("model_type", ["bart", "gemma2", "phimoe"])
def test_a_refused_model_is_left_as_it_was(model_type):
    model = model_of_type(model_type, features=True).train()
    before = model(torch.tensor([[5, 6, 7]]), use_cache=False).logits
    for _ in range(2):
        with pytest.raises(UnsupportedModelError, match=type(model).__name__):
            use_layout_attention(model)
    assert model.training and model.config.get_text_config()._attn_implementation == "eager"
    torch.manual_seed(0)
    assert model.eval()(torch.tensor([[5, 6, 7]]), use_cache=False).logits.shape == before.shape


def test_windows_longer_than_the_check_are_tested():
    """The window of 100 tokens is shortened for the check, which has shorter sequences, and then restored."""
    model = model_of_type("phimoe")
    model.config.sliding_window = 100
    with pytest.raises(UnsupportedModelError, match="differ"):
        use_layout_attention(model)
    assert model.config.sliding_window == 100
    model.config.sliding_window = model.config.max_position_embeddings  # no sequence is longer
    use_layout_attention(model)


# What could be wrong in an engine: patches of the class CacheLayout or the module kv_cache.
decode, masks = CacheLayout._decode, CacheLayout._masks


def without_prefix(layout, window):
    own, prefix = masks(layout, window)
    return own, None if prefix is None else torch.ones_like(prefix)


def previous_row_only(layout, window):
    own, prefix = masks(layout, window)
    return own.roll(1, 0), prefix


FAULTS = {
    "decode without windows": ("CacheLayout._decode", lambda layout, *args: decode(layout, *args[:-1], None)),
    "decode without prefixes": ("CacheLayout._masks", without_prefix),
    "decode with the length of another row": ("CacheLayout._masks", previous_row_only),
    "prefill without windows": ("causal_sdpa", lambda q, k, v, scaling, window: causal_sdpa(q, k, v, scaling)),
    "prefill without prefixes": (
        "causal_sdpa",
        lambda q, k, v, scaling, window: causal_sdpa(q, k[:, -q.shape[1] :], v[:, -q.shape[1] :], scaling, window),
    ),
    "another scale": ("CacheLayout._decode", lambda layout, c, q, k, scaling, w: decode(layout, c, q, k, 1.0, w)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_the_load_check_finds_faults_of_the_cache(tokenizer, monkeypatch, family, fault):
    name, replacement = FAULTS[fault]
    HFEngine(tiny_model(family, tokenizer), tokenizer)
    monkeypatch.setattr(f"thor.engines.kv_cache.{name}", replacement)
    with pytest.raises(UnsupportedModelError, match="with its KV cache, its logits would differ"):
        HFEngine(tiny_model(family, tokenizer), tokenizer)


def test_the_load_check_changes_nothing(tokenizer):
    """Neither weights, nor windows, nor training mode, and no slot of the engine's cache is used."""
    model = tiny_model("mistral", tokenizer, sliding_window=1000).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    engine = HFEngine(model, tokenizer)
    assert model.training and model.config.sliding_window == 1000
    assert not engine.rows.items and not engine.prefixes.items
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None and not p.is_inference() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_half_precision_is_accepted(tokenizer, dtype):
    HFEngine(tiny_llama(tokenizer).to(dtype), tokenizer)
