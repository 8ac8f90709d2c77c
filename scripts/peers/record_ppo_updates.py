"""Record whole updates of TRL's PPOTrainer, last in TRL 1.12, on tiny models, for comparison in tests/agents.

    pip install --target .peers-ppo --no-deps trl==1.12.0
    python scripts/peers/record_ppo_updates.py --trl .peers-ppo

TRL is not a dependency, so what it did is stored in tests/agents/trl/ppo_updates.safetensors: the responses that it
sampled, their scores, values and advantages, the order of its minibatches, its metrics, and the weights of policy and
critic after each update. An update is a rollout of 32 prompts of unequal lengths and two epochs of steps of SGD; in one
case it is one step.

Three properties of TRL shape the cases. It steps after every `gradient_accumulation_steps` micro-batches, however many
minibatches these are: four minibatches and accumulation over two make two steps an epoch. Accelerate ends an
accumulation at the last batch of a data set, so the data set has one batch more than there are updates. A sampled
padding token ends a response, so the padding token is not one of the model's.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import tyro
from plain_training import PLAIN, flat
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, TrainerCallback

from textgym.models.letter_tokenizer import letter_tokenizer
from textgym.testing import mock_lm

OUTPUT = Path(__file__).parents[2] / "tests" / "agents" / "trl" / "ppo_updates.safetensors"
ROWS, LONGEST, UPDATES, VOCABULARY, WIDTH = 32, 6, 2, 8, 8
EARLY = {"stop_token": "eos", "per_device_train_batch_size": ROWS, "gradient_accumulation_steps": 1}
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no kl, discounted": {"kl_coef": 0.0, "gamma": 0.9, "lam": 0.8},
    "k3": {"kl_coef": 0.3, "kl_estimator": "k3", "vf_coef": 0.5, "temperature": 0.7},
    "clipped": {"learning_rate": 0.5, "cliprange": 0.05, "cliprange_value": 0.05, "vf_coef": 0.5},
    "one minibatch": {
        "learning_rate": 0.5,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 4,
        "num_mini_batches": 1,
    },
    "whitened rewards": {"kl_coef": 0.3, "whiten_rewards": True, "lam": 0.8},
    "early": {**EARLY, "gamma": 0.9, "lam": 0.8},
    "early, one step": {**EARLY, "num_ppo_epochs": 1, "num_mini_batches": 1, "lam": 1.0},
}
"""Arguments of TRL's config for each case. Responses end at EOS in those that are named early, and never in others."""
METRICS = ("policy/clipfrac_avg", "val/clipfrac_avg", "loss/value_avg", "val/ratio")


@dataclass
class Args:
    trl: Path
    """Folder with the package `trl`."""


def kept(function: Callable[..., Any], results: list[Any]) -> Callable[..., Any]:
    """Return the function, with its results appended to a list."""

    def call(*arguments: Any, **named: Any) -> Any:
        results.append(function(*arguments, **named))
        return results[-1]

    return call


class Weights(TrainerCallback):
    """Keeps the weights of policy and critic after each update."""

    def __init__(self) -> None:
        self.policy: list[Tensor] = []
        self.critic: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Keep the weights: a step of this trainer is a whole update."""
        self.policy.append(flat(model.policy))
        self.critic.append(flat(model.value_model))


def language_model(seed: int) -> Any:
    """Return a random model whose last token is EOS."""
    tokens = {"eos_token_id": VOCABULARY - 1, "pad_token_id": None}
    return mock_lm(VOCABULARY, hidden_size=WIDTH, num_layers=1, seed=seed, **tokens)


def scorer(seed: int) -> Any:
    """Return a random model with a head of one number, whose bias the critic of textgym has too."""
    config = language_model(seed).config
    config.num_labels = 1
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    model.score = torch.nn.Linear(WIDTH, 1)
    return model


def recorded(ppo: Any, name: str, settings: dict[str, Any]) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """Train for some updates, and return rollouts and weights, and the metrics of each update."""
    tokenizer = letter_tokenizer(VOCABULARY + 1)
    tokenizer.padding_side = "left"
    texts = ["abcdefabcdef"[row % 6 : row % 6 + 1 + row % 4] for row in range((UPDATES + 1) * ROWS)]
    policy, critic, reference = language_model(0), scorer(1), language_model(2)
    tensors = {"policy": flat(policy), "critic": flat(critic), "reference": flat(reference)}
    common: dict[str, Any] = {
        "per_device_train_batch_size": ROWS // 2,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 4,
        "num_ppo_epochs": 2,
        "response_length": LONGEST,
        "total_episodes": UPDATES * ROWS,
        "num_sample_generations": 0,
        "temperature": 1.0,
        "learning_rate": 0.2,
        **PLAIN,
    }
    weights = Weights()
    with tempfile.TemporaryDirectory() as folder:
        config = ppo.PPOConfig(output_dir=folder, **{**common, **settings})
        sgd = torch.optim.SGD([*policy.parameters(), *critic.parameters()], lr=config.learning_rate)
        trainer = ppo.PPOTrainer(
            args=config,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=scorer(3),
            value_model=critic,
            train_dataset=[{"input_ids": tokenizer(text)["input_ids"]} for text in texts],
            optimizers=(sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda _: 1.0)),
            callbacks=[weights],
        )
        module = sys.modules[ppo.PPOTrainer.__module__]
        generated: list[Any] = []
        scored: list[Any] = []  # of the critic, then of the reward model
        whitened: list[Any] = []  # the advantages, after the rewards if these are
        orders: list[Any] = []
        with (
            patch.object(module, "batch_generation", kept(module.batch_generation, generated)),
            patch.object(module, "get_reward", kept(module.get_reward, scored)),
            patch.object(module, "masked_whiten", kept(module.masked_whiten, whitened)),
            patch.object(np.random, "permutation", kept(np.random.default_rng(0).permutation, orders)),
        ):
            trainer.train()
    calls, epochs = len(whitened) // UPDATES, config.num_ppo_epochs
    for update in range(UPDATES):
        ids, _ = generated[update]
        start = ids.shape[1] - LONGEST
        (values, *_), (_, scores, last) = scored[2 * update], scored[2 * update + 1]
        columns = {
            "ids": ids.to(torch.int8),
            "lengths": (last - start + 1).to(torch.int8),
            "scores": scores,
            "values": values[:, start - 1 : -1, 0],
            "advantages": whitened[calls * (update + 1) - 1],
            "orders": torch.tensor(np.stack(orders[epochs * update : epochs * (update + 1)])).to(torch.int8),
            "policy": weights.policy[update],
            "critic": weights.critic[update],
        }
        tensors |= {f"{name}/{update}/{key}": column.contiguous() for key, column in columns.items()}
    metrics = [{key: entry[key] for key in METRICS} for entry in trainer.state.log_history[:UPDATES]]
    return tensors, metrics


def main(args: Args) -> None:
    sys.path.insert(0, str(args.trl))
    import trl
    from trl.experimental import ppo

    tensors: dict[str, Tensor] = {}
    metrics = {}
    for name, settings in CASES.items():
        more, metrics[name] = recorded(ppo, name, settings)
        tensors |= more
    save_file(tensors, OUTPUT, metadata={"trl": trl.__version__, "metrics": json.dumps(metrics)})
    print(f"{len(CASES)} cases of TRL {trl.__version__}: {OUTPUT}, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(tyro.cli(Args))
