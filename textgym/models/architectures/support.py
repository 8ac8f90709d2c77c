"""check_supported: refuses models whose tokens textgym would not score exactly as they do themselves."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from textgym.models.architectures.attention import FULL, SLIDING, PackedStates
from textgym.models.architectures.encoder_decoder import EncoderDecoderRows, EncoderDecoderStates
from textgym.models.architectures.positions import changing_rope, position_limit
from textgym.models.decoding.cached_decoder import CachedDecoder
from textgym.models.decoding.encoder_decoder_cache import CachedEncoderDecoder

TRIED = 24
"""Tokens of the longest text that is tried when a model is loaded, unless it has a sliding window just beyond."""
LONGEST_WINDOW = 64
"""A window of at most so many tokens is tried when the model is loaded; longer ones by environments that reach them."""
SHORT = 3
"""Tokens of the shortest text that is tried."""
TOLERANCE = {torch.float32: 1e-3}
"""Of a difference, in standard deviations of the logits; other dtypes round more coarsely."""
INSTEAD = "use a model whose every layer is full or sliding-window attention, such as Llama, Qwen3, Gemma 3 or T5"


_passed: set[Hashable] = set()
"""Structures and lengths that have passed the trial in this process."""


def check_supported(lm: Any, head: Callable[[Tensor], Tensor], longest: int | None = None) -> None:
    """Tries a model on three texts: padded or packed, and from the cache, they must get the logits it gives them.

    One of the texts is as long as asked for, and a row of the cache restarts. Models of the same structure are tried
    once in a process.

    Args:
        lm: a causal language model or an encoder-decoder model of transformers.
        head: makes logits of its last hidden state.
        longest: tokens of the longest text; `None`: some, and beyond a short sliding window, as when a model is loaded.

    Raises:
        ValueError: what the model has that textgym does not reproduce, and what to use instead.
    """
    kind = type(lm).__name__
    reason = _known_reason(lm)
    if reason is not None:
        raise ValueError(f"{kind} {reason}")

    longest = _length_to_try(lm.config, longest)
    known = (_structure(lm), longest)
    if known in _passed:
        return
    try:
        with full_precision(lm.device):
            differences = (_try_encoder_decoder if lm.config.is_encoder_decoder else _try_causal)(lm, head, longest)
    except Exception as error:
        raise ValueError(
            f"{kind} does not take the explicit masks, positions or caches that textgym decodes with ({error}): "
            f"{INSTEAD}"
        ) from error
    for what, difference in differences.items():
        if not difference < TOLERANCE.get(lm.dtype, 0.3):
            raise ValueError(
                f"{kind} gives other logits {what} than by itself, by {difference:.2g} standard deviations, so its "
                f"log-probs would be wrong: {INSTEAD}"
            )
    _passed.add(known)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply matrices in the dtype that they have: no autocast, and no TF32, which rounds float32 to 10 bits."""
    backends: Any = torch.backends  # whose types leave parts out
    products = (backends.cuda.matmul, backends.mkldnn.matmul)
    newer = [product.fp32_precision for product in products]
    try:
        older: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses the older setting once the newer one was used
        older = None

    try:
        if older is None:
            for product in products:
                product.fp32_precision = "ieee"
        elif older != "highest":
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if older is None:
            for product, precision in zip(products, newer, strict=True):
                product.fp32_precision = precision
        elif older != "highest":
            torch.set_float32_matmul_precision(older)


def _known_reason(lm: Any) -> str | None:
    """Why a model cannot be decoded exactly, where its config says so."""
    config = lm.config
    kinds = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if getattr(lm, "_is_stateful", False):
        return f"keeps a recurrent state, which textgym can neither pad, pack nor restart: {INSTEAD}"
    if kinds:
        return f"has layers of kind {sorted(kinds)}; textgym decodes full and sliding-window attention: {INSTEAD}"
    if (rope := changing_rope(config)) is not None:
        return rope
    if _has_alibi(config):
        return f"adds ALiBi biases, which it counts from a mask of its own and not from position ids: {INSTEAD}"
    if config._attn_implementation not in ("eager", "sdpa"):
        return (
            f"runs {config._attn_implementation!r} attention, which ignores explicit masks: "
            "load it with attn_implementation='sdpa'"
        )
    own = [name for name in ("window_size", "attention_window", "attention_window_size") if hasattr(config, name)]
    own += ["block_sparse"] if getattr(config, "attention_type", None) == "block_sparse" else []
    own += [f"{name}.sliding_window" for name in ("decoder", "text_config") if _has_window(getattr(config, name, None))]
    if own:
        return f"has local attention that textgym gives no mask for ({own[0]}): {INSTEAD}"
    if getattr(config, "expert_capacity", None) is not None:
        return f"drops tokens where a batch sends too many to one expert, so texts are not scored alone: {INSTEAD}"
    return None


