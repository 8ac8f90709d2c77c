"""Small tokenizers of the kinds that differ in spaces, bytes and special tokens, trained in memory.

The table of `docs/compatibility.md` has them beside large ones; use them to test code of your own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "This film is a joy. The actors are good, and so is the music.",
    "This film is a bore. The plot is a mess, isn't it? No. Yes! It is.",
    "user: What is a film? assistant: It is a story. system: Be brief.",
    '2 + 2 = 4 and 10 - 3 = 7. (So it is, they say; "well" - or not.)\n\nThe end.',
] * 8
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


@lru_cache(maxsize=1)
def sentencepiece() -> Any:
    """As Llama 2 and Mistral v1: a space in front of the first word, bytes for unknown characters, and BOS."""
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    # Bytes are trained as special tokens, so that they come first; in the tokenizer they are ordinary ones.
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    )
    model = models.BPE(**_saved(backend), byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    fresh = Tokenizer(model)
    fresh.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    fresh.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fresh.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fresh, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=INSTRUCT
    )


@lru_cache(maxsize=1)
def unigram() -> Any:
    """As T5: sentencepiece's unigram model, which appends EOS."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@lru_cache(maxsize=1)
def word_piece() -> Any:
    """As BERT: lower case, no spaces in tokens, `[CLS]` and `[SEP]` around a text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", eos_token="[SEP]"
    )


@lru_cache(maxsize=1)
def byte_level() -> Any:
    """As Qwen: byte-level BPE without BOS, with the special tokens of ChatML."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


@lru_cache(maxsize=1)
def gpt2_prefix_space() -> Any:
    """`GPT2Tokenizer` that puts a space in front of a text."""
    return transformers.GPT2Tokenizer(**_bpe(byte_level()), add_prefix_space=True)


@lru_cache(maxsize=1)
def roberta() -> Any:
    """`RobertaTokenizer`: byte-level BPE with `<s>` and `</s>` around a text."""
    parts = _bpe(byte_level())
    special = ["<s>", "</s>", "<pad>", "<unk>", "<mask>"]
    parts["vocab"] |= {token: len(parts["vocab"]) + index for index, token in enumerate(special)}
    return transformers.RobertaTokenizer(**parts)


@lru_cache(maxsize=1)
def qwen2() -> Any:
    """`Qwen2Tokenizer`: byte-level BPE with normalisation, and ChatML's tokens added to the vocabulary."""
    tokenizer = transformers.Qwen2Tokenizer(**_bpe(byte_level()))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHATML
    return tokenizer


@lru_cache(maxsize=1)
def llama() -> Any:
    """`LlamaTokenizer`: sentencepiece BPE with BOS."""
    tokenizer = transformers.LlamaTokenizer(**_bpe(sentencepiece()), add_bos_token=True)
    tokenizer.chat_template = INSTRUCT
    return tokenizer


@lru_cache(maxsize=1)
def gemma() -> Any:
    """`GemmaTokenizer`: sentencepiece BPE without a space in front."""
    parts = _bpe(sentencepiece())
    special = ["<pad>", "<bos>", "<eos>", "<mask>"]
    parts["vocab"] |= {token: len(parts["vocab"]) + index for index, token in enumerate(special)}
    return transformers.GemmaTokenizer(**parts)


@lru_cache(maxsize=1)
def t5() -> Any:
    """`T5Tokenizer`: sentencepiece unigram, which appends EOS."""
    pieces = json.loads(unigram().backend_tokenizer.to_str())["model"]["vocab"]
    return transformers.T5Tokenizer(vocab=[tuple(piece) for piece in pieces], extra_ids=4)


@lru_cache(maxsize=1)
def bert() -> Any:
    """`BertTokenizer`: WordPiece; `[SEP]` serves as EOS."""
    vocabulary = json.loads(word_piece().backend_tokenizer.to_str())["model"]["vocab"]
    tokenizer = transformers.BertTokenizer(vocab=vocabulary)
    tokenizer.eos_token = "[SEP]"
    return tokenizer


@lru_cache(maxsize=1)
def byt5() -> Any:
    """`ByT5Tokenizer`: the bytes of a text, without the `tokenizers` library; it appends EOS."""
    return transformers.ByT5Tokenizer()


@lru_cache(maxsize=1)
def characters() -> Any:
    """One token a character, in a tokenizer of the `tokenizers` library."""
    letters = sorted({letter for text in CORPUS for letter in text})
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<eos>", "<pad>", *letters])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )


SMALL: dict[str, Callable[[], Any]] = {
    "byte-level BPE with ChatML": byte_level,
    "characters": characters,
    "sentencepiece BPE with BOS": sentencepiece,
    "sentencepiece unigram": unigram,
    "WordPiece": word_piece,
    "BertTokenizer": bert,
    "ByT5Tokenizer": byt5,
    "GemmaTokenizer": gemma,
    "GPT2Tokenizer with prefix space": gpt2_prefix_space,
    "LlamaTokenizer": llama,
    "Qwen2Tokenizer with added tokens": qwen2,
    "RobertaTokenizer": roberta,
    "T5Tokenizer": t5,
}


def _bpe(tokenizer: Any) -> dict[str, Any]:
    return _saved(tokenizer.backend_tokenizer)


def _saved(backend: Tokenizer) -> dict[str, Any]:
    """Vocabulary and merges of a trained BPE model."""
    model = json.loads(backend.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}
