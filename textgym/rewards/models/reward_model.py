"""RewardModel: a trained sequence classifier as a reward function.

Its score is read at the last real token of prompt + completion, found by length and never by comparing ids with the pad
token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import cached_file

from textgym.data.files import atomic_folder
from textgym.data.messages import Messages, Text, encode
from textgym.models.architectures.attention import MAX_PADDING, batches_by_length
from textgym.models.loading import ASSETS, disable_dropout, freeze, load_classifier, quiet
from textgym.models.machine.devices import Device, check_fork, resolve_device
from textgym.models.machine.transfer import to_device
from textgym.rewards.models.last_token import LastTokenScorer, pad_right, score_head

SETTINGS_FILE = "reward_model.json"
TINY = ASSETS / "tiny_reward"


class RewardModel:
    """A reward function that is a trained sequence classifier: `gain * score + bias` of prompt + completion.

    The text is closed by exactly one EOS, whether the completion ended by itself or by length; what follows an EOS of
    the completion is cut off. Texts longer than `max_length` lose their beginning. Conversations are read through the
    chat template of the model's tokenizer.

    Args:
        model: sequence classifier of transformers; it is frozen, its dropout removed.
        tokenizer: the model's own.
        gain: factor on the raw score.
        bias: added to the score after `gain`.
        append_eos: whether the texts it was trained on were closed by EOS.
        batch_size: texts scored at once.
        max_length: tokens of prompt + completion + EOS that are read, at most what the model has positions for.
        label: of a classifier with several labels, the one that counts: its index, or its name in the model's config.
        output: `"logit"`, or `"probability"` of the label (a softmax over labels; a sigmoid where there is one, or
            where they do not exclude each other).
        include_prompt: whether it reads the prompt or the completion alone.
        chat: whether plain texts are read as a conversation, the prompt the user's turn and the completion the
            assistant's.

    Raises:
        ValueError: several labels of which none is chosen, a label the model does not have, or `append_eos` with a
            tokenizer that has no EOS.
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
        label: int | str | None = None,
        output: Literal["logit", "probability"] = "logit",
        include_prompt: bool = True,
        chat: bool = False,
    ) -> None:
        if append_eos and tokenizer.eos_token_id is None:
            raise ValueError("the reward model's tokenizer has no EOS token: pass append_eos=False")
        if output not in ("logit", "probability"):
            raise ValueError(f"output must be 'logit' or 'probability', got {output!r}")
        self.label = _label_index(model, label)
        self.model = freeze(disable_dropout(model))
        self.scorer = LastTokenScorer(self.model)
        self.tokenizer = tokenizer
        self.gain, self.bias = gain, bias
        self.append_eos = append_eos
        self.batch_size = batch_size
        self.max_length = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
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
        """A trained reward model: `"tiny"` (embedded), a folder, or a hub id of any sequence classifier.

        Args:
            name_or_path: which.
            device: where it scores.
            dtype: of its weights, such as `torch.bfloat16`; the score itself is computed in float32.
            trust_remote_code: whether to run code that comes with the model.
            settings: of the constructor, in place of those that were saved with it. A model that comes without
                closes texts by EOS if it is a decoder without a chat template.

        Raises:
            ValueError: unknown name, or a model whose reward head was never trained.
        """
        path = str(TINY) if name_or_path == "tiny" else str(name_or_path)
        model = load_classifier(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code, trained=True)
        _restore_bias(model, path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        file = cached_file(path, SETTINGS_FILE, _raise_exceptions_for_missing_entries=False)
        plain = score_head(model) is not None and tokenizer.chat_template is None
        saved = json.loads(Path(file).read_text()) if file else {"append_eos": plain and bool(tokenizer.eos_token)}
        return cls(model, tokenizer, **{**saved, **settings})

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float]:
        """One score for each completion.

        Ids are read in place of the texts if `share_ids_with` found the policy's tokenizer to be this model's own,
        because encoding the decoded text again need not give them back.
        """
        plain = all(isinstance(prompt, str) for prompt in prompts)  # conversations have this model's own template
        if self.shared_ids and plain and prompt_ids is not None and completion_ids is not None:
            pairs = zip(prompt_ids, completion_ids, strict=True)
            rows = [
                self._closed([*(prompt if self.include_prompt else ()), *_before(completion, self._eos)])
                for prompt, completion in pairs
            ]
        else:
            texts = [self.text(prompt, end) for prompt, end in zip(prompts, completions, strict=True)]
            rows = self.encode(texts)
        scores: list[float] = self.score_rows(rows).tolist()
        return scores

    def text(self, prompt: Text, completion: Text) -> Text:
        """What the model reads of a prompt and its completion: their text up to EOS, or the conversation."""
        if isinstance(completion, str) and self._eos is not None:
            completion = completion.split(self.tokenizer.eos_token)[0]
        prompt = prompt if self.include_prompt else type(prompt)()
        if isinstance(prompt, str) and isinstance(completion, str) and not self.chat:
            return prompt + completion
        return [*(_as_turn(prompt, "user") if prompt else ()), *_as_turn(completion, "assistant")]

    def share_ids_with(self, tokenizer: Tokenizer) -> bool:
        """Tells the model of a policy's tokenizer; returns whether it gives the same ids as the model's own.

        Ids are passed through only while all tokenizers it was told of do: one model may score for several policies.
        """
        same = score_head(self.model) is not None and not self.chat and encodes_alike(tokenizer, self.tokenizer)
        self.shared_ids = same and self.shared_ids is not False
        return same

    @torch.no_grad()
    def score(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Scores of rows of ids as they are, without closing them.

        Args:
            input_ids: `(B, T)` ids on the model's device; row i holds `lengths[i]` real tokens, then anything.
            lengths: `(B,)`, at least 1; on the host, or the host waits for them.

        Returns:
            `(B,)` float32 on the model's device.
        """
        logits = self.scorer(input_ids, lengths).last  # (B, K)
        if self.output == "probability":
            alone = logits.shape[1] == 1 or self.model.config.problem_type == "multi_label_classification"
            logits = logits.sigmoid() if alone else logits.softmax(-1)
        return self.gain * logits[:, self.label] + self.bias

    def score_texts(self, texts: Sequence[Text]) -> Tensor:
        """Scores `(N,)` of whole texts, each prompt + completion."""
        return self.score_rows(self.encode(texts))

    def score_rows(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Scores `(N,)` of lists of ids, on the host, sorted by length into batches so that little padding is computed.

        Decoders take whole batches: their rows are packed, and none is padded.
        """
        check_fork(self.device.type)
        scores, parts = torch.empty(len(rows)), []
        padding = MAX_PADDING if score_head(self.model) is None else 1.0
        batches = batches_by_length([len(row) for row in rows], self.batch_size, padding)
        for batch in batches:
            input_ids, lengths = pad_right([rows[index] for index in batch])
            [there] = to_device(self.device, input_ids)
            parts.append(self.score(there, lengths))
        if parts:
            scores[[index for batch in batches for index in batch]] = torch.cat(parts).cpu()
        return scores

    def encode(self, texts: Sequence[Text]) -> list[list[int]]:
        """Ids of whole texts, cut to `max_length` and closed by EOS, as the model reads them."""
        if not texts:
            return []
        if score_head(self.model) is None and all(isinstance(text, str) for text in texts):
            return self._encode_for_encoder(list(texts))  # type: ignore[arg-type]  # they are strings
        rows = zip(texts, encode(texts, self.tokenizer), strict=True)
        # A template may have written the last turn's EOS, and a line break after it.
        return [
            ids[-self.max_length :]
            if not isinstance(text, str) and self._eos is not None and self._eos in ids[-2:]
            else self._closed(ids)
            for text, ids in rows
        ]

    def _encode_for_encoder(self, texts: list[str]) -> list[list[int]]:
        """By its tokenizer, which knows where its special tokens go; long texts lose their beginning."""
        side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, "left"
        try:
            rows: list[list[int]] = self.tokenizer(texts, truncation=True, max_length=self.max_length).input_ids
        finally:
            self.tokenizer.truncation_side = side
        return rows

    def calibrate(self, texts: Sequence[Text]) -> RewardModel:
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
        names = ("gain", "bias", "append_eos", "max_length", "label", "output", "include_prompt", "chat")
        settings = {name: getattr(self, name) for name in names}
        with atomic_folder(folder) as temporary, quiet():
            self.model.save_pretrained(temporary)
            self.tokenizer.save_pretrained(temporary)
            (temporary / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    def to(self, device: Device) -> Self:
        """Moves the model."""
        self.model.to(resolve_device(device))
        return self

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
        ids = ids[:-1] if self.append_eos and ids and ids[-1] == self._eos else ids
        ending = [self._eos] if self.append_eos and self._eos is not None else []
        closed = ids[-(self.max_length - len(ending)) :] + ending
        if not closed:
            raise ValueError("there is an empty text, which has no last token to read a score from")
        return closed


def encodes_alike(first: Tokenizer, second: Tokenizer) -> bool:
    """Whether two tokenizers give every text the same ids."""
    if first is second:
        return True
    probe = "Does it add a BOS, and merge alike?"
    same_tokens = first.eos_token_id == second.eos_token_id and first.get_vocab() == second.get_vocab()
    return same_tokens and first(probe).input_ids == second(probe).input_ids


def _as_turn(text: Text, role: str) -> Messages:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)


def _before(ids: Sequence[int], stop: int | None) -> list[int]:
    """The ids before the first `stop`."""
    ids = list(ids)
    return ids[: ids.index(stop)] if stop is not None and stop in ids else ids


def _label_index(model: PreTrainedModel, label: int | str | None) -> int:
    names = {int(index): name for index, name in (model.config.id2label or {}).items()}
    if label is None and len(names) == 1:
        return 0
    found = [index for index, name in names.items() if label in (index, name)]
    if not found or isinstance(label, bool):
        raise ValueError(
            f"the classifier has the labels {names}, choose the one that is the reward: label=..., got {label!r}"
        )
    return found[0]


def _restore_bias(model: PreTrainedModel, path: str) -> None:
    """Takes over what `AutoModelForSequenceClassification` ignores: the bias of a decoder's head."""
    head = score_head(model)
    if head is None:
        return
    for file in Path(str(cached_file(path, "config.json"))).parent.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            if "score.bias" in tensors.keys():  # noqa: SIM118  (it is no dict)
                head.bias = nn.Parameter(tensors.get_tensor("score.bias").to(head.weight), requires_grad=False)
