"""One small tokenizer of each kind that language models use, all with the same special and added tokens.

Each has the special tokens <s>, </s> and <|im_start|>, the added (not special) tokens <think> and </think>, and puts
<s> before a text where it adds special tokens.
"""

from __future__ import annotations

from conftest import CHAT
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

TEXT = "".join(map(chr, range(32, 127))) + "\n"
SPECIAL, ADDED = ("<s>", "</s>", "<|im_start|>"), ("<think>", "</think>")
CONTROL = SPECIAL + ADDED


def finish(backend: Tokenizer, **special) -> PreTrainedTokenizerFast:
    """Add the common tokens, and wrap the backend as a Hugging Face tokenizer."""
    backend.add_special_tokens(list(SPECIAL))
    backend.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    bos = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, bos)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **special)
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    return tokenizer


def byte_level(**special) -> PreTrainedTokenizerFast:
    """Llama 3, Qwen: BPE over bytes, here with merges for common words."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in ("think", "Ġis", "```", "boxed", "42"):
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return finish(backend, **special)


def unknown_is_eos() -> PreTrainedTokenizerFast:
    """GPT-2: the unknown token, which bytes never need, is the EOS."""
    return byte_level(unk_token="</s>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """Llama 2, Mistral: BPE over characters, with bytes for the rest, and a space before the text."""
    vocab = {"<unk>": 0} | {token: i for i, token in enumerate((*SPECIAL, *ADDED), 1)}
    for piece in (
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *TEXT.strip(),
        "th",
        "▁th",
        "</",
        "</s",
        "s>",
        "</s>",
    ):
        vocab.setdefault(piece, len(vocab))
    merges = [("t", "h"), ("▁", "th"), ("<", "/"), ("</", "s"), ("</s", ">")]  # the merges spell </s>
    backend = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    return finish(backend, unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """T5, XGLM: Unigram, whose vocabulary contains the special tokens."""
    pieces = [("<unk>", 0.0), *((token, -1.0) for token in SPECIAL), ("▁", -2.0), ("▁the", -3.0)]
    pieces += [(char, -4.0) for char in TEXT if char.strip()] + [("\n", -4.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return finish(backend, unk_token="<unk>")


def word_level() -> PreTrainedTokenizerFast:
    """Whole words, among them the special tokens; single characters are words too."""
    words = ["<unk>", *CONTROL, *TEXT, *("What", "is", "the", "sum", "so")]
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    backend.decoder = decoders.Fuse()
    return finish(backend, unk_token="<unk>")


def slow() -> ByT5Tokenizer:
    """A tokenizer in Python, without a backend. It adds no BOS."""
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(list(ADDED))
    tokenizer.chat_template = CHAT
    return tokenizer


ZOO = {maker.__name__: maker() for maker in (byte_level, unknown_is_eos, byte_fallback, unigram, word_level, slow)}
