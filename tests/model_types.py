"""Which types of causal language models HFEngine and the trainer accept, and whether they compute them right.

    python tests/model_types.py [type ...] [--write docs/models.md]

For each type that transformers knows, this creates a tiny model with random parameters, samples from it with HFEngine,
scores sequences with the trainer's function, and compares all log-probs with the model's own forward pass. The check
that HFEngine runs when it loads a model is not used for that. A type that it accepts although its log-probs differ is
reported as wrong. Each type is examined in a separate process.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import random
import re
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from conftest import byte_tokenizer, complete
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from thor.engines import HFEngine, Request
from thor.training.scoring import score_tokens

VOCABULARY, LAYERS, HEADS, WIDTH = 260, 4, 4, 32
# The size of each attribute of a config, by the first pattern that its name matches. Windows and everything else that
# depends on a position are short, so that the sequences below exceed them.
SIZES = [
    (r"token_(id|index)$", 0),
    (r"vocab_size$", VOCABULARY),
    (r"original_max_position|floor_scale|n_floor", 16),
    (r"max_(position|source|target)|n_positions|n_ctx|max_seq|context_length", 512),
    (r"per_tok|top_k_experts|moe_topk|moe_k", 2),
    (r"n_group|topk_group|expert_group|n_shared_experts|num_shared|first_k_dense|num_dense_layers", 1),
    (r"shared_expert.*size|moe.*size", 32),
    (r"experts$|expert_num", 4),
    (r"kv_shared_layers", 2),
    (r"mtp|nextn", 0),
    (r"(key_value|kv|index.*)_heads|query_groups", 2),
    (r"(attention|num|n)_heads?$", HEADS),
    (r"lora_rank", 16),
    (r"qk_head_dim", 16),
    (r"head_dim|d_kv|kv_channels|rotary_dim|head_size", 8),
    (r"layers$|n_layer$|num_blocks", LAYERS),
    (r"intermediate|ffn|inner|mlp_dim|d_ff|dff|dim_ff|feed_forward_size", 64),
    (r"hidden_size|d_model|n_embd|emb\w*_(dim|size)|embed_proj_dim|hidden_dim|lru_width|output_embedding_size", WIDTH),
    (r"window|chunk_size$|chunk_length|block_size|local_attention$", 8),
    (r"state_size|d_state|conv_kernel", 4),
]
# Attributes that change nothing by default, although published models of some types use them.
FEATURES = {
    "sliding_window": 8,
    "use_sliding_window": True,
    "max_window_layers": 2,
    "clip_qkv": 0.5,
    "qk_layernorm": True,
    "use_qk_norm": True,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 5.0,
    "logits_scaling": 0.5,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.5,
    "lm_head_multiplier": 0.5,
}
# Attributes without a default that some models need.
REQUIRED = ("head_dim", "num_key_value_heads", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
REQUIRED += ("n_group", "topk_group", "pad_token_id")
# What some types need in addition.
SPECIAL = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 0.5}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 32]},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
}


INTRODUCTION = """# Models

HFEngine and the trainer run models of transformers with their own attention (`thor/attention.py`). Some models compute
something else with it: those with recurrent layers, with a bias of attention scores, or with logits that are scaled
after the output layer. Therefore every model is compared with its own forward pass: when it is loaded, for several
sequences in one row, as in training, and when HFEngine is created, for prefill and decoding with its KV cache. A model
that differs is refused, with one line that says why. vLLM and HTTP engines sample without this check, but training with
them needs it too.

The table shows the result for each type of causal language model in transformers. It was written by
`python tests/model_types.py --write docs/models.md`, which creates a tiny model of each type with random parameters,
samples from it, and compares the log-probs of sampling and training with those of the model's own forward pass.

- accepted: all log-probs are equal within 0.001.
- refused: the model cannot be loaded, for the reason in the last column.
- wrong: accepted, but the log-probs differ or sampling fails. There must be none.
- not built: transformers could not create or run the tiny model, so nothing is known.

