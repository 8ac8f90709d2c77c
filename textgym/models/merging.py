"""merged: a model with adapters as a plain model of the same log-probs, in which tied weights are untied if need be."""

from __future__ import annotations

import copy
import os
import warnings
from typing import Any

import torch
from torch import nn

from textgym.models.adapters import split


def merged(model: Any, trunk: nn.Module | None = None) -> Any:
    """The language model with its adapters added to the weights: a plain model, in a copy.

    Args:
        model: a peft model, or a language model with or without adapters in its layers.
        trunk: a twin of the model's trunk, whose adapter is added instead.
    """
    lm, adapter = split(copy.deepcopy(model))
    if adapter is None:
        return lm
    if trunk is not None:
        lm.base_model.load_state_dict(trunk.state_dict())
    tied = _says_tied(lm.config) or share_weights(lm)
    untie(lm)  # else the adapter of one module would be added to the weights of the other, too (transformers#45127)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft warns of tied weights
        plain = adapter.merge_and_unload()
    _say_tied(plain.config, tied)  # peft finds them untied, whether they differ or not
    tie_if_equal(plain)
    return plain


def untie(lm: nn.Module) -> None:
    """Gives each module weights of its own where several share them, in place."""
    seen: set[int] = set()
    for module in lm.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None:
                continue
            if id(weight) in seen:
                setattr(module, name, nn.Parameter(weight.detach().clone(), weight.requires_grad))
            seen.add(id(weight))


def share_weights(lm: Any) -> bool:
    """Whether the output embedding's weight is that of another module, too: the input embedding, if there is one."""
    weight = lm.get_output_embeddings().weight
    return sum(other is weight for module in lm.modules() for other in module._parameters.values()) > 1


def tie_if_equal(lm: Any) -> None:
    """Ties what the model's config says is tied if it is equal; otherwise makes the config say that nothing is."""
    weights = dict(lm.named_parameters(remove_duplicate=False))
    pairs = lm.get_expanded_tied_weights_keys(all_submodels=True).items()
    if all(torch.equal(weights[target], weights[source]) for target, source in pairs):
        lm.tie_weights()
        return
    _say_tied(lm.config, False)


def save_plain(lm: Any, folder: str | os.PathLike[str]) -> None:
    """Writes a transformers folder, whose config says whether input and output embedding are one weight.

    transformers writes such a weight once, and would make a random one of the other, if the config said otherwise.
    """
    lm.save_pretrained(folder)
    tied = share_weights(lm)
    if tied != _says_tied(lm.config):
        config = copy.deepcopy(lm.config)
        _say_tied(config, tied)
        config.save_pretrained(folder)


def _says_tied(config: Any) -> bool:
    return bool(
        getattr(config, "tie_word_embeddings", False)
    )  # configs of models without an input embedding do not say


def _say_tied(config: Any, tied: bool) -> None:
    if type(config).from_dict({**config.to_dict(), "tie_word_embeddings": tied}).tie_word_embeddings != tied:
        return  # T5's configs call themselves tied whatever they are told, and transformers looks at the weights
    config.tie_word_embeddings = tied
    config.get_text_config().tie_word_embeddings = tied
