"""LoRA adapters (Hu et al., 2022) by peft, and several models on one copy of frozen weights."""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar

from torch import nn

from textgym.models.loading import disable_dropout

Module = TypeVar("Module", bound=nn.Module)


def with_lora(lm: Any, config: Any) -> Any:
    """A peft model around a language model, whose layers it changes in place: from now on the adapter alone is trained.

    The adapter's dropout is removed as the model's is.

    Args:
        config: a `peft.LoraConfig`.

    Raises:
        ImportError: peft is not there.
    """
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ImportError("lora= needs peft: pip install 'textgym[lora]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads what newer versions of transformers call otherwise
        return disable_dropout(get_peft_model(lm, config))


def twin(module: Module) -> Module:
    """A copy that shares the weights that are frozen: of a model with an adapter, another adapter on the same model."""
    frozen = {id(weight): weight for weight in module.parameters() if not weight.requires_grad}
    return copy.deepcopy(module, dict(frozen))


def is_twin(module: nn.Module, of: nn.Module) -> bool:
    """Whether a model shares weights with another one."""
    return not {id(weight) for weight in module.parameters()}.isdisjoint(id(weight) for weight in of.parameters())


def merged(adapter: Any, trunk: nn.Module | None = None) -> Any:
    """The language model of a peft model with its adapter added to the weights: a plain model, in a copy.

    Args:
        trunk: a twin of the model's trunk, whose adapter is added instead.
    """
    adapter = copy.deepcopy(adapter)
    if trunk is not None:
        adapter.get_base_model().base_model.load_state_dict(trunk.state_dict())
    return adapter.merge_and_unload()
