"""Adapters such as LoRA (Hu et al., 2022) by peft, and several models on one copy of frozen weights."""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from textgym.errors import ConfigError, UntrustedNameError
from textgym.models.loading import disable_dropout, freeze, load_causal_lm, resolve
from textgym.models.machine.devices import Device

Module = TypeVar("Module", bound=nn.Module)
ADAPTER_CONFIG = "adapter_config.json"
"""What peft calls the config in a folder that holds an adapter and no model."""


@dataclass
class Adapters:
    """The adapters of a model, without their weights.

    Attributes:
        configs: a peft config for each, by name.
        active: names of those in use.
    """

    configs: dict[str, Any]
    active: list[str]

    @classmethod
    def of(cls, model: Any) -> Adapters:
        """Those of a model, as configs that leave its weights alone: PiSSA and OLoRA have changed them already."""
        configs = {name: copy.deepcopy(config) for name, config in model.peft_config.items()}
        for config in configs.values():
            if isinstance(getattr(config, "init_lora_weights", None), str):
                config.init_lora_weights = True
        return cls(configs, list(next(_tuner_layers(model)).active_adapters))

    @classmethod
    def load(cls, folder: Path, active: list[str]) -> Adapters:
        """Those that `PeftModel.save_pretrained` wrote: one called `default` in the folder, others in folders in it."""
        from peft import PeftConfig

        files = sorted(folder.rglob(ADAPTER_CONFIG))
        for file in files:
            check_adapter_config(file)
        parts = {"default" if file.parent == folder else file.parent.name: file.parent for file in files}
        configs = {name: PeftConfig.from_pretrained(str(part)) for name, part in parts.items()}
        for config in configs.values():
            config.inference_mode = False
        return cls(configs, active)

    def save(self, folder: Path) -> None:
        """Writes the configs as `PeftModel.save_pretrained` does."""
        for name, config in self.configs.items():
            config.save_pretrained(str(folder if name == "default" else folder / name))


