"""Learned rewards: `RewardModel`, and `train_reward_model`, which trains one on preference pairs.

A reward model is a transformers sequence classifier with one label. Its score is read at the last real token of
prompt + completion, found by length and never by comparing ids with the pad token.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, TrainerCallback
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import cached_file

from textgym.data.files import atomic_folder
from textgym.models.loading import ASSETS, Device, disable_dropout, freeze, load_classifier, load_tokenizer, quiet
from textgym.rewards.last_token import LastTokenScorer, batches_by_length, pad_right, score_head
from textgym.rewards.pairwise import RewardModelConfig, fit, pairwise_loss

__all__ = ["RewardModel", "RewardModelConfig", "pairwise_accuracy", "pairwise_loss", "train_reward_model"]

SETTINGS_FILE = "reward_model.json"
TINY = ASSETS / "tiny_reward"


class RewardModel:
    """A reward function that is a trained sequence classifier: `gain * score + bias` of prompt + completion.

    The text is closed by exactly one EOS, whether the completion ended by itself or by length; what follows an EOS of
    the completion is cut off. Texts longer than `max_length` lose their beginning.

    Args:
        model: one-label classifier of transformers; it is frozen, its dropout removed.
        tokenizer: the model's own.
        gain: factor on the raw score.
        bias: added to the score after `gain`.
        append_eos: whether the texts it was trained on were closed by EOS.
        batch_size: texts scored at once.
        max_length: tokens of prompt + completion + EOS that are read, at most what the model has positions for.

    Raises:
        ValueError: a model with another number of labels, or `append_eos` with a tokenizer that has no EOS.
    """

    __name__ = "reward_model"  # what metrics call it, as they do a function

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        *,
        gain: float = 1.0,
        bias: float = 0.0,
        append_eos: bool = True,
        batch_size: int = 64,
        max_length: int = 512,
    ) -> None:
        if model.config.num_labels != 1:
            raise ValueError(f"a reward model has one label, this one has {model.config.num_labels}: set num_labels=1")
        if append_eos and tokenizer.eos_token_id is None:
            raise ValueError("the reward model's tokenizer has no EOS token: pass append_eos=False")
        self.model = freeze(disable_dropout(model))
        self.scorer = LastTokenScorer(self.model)
        self.tokenizer = tokenizer
        self.gain, self.bias = gain, bias
        self.append_eos = append_eos
        self.batch_size = batch_size
        self.max_length = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
        self.shared_ids: bool | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
    ) -> RewardModel:
        """A saved reward model: `"tiny"` (embedded), a folder, or a hub id of a one-label classifier.

        Raises:
            ValueError: unknown name, or a model whose reward head was never trained.
        """
        path = str(TINY) if name_or_path == "tiny" else str(name_or_path)
        model = load_classifier(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        _restore_head(model, path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        file = cached_file(path, SETTINGS_FILE, _raise_exceptions_for_missing_entries=False)
        default = {"append_eos": score_head(model) is not None and tokenizer.eos_token_id is not None}
        return cls(model, tokenizer, **(json.loads(Path(file).read_text()) if file else default))

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        *,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """One score for each completion.

        Ids are read in place of the texts if `share_ids_with` found the policy's tokenizer to be this model's own,
        because encoding the decoded text again need not give them back (trap 34).
        """
        if self.shared_ids and prompt_ids is not None and completion_ids is not None:
            pairs = zip(prompt_ids, completion_ids, strict=True)
            rows = [self._closed([*prompt, *_before(completion, self._eos)]) for prompt, completion in pairs]
        else:
            eos = self.tokenizer.eos_token
            ends = [completion.split(eos)[0] if eos else completion for completion in completions]
            rows = self.encode([prompt + end for prompt, end in zip(prompts, ends, strict=True)])
        scores: list[float] = self.score_rows(rows).tolist()
        return scores

    def share_ids_with(self, tokenizer: Tokenizer) -> bool:
        """Tells the model of a policy's tokenizer; returns whether it gives the same ids as the model's own.

        Ids are passed through only while all tokenizers it was told of do: one model may score for several policies.
        """
        same = score_head(self.model) is not None and _encodes_alike(tokenizer, self.tokenizer)
        self.shared_ids = same and self.shared_ids is not False
        return same

    @torch.no_grad()
    def score(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Scores of rows of ids as they are, without closing them.

        Args:
            input_ids: `(B, T)` ids on the model's device; row i holds `lengths[i]` real tokens, then anything.
            lengths: `(B,)`, at least 1.

        Returns:
            `(B,)` float32 on the model's device.
        """
        return self.gain * self.scorer(input_ids, lengths).last + self.bias

    def score_texts(self, texts: Sequence[str]) -> Tensor:
        """Scores `(N,)` of whole texts, each prompt + completion."""
        return self.score_rows(self.encode(texts))

    def score_rows(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Scores `(N,)` of lists of ids, sorted by length into batches so that little padding is computed."""
        scores = torch.empty(len(rows), device=self.device)
        for batch in batches_by_length(rows, self.batch_size):
            input_ids, lengths = pad_right([rows[index] for index in batch])
            scores[batch] = self.score(input_ids.to(self.device), lengths.to(self.device))
        return scores

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of whole texts, cut to `max_length` and closed by EOS, as the model reads them."""
        if not texts:
            return []
        if score_head(self.model) is None:  # encoders: their tokenizer knows where its special tokens go
            encoded: list[list[int]] = self.tokenizer(
                list(texts), truncation=True, max_length=self.max_length
            ).input_ids
            return encoded
        return [self._closed(ids) for ids in self.tokenizer(list(texts)).input_ids]

    def calibrate(self, texts: Sequence[str]) -> RewardModel:
        """Sets `gain` and `bias` such that the scores of these texts have mean 0 and deviation 1; returns itself.

        Ziegler et al. 2019 normalise on samples of the reference model, so that the reward's scale, and with it the
        meaning of the KL coefficient, does not depend on how the model was trained.

        Raises:
            ValueError: texts that all score the same.
        """
        scores = self.score_texts(texts).double()
        deviation = scores.std(correction=0).item() if len(texts) else 0.0
        if not deviation > 1e-8:
            raise ValueError(f"cannot calibrate: the {len(texts)} texts all score the same, give different ones")
        self.gain, self.bias = self.gain / deviation, (self.bias - scores.mean().item()) / deviation
        return self

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes a transformers folder (safetensors and tokenizer) plus gain, bias and how texts are read.

        Raises:
            OSError: the folder could not be written; nothing of it is left, and what stood there before still does.
        """
        settings = {
            "gain": self.gain,
            "bias": self.bias,
            "append_eos": self.append_eos,
            "max_length": self.max_length,
        }
        with atomic_folder(folder) as temporary, quiet():
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            (temporary / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        device: torch.device = self.model.device
        return device

    @property
    def _eos(self) -> int | None:
        return self.tokenizer.eos_token_id

    def _closed(self, ids: list[int]) -> list[int]:
        """The last `max_length` tokens, closed by exactly one EOS if the model was trained so."""
        ids = ids[:-1] if ids and ids[-1] == self._eos else ids
        ending = [self._eos] if self.append_eos and self._eos is not None else []
        closed = ids[-(self.max_length - len(ending)) :] + ending
        if not closed:
            raise ValueError("there is an empty text, which has no last token to read a score from")
        return closed


def train_reward_model(
    preferences: Sequence[Mapping[str, Any]],
    base: str | os.PathLike[str] = "tiny",
    *,
    config: RewardModelConfig | None = None,
    heldout: Sequence[Mapping[str, Any]] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[RewardModel, float]:
    """Trains a reward model on preference pairs with `transformers.Trainer`; quiet, and it leaves no files.

    Pairs of one `group` (or else of one `prompt`) are trained on as one element of a batch, in which each text is
    encoded once however many pairs it stands in (Ouyang et al. 2022, section 3.5).

    Args:
        preferences: dicts with `chosen` and `rejected`, and where they exist `prompt` (put before both), `margin` and
            `group`.
        base: the language model or classifier to start from, as `load_classifier` knows it.
        heldout: pairs to measure accuracy on; `None` holds out a share of the groups.
        callbacks: of transformers, for progress; the trainer itself prints nothing.

    Returns:
        The reward model, frozen, and its accuracy on the held-out pairs (NaN if there are none).

    Raises:
        ValueError: no pairs, or a pair without `chosen` or `rejected`.
    """
    config = config or RewardModelConfig()
    groups = _grouped(preferences)
    if heldout is None:
        random.Random(config.seed).shuffle(groups)
        num_heldout = min(math.ceil(config.heldout_fraction * len(groups)), len(groups) - 1)
        heldout = [pair for group in groups[:num_heldout] for pair in group]
        groups = groups[num_heldout:]
    with _seeded(config.seed), _torch_threads(config.num_threads):
        tokenizer = load_tokenizer(base)
        model = load_classifier(base, num_layers=config.num_layers)
        model.config.pad_token_id = tokenizer.pad_token_id
        reward_model = RewardModel(model, tokenizer, max_length=config.max_length)
        model.requires_grad_(True)
        fit(reward_model.scorer, groups, reward_model.encode, config, callbacks)
        reward_model.scorer = LastTokenScorer(freeze(model))  # without the wrapping that accelerate put on
        return reward_model, pairwise_accuracy(reward_model, heldout) if heldout else math.nan


def pairwise_accuracy(reward: Callable[..., Any], pairs: Sequence[Mapping[str, Any]]) -> float:
    """Share of pairs whose `chosen` text a reward function scores above the `rejected` one; a tie counts one half.

    Each text is scored once, however many pairs it stands in.
    """
    keys = [[(pair.get("prompt", ""), pair[side]) for pair in pairs] for side in ("chosen", "rejected")]
    texts = list(dict.fromkeys(keys[0] + keys[1]))
    scores = reward(prompts=[prompt for prompt, _ in texts], completions=[completion for _, completion in texts])
    score_of = dict(zip(texts, scores, strict=True))
    differences = np.array([score_of[chosen] - score_of[rejected] for chosen, rejected in zip(*keys, strict=True)])
    return float(np.mean((differences > 0) + 0.5 * (differences == 0)))


def _grouped(preferences: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for index, pair in enumerate(preferences):
        if "chosen" not in pair or "rejected" not in pair:
            raise ValueError(f"preference {index} has the keys {sorted(pair)}: it needs 'chosen' and 'rejected'")
        groups.setdefault(pair.get("group", pair.get("prompt", ("pair", index))), []).append(pair)
    if not groups:
        raise ValueError("there are no preferences to train on: give at least one pair of 'chosen' and 'rejected'")
    return list(groups.values())


def _before(ids: Sequence[int], stop: int | None) -> list[int]:
    """The ids before the first `stop`."""
    ids = list(ids)
    return ids[: ids.index(stop)] if stop is not None and stop in ids else ids


def _encodes_alike(first: Tokenizer, second: Tokenizer) -> bool:
    if first is second:
        return True
    probe = "Does it add a BOS, and merge alike?"
    same_tokens = first.eos_token_id == second.eos_token_id and first.get_vocab() == second.get_vocab()
    return same_tokens and first(probe).input_ids == second(probe).input_ids


def _restore_head(model: PreTrainedModel, path: str) -> None:
    """Takes over what `AutoModelForSequenceClassification` ignores: the bias of a head (trap 29), or its absence.

    Raises:
        ValueError: a checkpoint without a reward head, which transformers replaces by a random one.
    """
    head = score_head(model)
    if head is None:
        return
    found: dict[str, Tensor] = {}
    for file in Path(str(cached_file(path, "config.json"))).parent.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {key: tensors.get_tensor(key) for key in {"score.weight", "score.bias"} & set(tensors.keys())}
    if "score.weight" not in found:
        raise ValueError(f"{path} has no trained reward head: train one with train_reward_model(preferences, {path!r})")
    if "score.bias" in found:
        head.bias = nn.Parameter(found["score.bias"].to(head.weight), requires_grad=False)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the global generators, which `Trainer` does too, and puts them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  (others' generators, kept for them)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
