"""Record whole updates of TRL's GRPOTrainer and RLOOTrainer on a tiny model, for comparison in tests/agents.

    pip install --target .peers --no-deps trl==1.16.0 && pip install --target .peers datasets
    python scripts/peers/record_updates.py --trl .peers
    python scripts/peers/record_updates.py --trl .peers --compare   # another version of TRL with what is recorded

TRL is not a dependency, so what it did is stored in tests/agents/trl/updates.safetensors: the completions that it
sampled, their scores and advantages, and the weights after each update. An update is a rollout of six prompts with four
completions each, and two passes over it, each one step of SGD on three accumulated micro-batches. The mean of BNPO
depends on which completions share a micro-batch, so it has only one. Completions have unequal lengths, and in some
groups all scores are equal.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from plain_training import PLAIN, flat
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from textgym.models.letter_tokenizer import letter_tokenizer
from textgym.testing import mock_lm

OUTPUT = Path(__file__).parents[2] / "tests" / "agents" / "trl" / "updates.safetensors"
PROMPTS, GROUP, LONGEST, UPDATES, LEARNING_RATE = 6, 4, 6, 2, 1.0
WHOLE = {"per_device_train_batch_size": PROMPTS * GROUP, "gradient_accumulation_steps": 1}
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": PROMPTS * GROUP // 3,
    "gradient_accumulation_steps": 3,
    "num_generations": GROUP,
    "num_iterations": 2,
    "max_completion_length": LONGEST,
    "max_grad_norm": 1e9,
    **PLAIN,
}
"""Arguments of TRL's config, unless a case has others."""
DEVIATION, CAP = 0.5, 1.5
"""Of an importance ratio: the standard deviation of its logarithm, and the largest value."""

Reward = Callable[..., list[float]]


def reward(completions: list[str], **_: Any) -> list[float]:
    """Return a score for each completion; the same one for all that have no "b" and no "c"."""
    return [float(text.count("b")) - 0.5 * text.count("c") for text in completions]


def count_b(completions: list[str], **_: Any) -> list[float]:
    """Return the first of the two rewards of GDPO."""
    return [float(text.count("b")) for text in completions]


def fewer_c(completions: list[str], **_: Any) -> list[float]:
    """Return the second of the two rewards of GDPO."""
    return [-float(text.count("c")) for text in completions]


@dataclass
class Case:
    """What is trained in a case.

    Attributes:
        settings: Arguments of TRL's config, beside `COMMON`.
        algorithm: How the names of TRL's trainer and of its config begin.
        rewards: Reward functions and their weights.
        other_sampler: Whether the sampler has other log-probs than the trainer, as vLLM would have; TRL corrects for
            them.
    """

    settings: dict[str, Any]
    algorithm: str = "GRPO"
    rewards: dict[Reward, float] = field(default_factory=lambda: {reward: 1.0})
    other_sampler: bool = False

    @property
    def passes(self) -> int:
        """Number of passes over a rollout."""
        return int({**COMMON, **self.settings}["num_iterations"])