The optional features are attributes that are off in the default config and that some published models set: sliding
windows, caps on logits, and multipliers of embeddings, residuals and logits. A published model may set others, such as
longrope, which is refused for every type. What counts is the check when it is loaded.
"""


def tiny_config(config_class: type[PreTrainedConfig], features: bool) -> PreTrainedConfig:
    """The default config of a class, with all sizes reduced. features: apply FEATURES."""
    default, changes = config_class(), {}
    for name, value in vars(default).items():
        size = next((size for pattern, size in SIZES if re.search(pattern, name)), None)
        if isinstance(value, PreTrainedConfig):
            changes[name] = tiny_config(type(value), features)
        elif name in FEATURES and features:
            changes[name] = FEATURES[name]
        elif name.endswith(("layer_types", "layers_block_type")) and value:
            kinds = list(dict.fromkeys(value))
            changes[name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
        elif name == "rope_parameters" and value:
            changes[name] = {k: 16 if k == "original_max_position_embeddings" else v for k, v in value.items()}
        elif name == "is_decoder":  # encoders are causal only then
            changes[name] = True
        elif size is not None and ((type(value) is int and (value > size or size == WIDTH)) or name in REQUIRED):
            changes[name] = size
    if "kv_lora_rank" in changes:  # latent attention has no grouped heads
        changes["num_key_value_heads"] = HEADS
    return config_class(**changes | SPECIAL.get(config_class.model_type, {}))


def tiny_model(model_type: str, features: bool = False) -> PreTrainedModel:
    """A model in which every parameter is random, also those that are 0 or 1 at first."""
    torch.manual_seed(0)
    config = tiny_config(CONFIG_MAPPING[model_type], features)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise, first = torch.randn_like(parameter) * 0.15, parameter.flatten()[0]
            if first != 0 and (parameter == first).all():  # a scale, some of which are tiny
                parameter.mul_(1 + noise)
            else:
                parameter.add_(noise)
    return model


def largest_difference(model: PreTrainedModel, plain: PreTrainedModel) -> float:
    """Between log-probs of HFEngine and of the trainer under `model`, and of the forward pass of its copy `plain`.

    Eight requests in five rows, half of them with a shared prefix, and a second turn that continues the first.
    """
    tokenizer, rng = byte_tokenizer(), random.Random(0)
    engine = HFEngine(model, tokenizer, max_rows=5, prefill_tokens=24, kv_tokens=4000)
    engine.eos = set()

    def random_ids(count: int) -> list[int]:
        return [rng.randrange(3, len(tokenizer)) for _ in range(count)]

    @torch.no_grad()
    def expected(ids: list[int]) -> torch.Tensor:
        logps = plain(torch.tensor([ids]), use_cache=False).logits[0].float().log_softmax(-1)
        return logps[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    prefix, differences = random_ids(25), []
    texts = [prefix * (i % 2) + random_ids(rng.randint(1, 40)) for i in range(8)]
    for turn in range(2):
        requests = [Request(str(i), x, 8, shared=25 * (i % 2), seed=8 * turn + i) for i, x in enumerate(texts)]
        completions = complete(engine, requests)
        for i, text in enumerate(texts):
            ids, logps = completions[str(i)].token_ids, completions[str(i)].logps
            differences.append(expected(text + ids)[-len(ids) :] - torch.tensor(logps))
            texts[i] = text + ids + random_ids(rng.randint(1, 9))
    with torch.no_grad():
        scores = score_tokens(model, texts, [list(range(1, len(text))) for text in texts], 1.0)
    differences.append(torch.cat([expected(text) for text in texts]) - scores.logp)
    return torch.cat(differences).abs().max().item()


def examine(model_type: str, features: bool = False) -> tuple[str, str]:
    """('accepted', '') | ('refused', reason) | ('wrong', what) | ('not built', error)."""
    try:
        model = tiny_model(model_type, features)
        plain = copy.deepcopy(model)
        logits = plain(torch.tensor([list(range(3, 60))]), use_cache=False).logits
        assert logits.isfinite().all(), "its logits are not finite"
    except Exception as error:
        return "not built", f"{type(error).__name__}: {error}"
    try:
        difference = largest_difference(model, plain)
    except ValueError as error:
        return "refused", str(error).partition(" is not supported: ")[2] or str(error)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    return ("accepted", "") if difference < 1e-3 else ("wrong", f"log-probs differ by {difference:.2g}")


def examine_in_process(model_type: str, features: bool, timeout: float = 1000) -> tuple[str, str]:
    """`examine` in a process that may crash or hang."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(examine(model_type, features)))
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(timeout) else ("wrong", f"no result after {timeout:.0f} s")
    except EOFError:
        return "wrong", "its process died"
    finally:
        process.kill()
        process.join()


def document(rows: list[tuple[str, str, str, str]]) -> str:
    """docs/models.md: what the table means, how many types have each result, and the table."""
    counts = Counter(status for _, status, _, _ in rows)
    lines = [
        INTRODUCTION,
        f"transformers {transformers.__version__}, {len(rows)} types with their default config: "
        + ", ".join(f"{count} {status}" for status, count in counts.most_common())
        + (".\n" if counts["wrong"] else ", none wrong.\n"),
        "| type | default config | with optional features | reason |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="default: all that transformers knows")
    parser.add_argument("--write", type=Path, help="file for the table")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for model_type in args.types or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        (status, reason), (featured, more) = (examine_in_process(model_type, features) for features in (False, True))
        rows.append((model_type, status, featured, textwrap.shorten(reason or more, 160)))
        print(*rows[-1], sep=" | ", flush=True)
    print(Counter((status, featured) for _, status, featured, _ in rows))
    if args.write:
        args.write.write_text(document(rows))


if __name__ == "__main__":
    main()
