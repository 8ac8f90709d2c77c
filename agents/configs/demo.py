"""Settings of the demo."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from textgym.data.preferences import PAIRS_PER_GROUP
from textgym.rewards.models.config import RewardModelConfig
from textgym.settings import Count, NotNegative, Positive, Seed, WholeNumber, check_settings

from .ppo import PPOConfig


@dataclass(kw_only=True)
class DemoConfig:
    """Trains the embedded model with a reward model of human ratings, and evaluates it before and after."""

    output_dir: Path = Path("runs/demo")
    """The run folder."""
    overwrite: bool = False
    """Delete the run that is in `output_dir`; files that textgym did not write stay."""
    model: str = "tiny"
    """The language model, which is the initial policy and the reference."""
    total_episodes: Count = 2560
    """Number of episodes of PPO."""
    num_envs: Count = 64
    """Rows of the environment."""
    eval_prompts: Count = 256
    """Number of held-out prompts for the evaluation before and after training."""
    kl_coef: NotNegative = 0.1
    """beta, the coefficient of the KL penalty; the unit of scores is their standard deviation under the reference."""
    kl_target: Positive | None = None
    """Adapt beta to reach this KL, in nats per text; `kl_coef` is then the initial value."""
    min_new_tokens: WholeNumber = 24
    """Minimum length of completions in tokens; with 24 every text has 24 tokens, with 0 the policy decides."""
    max_new_tokens: Count = 24
    """Maximum length of completions in tokens."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a text that did not end within `max_new_tokens`."""
    seed: Seed = 0
    """Seed of all random generators."""
    device: str = "auto"
    """Device: 'cuda', 'cuda:1', 'cpu', or 'auto', which uses a GPU if there is one."""
    deterministic: bool = False
    """Make the run repeatable bit for bit on the same machine: a fixed number of threads and deterministic kernels."""
    reward_model: RewardModelConfig = field(
        default_factory=lambda: RewardModelConfig(num_layers=2, batch_size=PAIRS_PER_GROUP)
    )
    """Hyperparameters of the reward model."""
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(learning_rate=3e-4, minibatch_size=64, value_coef=0.5))
    """Hyperparameters of PPO."""

    def __post_init__(self) -> None:
        check_settings(self)
        self.ppo = dataclasses.replace(self.ppo, seed=self.seed)
        self.reward_model = dataclasses.replace(self.reward_model, seed=self.seed)