CASES = {
    "grpo": Case({"loss_type": "grpo", "epsilon_high": 0.28}),
    "grpo, kl": Case({"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False}),
    "dr_grpo": Case({"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": Case({"loss_type": "dapo", "epsilon_high": 0.28}),
    "dapo, kl": Case({"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": True}),
    "bnpo": Case({"loss_type": "bnpo", **WHOLE}),
    "gspo": Case({"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "cispo": Case({"loss_type": "cispo", "epsilon_high": 1.28}),
    "rloo": Case({"beta": 0.0}, "RLOO"),
    "rloo, kl": Case({"beta": 0.1}, "RLOO"),
    "gdpo": Case(
        {"loss_type": "dapo", "multi_objective_aggregation": "normalize_then_sum"},
        rewards={count_b: 1.0, fewer_c: 0.5},
    ),
    # TRL chooses the tokens with high entropy in each micro-batch and in each pass again, so there is one of each.
    "entropy": Case({"loss_type": "dapo", "top_entropy_quantile": 0.5, "num_iterations": 1, **WHOLE}),
    "importance": Case({"loss_type": "dapo"}, other_sampler=True),
}


@dataclass
class Args:
    trl: Path
    """Folder with the package `trl` and the packages that it imports."""
    compare: bool = False
    """Write nothing, and print how far this version is from what is recorded."""


class Steps(TrainerCallback):
    """Keeps the weights after each update."""

    def __init__(self, passes: int) -> None:
        self.passes = passes
        self.weights: list[Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Keep the weights if the rollout has been used as often as it is."""
        if state.global_step % self.passes == 0:
            self.weights.append(flat(model))


def recorded(trl: Any, name: str, case: Case, seed: int) -> dict[str, Tensor]:
    """Train for some updates, and return rollouts and weights."""
    from datasets import Dataset

    tokenizer = letter_tokenizer(8)
    tokenizer.padding_side = "left"
    prompts = [{"prompt": "abcdefabcdef"[row : row + 1 + row % 3]} for row in range(PROMPTS)]
    steps = Steps(case.passes)
    with tempfile.TemporaryDirectory() as folder:
        mock_lm(8, hidden_size=8, num_layers=1, seed=seed).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)  # the reference is loaded from the same folder
        first = flat(model)
        sgd = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        own = {"output_dir": folder, "max_steps": case.passes * UPDATES, "seed": seed}
        weights = {"reward_weights": list(case.rewards.values())}
        trainer = getattr(trl, f"{case.algorithm}Trainer")(
            model=model,
            reward_funcs=list(case.rewards),
            args=getattr(trl, f"{case.algorithm}Config")(**{**COMMON, **own, **weights, **case.settings}),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
            optimizers=(sgd, torch.optim.lr_scheduler.LambdaLR(sgd, lambda _: 1.0)),
            callbacks=[steps],
        )
        rollouts = kept_rollouts(trainer, case)
        trainer.train()
    tensors = {f"{name}/weights": first}
    for update, (rollout, weights_after) in enumerate(zip(rollouts, steps.weights, strict=True)):
        columns = {**rollout_columns(rollout, case, tokenizer), "weights": weights_after}
        tensors |= {f"{name}/{update}/{key}": column for key, column in columns.items()}
    return tensors


def kept_rollouts(trainer: Any, case: Case) -> list[dict[str, Tensor]]:
    """Return a list that will have the rollouts of the trainer; give them importance ratios if the case has them."""
    rollouts: list[dict[str, Tensor]] = []
    score, loss = trainer._generate_and_score_completions, trainer._compute_loss

    def kept(inputs: Any) -> Any:
        outputs = score(inputs)
        if case.other_sampler:
            shape, generator = outputs["old_per_token_logps"].shape, torch.Generator().manual_seed(len(rollouts))
            outputs["difference"] = DEVIATION * torch.randn(shape, generator=generator)
            outputs["importance_sampling_ratio"] = outputs["difference"].exp().clamp(max=CAP)
        rollouts.append({key: value.clone() for key, value in outputs.items() if isinstance(value, Tensor)})
        return outputs

    def corrected(model: Any, inputs: Any) -> Tensor:
        trainer.use_vllm = case.other_sampler  # while the loss is computed, and not while it generates
        value = loss(model, inputs)
        trainer.use_vllm = False
        return value

    trainer._generate_and_score_completions, trainer._compute_loss = kept, corrected
    return rollouts


def rollout_columns(rollout: dict[str, Tensor], case: Case, tokenizer: Any) -> dict[str, Tensor]:
    """Return what is stored of a rollout."""
    names = ["prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages"]
    names += ["difference"] if case.other_sampler else []
    texts = [
        tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for ids, mask in zip(rollout["completion_ids"], rollout["completion_mask"], strict=True)
    ]
    rewards = torch.tensor([function(texts) for function in case.rewards])  # (functions, N)
    scores = torch.tensor(list(case.rewards.values())) @ rewards
    columns = {**{name: rollout[name].contiguous() for name in names}, "scores": scores}
    return {**columns, "rewards": rewards} if len(rewards) > 1 else columns


def main(args: Args) -> None:
    sys.path.insert(0, str(args.trl))
    import trl

    tensors: dict[str, Tensor] = {}
    for seed, (name, case) in enumerate(CASES.items()):
        tensors |= recorded(trl, name, case, seed)
    if args.compare:
        before = load_file(OUTPUT)
        assert tensors.keys() == before.keys()
        largest = max(float((tensors[name] - before[name]).abs().max()) for name in before)
        print(f"{len(CASES)} cases of TRL {trl.__version__}: at most {largest:.2g} from those of {OUTPUT.name}")
        return
    about = {"trl": trl.__version__, "cases": json.dumps(list(CASES))}
    save_file(tensors, OUTPUT, metadata=about)
    print(f"{len(CASES)} cases of TRL {trl.__version__}: {OUTPUT}, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(tyro.cli(Args))