def check_adapter_config(file: Path) -> None:
    """Refuse a config that names a module, which peft would import.

    Raises:
        UntrustedNameError: it does.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.get("megatron_config") is not None:
        raise UntrustedNameError(
            f"{file} has a megatron_config, with which peft imports the module that the file names "
            f"({config.get('megatron_core')!r}): use an adapter without one"
        )


def with_lora(lm: Any, config: Any) -> Any:
    """A peft model around a language model, whose layers it changes in place: from now on the adapter alone is trained.

    The adapter's dropout is removed as the model's is.

    Args:
        config: a `peft.LoraConfig`, or `Adapters`.

    Raises:
        ConfigError: the config is of a prompt or a prefix, see `split`.
        ImportError: peft is not there.
    """
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("lora= needs peft: pip install 'textgym[lora]'") from error
    adapters = config if isinstance(config, Adapters) else Adapters({"default": config}, ["default"])
    for each in adapters.configs.values():
        _check_kind(each)

    (first, first_config), *others = adapters.configs.items()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads what newer versions of transformers call otherwise
        warnings.filterwarnings("ignore", ".*tie_word_embeddings")  # `merged` unties them where that is needed
        model = get_peft_model(lm, first_config, adapter_name=first)
        for name, other in others:
            model.add_adapter(name, other)
    if len(adapters.active) == 1:
        model.set_adapter(adapters.active[0])
    else:
        model.base_model.set_adapter(adapters.active)
    return disable_dropout(model)


def split(model: Any) -> tuple[Any, Any]:
    """A language model and the peft model around it, or `None` if it carries no adapter.

    Args:
        model: a `PeftModel`; a language model with adapters, from `lm.add_adapter(config)`; or one without. An adapter
            that was loaded for inference is trained from now on.

    Raises:
        ConfigError: a trained prompt or prefix, or an adapter that is switched off.
    """
    lm = without_peft(model)
    if not carries_adapters(lm):
        return lm, None
    if lm is model:
        model = _wrapped(lm)

    layers = list(_tuner_layers(model))
    if any(layer.disable_adapters for layer in layers):
        raise ConfigError("the model's adapter is switched off: call model.enable_adapter_layers() first")
    for layer in layers:
        vars(layer).get("kwargs", {}).pop("tied_adapter", None)  # results of operations, which torch does not copy
    if any(layer.merged for layer in layers):
        model.unmerge_adapter()  # what is merged is not trained
    if not any(weight.requires_grad for weight in model.parameters()):
        activate(model, Adapters.of(model).active)
    return lm, disable_dropout(model)


def load_lm(name: str | os.PathLike[str] | nn.Module, *, device: Device = None, **options: Any) -> Any:
    """`load_causal_lm`; from the folder of an adapter, as peft and transformers write it, a peft model.

    Raises:
        ConfigError: a folder with an adapter that does not say of which model it is.
        ValueError: unknown name.
    """
    folder = None if isinstance(name, nn.Module) else Path(resolve(name))
    if folder is None or not (folder / ADAPTER_CONFIG).exists():
        return load_causal_lm(name, device=device, **options)
    from peft import PeftModel

    check_adapter_config(folder / ADAPTER_CONFIG)
    lm = load_causal_lm(_base_of(folder), device=device, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(lm, str(folder), is_trainable=True)


def twin(module: Module, apart: Collection[str] = ()) -> Module:
    """A copy that shares the weights that are frozen: of a model with an adapter, another adapter on the same model.

    Args:
        apart: names of weights that are copied although they are frozen.
    """
    frozen = {
        id(weight): weight
        for name, weight in module.named_parameters()
        if not weight.requires_grad and name not in apart
    }
    return copy.deepcopy(module, dict(frozen))


def is_twin(module: nn.Module, of: nn.Module) -> bool:
    """Whether a model shares weights with another one."""
    return not {id(weight) for weight in module.parameters()}.isdisjoint(id(weight) for weight in of.parameters())


def without_adapters(model: Any) -> Any:
    """The language model below the adapters of a peft model, which shares the weights that are frozen."""
    from peft.utils import ModulesToSaveWrapper

    model = twin(model)
    lm = model.get_base_model()
    for name, module in list(lm.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):  # else peft would leave the trained module
            lm.set_submodule(name, module.original_module)
    return model.unload()


def frozen_copy(lm: Any) -> Any:
    """Return a frozen copy of a language model.

    Under an adapter the copy shares what is frozen, and has an adapter of its own. Without one it shares nothing, since
    layers that are frozen now may be trained later.
    """
    return freeze(twin(lm) if carries_adapters(lm) else copy.deepcopy(lm))


def carries_adapters(lm: Any) -> bool:
    """Whether peft has changed layers of a language model."""
    if "peft" not in sys.modules:
        return False
    return next(_tuner_layers(lm), None) is not None  # `peft_config` may be left over from adapters that were merged


def without_peft(model: Any) -> Any:
    """The language model inside a peft model, with the adapter in its layers; other models as they are.

    Raises:
        ConfigError: it has a trained prompt or prefix.
    """
    if not _is_peft_model(model):
        return model
    for config in model.peft_config.values():
        _check_kind(config)
    return model.get_base_model()


def activate(model: nn.Module, names: list[str]) -> None:
    """Uses and trains these adapters and no others."""
    from peft.functional import set_adapter

    set_adapter(model, names)


def _base_of(folder: Path) -> str:
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    name = config.get("base_model_name_or_path")
    load_it = "load it yourself and pass peft.PeftModel.from_pretrained(model, folder, is_trainable=True)"
    if not name:
        raise ConfigError(f"{folder} holds an adapter and does not say of which model: {load_it}")
    if str(config.get("init_lora_weights")).startswith("pissa_niter"):
        raise ConfigError(
            f"{folder} holds an adapter of init_lora_weights={config['init_lora_weights']!r}, which changed the "
            "weights of its model at random, and they were not saved: save the merged model instead"
        )
    return str(name)


def _is_peft_model(model: Any) -> bool:
    peft = sys.modules.get("peft")  # whoever has such a model has imported it
    return peft is not None and isinstance(model, peft.PeftModel)


def _tuner_layers(model: nn.Module) -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))


def _check_kind(config: Any) -> None:
    if config.is_prompt_learning:
        raise ConfigError(
            f"{type(config).__name__} trains a prompt that exists only in peft's own forward pass, and textgym "
            "decodes the language model itself, which would not see it: use an adapter in the layers, such as "
            "peft.LoraConfig"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ConfigError(
            "alora_invocation_tokens switches an adapter on only inside peft's own forward pass, and textgym decodes "
            "the language model itself: leave it out"
        )


def _wrapped(lm: Any) -> Any:
    """A peft model around a language model whose layers have adapters already; these stay as they are."""
    adapters = Adapters.of(lm)
    state = {name: value.clone() for name, value in lm.state_dict().items()}
    trained = {name: weight.requires_grad for name, weight in lm.named_parameters()}

    # peft makes the adapters anew, at random, in the layers that are there; then they are put back.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        del lm.peft_config
        model = with_lora(lm, adapters)
    lm._hf_peft_config_loaded = False  # with which transformers would save the adapter alone
    lm.load_state_dict(state)
    for name, weight in lm.named_parameters():
        weight.requires_grad_(trained[name])
    return model