def _has_window(part: Any) -> bool:
    """Whether a part of a config, of a model inside another, has sliding windows."""
    return getattr(part, "sliding_window", None) is not None


def _has_alibi(config: Any) -> bool:
    inner = getattr(config, "attn_config", None)  # MPT's
    return config.model_type == "bloom" or any(getattr(source, "alibi", False) for source in (config, inner))


def _structure(lm: Any) -> Hashable:
    """What decides whether a model is decoded exactly: its modules and settings, and not its weights."""
    modules = tuple(type(module) for module in lm.modules())
    return modules, lm.config.model_type, lm.config.to_json_string(use_diff=False), lm.dtype, lm.device.type


def _length_to_try(config: Any, longest: int | None) -> int:
    """Tokens of the longest text to try: a few lengths in all, so that most environments find theirs tried."""
    window = getattr(config, "sliding_window", None) or 0
    wanted = max(TRIED, window + 4 if window <= LONGEST_WINDOW else 0)
    if longest is not None and longest > wanted:
        wanted = 2 ** (longest - 1).bit_length()
    limit = position_limit(config)
    return wanted if limit is None else min(wanted, limit)


@torch.no_grad()
def _try_causal(lm: Any, head: Callable[[Tensor], Tensor], longest: int) -> dict[str, float]:
    """How far the logits are off, in standard deviations, by how they were made."""
    half = max(1, longest // 2)
    short = min(SHORT, half)
    ids = _tokens(lm, longest)
    lengths = torch.tensor([longest, half, short], device=lm.device)
    expected = torch.stack([_own_logits(lm, ids[row, :size]) for row, size in _each(lengths)])  # (3, V)

    packed = head(PackedStates.whole(ids, lengths).hidden(lm))

    decoder = CachedDecoder(lm, len(lengths), longest)
    decoder.advance(ids, (lengths - 1).clamp(min=1))
    cached = head(decoder.advance(ids, lengths))

    # The longest row restarts with the beginning of the second text, and the others wait.
    restarted = head(decoder.advance(ids[[1, 1, 2]], lengths[[2, 1, 2]]))
    expected_then = torch.stack([_own_logits(lm, ids[1, :short]), expected[1], expected[2]])
    return {
        "packed beside others": _off(packed, expected),
        "from a cache": _off(cached, expected),
        "from a cache after a restart": _off(restarted, expected_then),
    }


def _own_logits(lm: Any, ids: Tensor) -> Tensor:
    """Logits `(V,)` that the model gives by itself after a text `(n,)`; those of all places may be too large."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(lm.forward).parameters else {}
    logits: Tensor = lm(input_ids=ids[None], use_cache=False, **last).logits[0, -1]
    return logits


@torch.no_grad()
def _try_encoder_decoder(lm: Any, head: Callable[[Tensor], Tensor], longest: int) -> dict[str, float]:
    prompts = torch.tensor([longest, max(1, longest // 2), min(SHORT, longest)], device=lm.device)
    rows = EncoderDecoderRows(_tokens(lm, longest), prompts, _tokens(lm, longest, 5), prompts.flip(0))
    expected = torch.cat(
        [
            lm(
                input_ids=rows.input_ids[i : i + 1, :n],
                decoder_input_ids=rows.decoder_input_ids[i : i + 1, : rows.decoder_lengths[i]],
                use_cache=False,
            ).logits[0, -1:]
            for i, n in _each(prompts)
        ]
    )
    padded = head(EncoderDecoderStates.whole(rows).hidden(lm))

    decoder = CachedEncoderDecoder(lm, len(prompts), *(x.shape[1] for x in (rows.input_ids, rows.decoder_input_ids)))
    decoder.advance(*rows._replace(decoder_lengths=(rows.decoder_lengths - 1).clamp(min=1)))
    cached = head(decoder.advance(*rows))

    # The first row restarts with the prompt and the response of the second one.
    others = torch.tensor([1, 1, 2], device=lm.device)
    restarted = head(decoder.advance(*(part[others] for part in rows)))
    return {
        "padded beside others": _off(padded, expected),
        "from a cache": _off(cached, expected),
        "from a cache after a restart": _off(restarted, expected[others]),
    }


def _tokens(lm: Any, width: int, first: int = 3) -> Tensor:
    """Different ids `(3, width)`, and one that pads, which a model must take for a token like any other."""
    vocab_size = lm.get_output_embeddings().weight.shape[0]
    ids = ((torch.arange(3 * width, device=lm.device) * 7 + first) % vocab_size).view(3, width)
    pad = getattr(lm.config, "pad_token_id", None)  # some configs have none
    if width > 1 and pad is not None and 0 <= pad < vocab_size:
        ids[:, 1] = pad
    return ids


def _each(lengths: Tensor) -> list[tuple[int, int]]:
    return list(enumerate(lengths.tolist()))


def _off(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).float().abs().max() / expected.float().std().clamp(min=1e-6))
