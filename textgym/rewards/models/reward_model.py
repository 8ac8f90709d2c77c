"""RewardModel: a trained sequence classifier as a reward function."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import cached_file

from textgym.data.encoding import cut_beginning, encode
from textgym.data.files import atomic_folder
from textgym.data.manifests import MANIFEST, checked_manifest
from textgym.data.messages import Messages, Text, check_characters, has_chat_template
from textgym.data.special_tokens import control_tokens, frame, framed, spells
from textgym.errors import ConfigError
from textgym.models.architectures.attention import MAX_PADDING, batches_by_length
from textgym.models.loading import ASSETS, disable_dropout, freeze, load_classifier, quiet
from textgym.models.machine.devices import Device, check_fork, resolve_device
from textgym.models.machine.transfer import to_device
from textgym.rewards.models.last_token import LastTokenScorer, pad_right, score_head
from textgym.settings import Count, from_plain

SETTINGS_FILE = "reward_model.json"
REWARD_MODEL = "textgym reward model"
"""Kind of the folders in their manifest."""
TINY = ASSETS / "tiny_reward"


@dataclass(frozen=True)
class RewardModelSettings:
    """The arguments of `RewardModel` that are plain values; all but `batch_size` are saved beside the weights."""

    gain: float = 1.0
    bias: float = 0.0
    append_eos: bool = True
    max_length: Count = 512
    label: int | str | None = None
    output: Literal["logit", "probability"] = "logit"
    include_prompt: bool = True
    chat: bool = False
    batch_size: Count = 64


class RewardModel:
    """A reward function that uses a trained sequence classifier: `gain * score + bias` of prompt + completion.

    The score is read at the last real token. The model reads a completion without the stop token or stop string that
    ended it, and then exactly one EOS; anything after an EOS in the completion is cut off. This is so for completions
    that ended at the length limit, too, and whichever tokenizer the policy has. Texts longer than `max_length` lose
    their beginning, but not their BOS. Conversations are rendered with the chat template of the model's tokenizer.

    Args:
        model: Sequence classifier of transformers. It is frozen and its dropout is turned off.
        tokenizer: The tokenizer of the model.
        gain: Factor of the raw score.
        bias: Added to the score after multiplying by `gain`.
        append_eos: Whether texts end with EOS, as those that the model was trained on.
        batch_size: Number of texts that are scored at once.
        max_length: Maximum number of tokens of prompt + completion + EOS, limited by the positions of the model.
        label: Which label of a classifier to use if there are several, by index or by its name in the model's config.
        output: `"logit"`, or `"probability"` of the label: a softmax over labels, or a sigmoid for one label and for
            multi-label classifiers.
        include_prompt: Whether the model reads the prompt as well as the completion.
        chat: Whether to render plain texts as a conversation, with the prompt as the user's turn and the completion as
            the assistant's.

    Raises:
        ValueError: If there are several labels and `label` is not given, if the model does not have the label, or if
            `append_eos` is set and the tokenizer has no EOS.
    """

    __name__ = "reward_model"  # its name in metrics, which for functions is their __name__

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
        label: int | str | None = None,
        output: Literal["logit", "probability"] = "logit",
        include_prompt: bool = True,
        chat: bool = False,
    ) -> None:
        if append_eos and tokenizer.eos_token_id is None:
            raise ValueError("the reward model's tokenizer has no EOS token: pass append_eos=False")
        given = {"gain": gain, "bias": bias, "append_eos": append_eos, "max_length": max_length, "label": label}
        given |= {"output": output, "include_prompt": include_prompt, "chat": chat, "batch_size": batch_size}
        settings = from_plain(RewardModelSettings, given, "RewardModel")
        if append_eos and settings.max_length < 2:
            raise ConfigError(f"max_length must be at least 2, a token and EOS, got {max_length}")
        self.label = _label_index(model, label)
        self.model = freeze(disable_dropout(model))
        self.scorer = LastTokenScorer(self.model)
        self.tokenizer = tokenizer
        self.gain, self.bias = settings.gain, settings.bias
        self.append_eos = append_eos
        self.batch_size = settings.batch_size
        self.max_length = min(max_length, getattr(model.config, "max_position_embeddings", None) or max_length)
        self.output, self.include_prompt, self.chat = output, include_prompt, chat
        self.shared_ids: bool | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        device: Device = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> RewardModel:
        """Load a trained reward model.

        Args:
            name_or_path: `"tiny"` (the embedded one), a folder, or the hub id of any sequence classifier.
            device: Device of the model.
            dtype: Data type of its weights, such as `torch.bfloat16`; the score is computed in float32.
            trust_remote_code: Whether to run code that comes with the model.
            settings: Arguments of the constructor, which override those saved with the model. If no settings were
                saved, `append_eos` is true for decoders without a chat template.

        Raises:
            ValueError: If the name is unknown, or the head of the model was never trained.
        """
        path = str(TINY) if name_or_path == "tiny" else str(name_or_path)
        if (Path(path) / MANIFEST).exists():
            checked_manifest(Path(path), REWARD_MODEL)
        model = load_classifier(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code, trained=True)
        _restore_bias(model, path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        file = cached_file(path, SETTINGS_FILE, _raise_exceptions_for_missing_entries=False)
        plain = score_head(model) is not None and not has_chat_template(tokenizer)
        saved = json.loads(Path(file).read_text()) if file else {"append_eos": plain and bool(tokenizer.eos_token)}
        from_plain(RewardModelSettings, saved, f"{SETTINGS_FILE} of {path}")
        return cls(model, tokenizer, **{**saved, **settings})

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        text_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Return one score per completion.

        If the policy has the same tokenizer (see `share_ids_with`), the model reads ids instead of texts, because
        decoding and encoding again can change the ids: `text_ids`, or else `completion_ids` up to EOS.
        """
        # The ids of a conversation follow the policy's chat template, which may differ from this model's.
        plain = all(isinstance(prompt, str) for prompt in prompts)
        said = completion_ids if text_ids is None else text_ids
        if self.shared_ids and plain and prompt_ids is not None and said is not None:
            before, _ = frame(self.tokenizer)
            rows = [
                self._closed(
                    framed([*(prompt if self.include_prompt else ()), *_before(ids, self._eos)], before),
                    self.max_length,
                )
                for prompt, ids in zip(prompt_ids, said, strict=True)
            ]
        else:
            texts = [self.text(prompt, end) for prompt, end in zip(prompts, completions, strict=True)]
            rows = self.encode(texts)
        scores: list[float] = self.score_rows(rows).tolist()
        return scores

    def text(self, prompt: Text, completion: Text) -> Text:
        """Return what the model reads of a prompt and its completion: the text up to EOS, or the conversation."""
        if isinstance(completion, str) and self._eos is not None:
            completion = completion.split(self.tokenizer.eos_token)[0]
        prompt = prompt if self.include_prompt else type(prompt)()
        if isinstance(prompt, str) and isinstance(completion, str) and not self.chat:
            return prompt + completion
        return [*(_as_turn(prompt, "user") if prompt else ()), *_as_turn(completion, "assistant")]

    def share_ids_with(self, tokenizer: Tokenizer) -> bool:
        """Check whether a policy's tokenizer gives the same ids as the model's own, so that ids can be read directly.

        Ids are read only if this holds for all tokenizers that were passed, because one model may serve several
        policies.
        """
        same = score_head(self.model) is not None and not self.chat and encodes_alike(tokenizer, self.tokenizer)
        self.shared_ids = same and self.shared_ids is not False
        return same

    @torch.no_grad()
    def score(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Score rows of ids as they are, without appending EOS.

        Args:
            input_ids: `(B, T)` ids on the model's device; row i has `lengths[i]` real tokens, then padding of any
                value.
            lengths: `(B,)`, at least 1, preferably on the CPU; otherwise reading them waits for the device.

        Returns:
            `(B,)` float32 on the model's device.
        """
        logits = self.scorer(input_ids, lengths).last  # (B, K)
        if self.output == "probability":
            alone = logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
            logits = logits.sigmoid() if alone else logits.softmax(-1)
        return self.gain * logits[:, self.label] + self.bias

    def score_texts(self, texts: Sequence[Text]) -> Tensor:
        """Return scores `(N,)` of whole texts, each prompt + completion."""
        return self.score_rows(self.encode(texts))

    def score_rows(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return scores `(N,)`, on the CPU, of lists of ids."""
        check_fork(self.device.type)
        scores, parts = torch.empty(len(rows)), []
        # Rows are batched by length, to compute little padding. Decoders need no limit on it, because rows are packed.
        padding = MAX_PADDING if score_head(self.model) is None else 1.0
        batches = batches_by_length([len(row) for row in rows], self.batch_size, padding)
        for batch in batches:
            input_ids, lengths = pad_right([rows[index] for index in batch])
            [there] = to_device(self.device, input_ids)
            parts.append(self.score(there, lengths))
        if parts:
            scores[[index for batch in batches for index in batch]] = torch.cat(parts).cpu()
        return scores

    def encode(self, texts: Sequence[Text], max_length: int | None = None) -> list[list[int]]:
        """Return the ids of whole texts as the model reads them, with EOS.

        Args:
            texts: Strings and conversations.
            max_length: Maximum number of tokens; longer texts lose their beginning. None for that of the model.
        """
        limit = self.max_length if max_length is None else max_length
        framed_by_tokenizer = score_head(self.model) is None  # an encoder
        others = [text for text in texts if not (framed_by_tokenizer and isinstance(text, str))]
        rows = iter(encode(others, self.tokenizer)) if others else iter(())
        return [
            self._encode_for_encoder(text, limit)
            if framed_by_tokenizer and isinstance(text, str)
            else self._limited(text, next(rows), limit)
            for text in texts
        ]

    def _limited(self, text: Text, ids: list[int], limit: int) -> list[int]:
        """Return the last ids of a text, with one EOS at the end if `append_eos` is set."""
        # A chat template may have rendered the last turn's EOS already, possibly with a line break after it.
        if not isinstance(text, str) and self._eos is not None and self._eos in ids[-2:]:
            return cut_beginning(ids, limit, self.tokenizer.bos_token_id)
        return self._closed(ids, limit)

    def _encode_for_encoder(self, text: str, limit: int) -> list[int]:
        """Encode a text with an encoder's special tokens, such as [CLS] and [SEP]; a long one loses its beginning."""
        check_characters(text)
        controls = control_tokens(self.tokenizer)
        side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, "left"
        try:
            ids: list[int] = self.tokenizer(
                text, truncation=True, max_length=limit, split_special_tokens=spells(text, controls)
            ).input_ids
            return ids
        finally:
            self.tokenizer.truncation_side = side

    def calibrate(self, texts: Sequence[Text]) -> RewardModel:
        """Set `gain` and `bias` such that the scores of these texts have mean 0 and standard deviation 1.

        Ziegler et al. (2019) do this with samples of the reference, so that the scale of the reward, and with it the
        meaning of the KL coefficient, does not depend on the training of the reward model.

        Returns:
            The reward model itself.

        Raises:
            ValueError: If all texts have the same score.
        """
        scores = self.score_texts(texts).double()
        std = scores.std(correction=0).item() if len(texts) else 0.0
        if not std > 1e-8:
            raise ValueError(f"cannot calibrate: the {len(texts)} texts all score the same, pass different ones")
        self.gain, self.bias = self.gain / std, (self.bias - scores.mean().item()) / std
        return self

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Save model, tokenizer and settings in the format of transformers.

        Args:
            folder: Where to write; it is empty or does not exist.
            overwrite: Whether to replace a reward model that was saved there before.

        Raises:
            FileExistsError: If the folder has files.
            OSError: If the folder cannot be written. An existing folder is then unchanged.
        """
        names = ("gain", "bias", "append_eos", "max_length", "label", "output", "include_prompt", "chat")
        settings = {name: getattr(self, name) for name in names}
        kind = type(self).__name__
        with atomic_folder(folder, REWARD_MODEL, kind, settings, overwrite=overwrite) as temporary, quiet():
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            (temporary / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    def to(self, device: Device) -> Self:
        """Move the model to a device."""
        self.model.to(resolve_device(device))
        return self

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        device: torch.device = self.model.device
        return device

    @property
    def _eos(self) -> int | None:
        return self.tokenizer.eos_token_id

    def _closed(self, ids: list[int], limit: int) -> list[int]:
        """Return the last ids, at most `limit`, with exactly one EOS at the end if `append_eos` is set."""
        ids = ids[:-1] if self.append_eos and ids and ids[-1] == self._eos else ids
        ending = [self._eos] if self.append_eos and self._eos is not None else []
        closed = cut_beginning(ids, limit - len(ending), self.tokenizer.bos_token_id) + ending
        if not closed:
            raise ValueError("a text is empty, so it has no last token to read a score from: leave it out")
        return closed


def encodes_alike(first: Tokenizer, second: Tokenizer) -> bool:
    """Return whether two tokenizers give the same ids."""
    if first is second:
        return True
    # Equal vocabularies are not enough: one tokenizer may add a BOS, or have other merges.
    probe = "Does it add a BOS, and merge alike?"
    same_tokens = first.eos_token_id == second.eos_token_id and first.get_vocab() == second.get_vocab()
    return same_tokens and first(probe).input_ids == second(probe).input_ids


def _as_turn(text: Text, role: str) -> Messages:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def _before(ids: Sequence[int], stop: int | None) -> list[int]:
    """Return the ids before the first `stop`."""
    ids = list(ids)
    return ids[: ids.index(stop)] if stop is not None and stop in ids else ids


def _label_index(model: PreTrainedModel, label: int | str | None) -> int:
    names = {int(index): name for index, name in (model.config.id2label or {}).items()}
    if label is None and len(names) == 1:
        return 0
    found = [index for index, name in names.items() if label in (index, name)]
    if not found or isinstance(label, bool):
        raise ValueError(
            f"the classifier has the labels {names}: choose the one that is the reward with label=..., got {label!r}"
        )
    return found[0]


def _restore_bias(model: PreTrainedModel, path: str) -> None:
    """Load the bias of a decoder's head, which `AutoModelForSequenceClassification` ignores (trl#1783)."""
    head = score_head(model)
    if head is None:
        return
    for file in Path(str(cached_file(path, "config.json"))).parent.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            if "score.bias" in tensors.keys():  # noqa: SIM118  (not a dict)
                bias = tensors.get_tensor("score.bias").to(head.weight, copy=True)  # out of the file, which is mapped
                head.bias = nn.Parameter(bias, requires_grad=False)
