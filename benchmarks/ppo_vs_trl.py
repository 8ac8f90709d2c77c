"""Wall time and FLOPs of one PPO update, compared with TRL 1.12, its last version with PPO: same weights and prompts.

    python benchmarks/ppo_vs_trl.py --peers .peers/trl-1.12 .peers/site-packages  # installation: measuring/peers.py

Each side is a process, and the two take turns, one update each, so that other load on the machine slows both. An update
collects `rows` episodes, scores them with a reward model, applies the KL penalty, and trains for `epochs` epochs of
four minibatches. On both sides critic and reward model are classifiers on copies of the policy's trunk, in float32, on
one thread. The table has the median of the paired ratios of wall time, and the ratio of the counted floating-point
operations of one update.

Settings:
    full           every response has full length; a separate critic on both sides.
    eos            responses end at EOS. The embedding of EOS is scaled down on both sides, so that responses have half
                   of the maximum length on average.
    full-shared    like full, but textgym's critic shares the policy's trunk, which is the default.
    eos-shared     like eos, with textgym's shared trunk.
Not paired: the order of prompts and the sampled texts. TRL has no shared critic, so the models differ in the last two
settings; the number of epochs is the same, although textgym's default is two. With EOS, TRL generates until the last
row has ended and computes all rows at full length in every pass; this is part of the comparison.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import torch
import tyro
from measuring.device import DEVICE, WARM_UPS
from measuring.peers import Clock, Side
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import textgym  # noqa: F401  (registers the ids)
from textgym.agents import PPO, PPOConfig
from textgym.models.actor_critic import ActorCritic
from textgym.models.loading import load_causal_lm, load_tokenizer
from textgym.rewards.models import RewardModel

FIRST_ID = 300
"""Smallest token id in random prompts; smaller ids are special tokens and single bytes."""
LEARNING_RATE = 1e-7
"""So small that the lengths of responses do not change during the benchmark."""
BARS = {"full": 0.85, "eos": 0.6, "full-shared": 0.4, "eos-shared": 0.4}


@dataclass
class Config:
    """Settings of the benchmark."""

    peers: tuple[Path, ...] = ()
    """Folders with the packages `trl` 1.12 and `datasets`."""
    model: str = "tiny"
    """Name or path of a causal language model."""
    settings: tuple[str, ...] = tuple(BARS)
    """Names of the settings to run."""
    rows: int = 64
    """Number of episodes of an update."""
    prompt_tokens: int = 16
    """Number of tokens of every prompt."""
    new_tokens: int = 48
    """Maximum number of tokens of a response."""
    epochs: int = 4
    """Number of epochs over a rollout."""
    repeats: int = 5
    """Number of timed pairs of updates, after the warm-ups."""
    side: Literal["both", "ours", "theirs"] = "both"
    """Side that this process runs; "both" starts a process for each side."""
    setting: str = "full"
    """Setting of a side."""

    @property
    def ends(self) -> bool:
        """Whether responses end at EOS."""
        return self.setting.startswith("eos")

    @property
    def updates(self) -> int:
        """Number of updates: the warm-ups, the timed ones, and one whose operations are counted."""
        return WARM_UPS + self.repeats + 1


class Turns:
    """Measures the time of each update of a side; of the last one it counts the operations, which is slow."""

    def __init__(self, updates: int) -> None:
        self.left, self.clock = updates, Clock()
        self.counter = FlopCounterMode(display=False)
        self._begin()
        self.clock.start()

    def done(self, **figures: float) -> None:
        """Report an update."""
        self.left -= 1
        if self.left == 0:
            self.counter.__exit__(None, None, None)
            figures["flops"] = self.counter.get_total_flops()
        self._begin()
        self.clock.lap(**figures)

    def _begin(self) -> None:
        if self.left == 1:
            self.counter.__enter__()


def prompts(config: Config, vocab_size: int) -> torch.Tensor:
    """Return random prompts for all updates, `(rows * updates, prompt_tokens)`."""
    shape, generator = (config.rows * config.updates, config.prompt_tokens), torch.Generator().manual_seed(0)
    return torch.randint(FIRST_ID, vocab_size, shape, generator=generator)


def make_envs(config: Config, tokenizer: Any, reward: Any) -> Any:
    """Make the environment with random token ids as prompts, because texts have different numbers of tokens."""
    envs: Any = gym.make_vec(
        "textgym/Text-v0",
        num_envs=config.rows,
        prompts=["."],
        tokenizer=tokenizer,
        reward=reward,
        reference=config.model,
        kl_coef=0.05,
        kl_mode="deferred",
        max_prompt_tokens=config.prompt_tokens,
        max_new_tokens=config.new_tokens,
        min_new_tokens=0 if config.ends else config.new_tokens,
        device=DEVICE,
    )
    task, ids = envs.unwrapped.task, prompts(config, len(tokenizer))
    task.prompt_ids, task.prompt_lengths = ids.int().numpy(), torch.full((len(ids),), config.prompt_tokens).numpy()
    task.rows, task.prompt_texts = [{"prompt": "."}] * len(ids), ["."] * len(ids)
    return envs


def ours(config: Config) -> None:
    """Run textgym's PPO, one update per turn."""
    tokenizer = load_tokenizer(config.model)
    reward = RewardModel(_classifier(config.model).to(DEVICE), tokenizer, batch_size=config.rows)
    shared = config.setting.endswith("shared")
    policy = ActorCritic.from_pretrained(config.model, critic="shared" if shared else "separate", device=DEVICE)
    settings = PPOConfig(
        episodes_per_update=config.rows,
        minibatch_size=config.rows // 4,
        num_epochs=config.epochs,
        learning_rate=LEARNING_RATE,
        anneal_learning_rate=False,
    )
    agent = PPO(policy, make_envs(config, tokenizer, reward), settings)
    turns = Turns(config.updates)
    agent.learn(config.rows * config.updates, [lambda _, metrics: turns.done(tokens=metrics["val/response_tokens"])])


def theirs(config: Config) -> None:
    """Run TRL's PPO, one update per turn; it logs once per update."""
    from trl.experimental.ppo import (
        PPOConfig as TheirConfig,  # type: ignore[import-not-found, unused-ignore]
    )
    from trl.experimental.ppo import (
        PPOTrainer,
    )

    tokenizer = AutoTokenizer.from_pretrained(config.model, padding_side="left")
    data: Any = [
        {"input_ids": row, "attention_mask": [1] * len(row)} for row in prompts(config, len(tokenizer)).tolist()
    ]
    settings = TheirConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=config.rows,
        local_rollout_forward_batch_size=config.rows,
        num_mini_batches=4,
        gradient_accumulation_steps=1,
        total_episodes=config.rows * config.updates,
        num_ppo_epochs=config.epochs,
        response_length=config.new_tokens,
        stop_token="eos" if config.ends else None,
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        use_cpu=DEVICE == "cpu",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=settings,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32),
        reward_model=_classifier(config.model),
        value_model=_classifier(config.model),
        train_dataset=data,
        eval_dataset=data,
    )
    turns = Turns(config.updates)
    trainer.log = lambda *_, **__: turns.done()
    trainer.train()


def _classifier(model: str) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32, num_labels=1)


def end_by_half(lm: Any, config: Config) -> None:
    """Scale the tied embedding of EOS down until responses have half of the maximum length on average."""
    tokenizer = load_tokenizer(config.model)
    envs = make_envs(replace(config, setting="eos"), tokenizer, lambda completions: [0.0])
    task, embedding = envs.unwrapped.task, lm.to(DEVICE).get_input_embeddings().weight
    prompts = torch.nn.functional.pad(torch.as_tensor(task.prompt_ids, dtype=torch.long), (0, config.new_tokens))
    prompts, lengths = prompts.to(DEVICE), torch.as_tensor(task.prompt_lengths, device=DEVICE)
    whole, least, most = embedding[tokenizer.eos_token_id].detach().clone(), 0.0, 1.0
    for _ in range(8):
        factor = (least + most) / 2
        with torch.no_grad():
            embedding[tokenizer.eos_token_id] = factor * whole
        policy = ActorCritic.from_pretrained(lm)
        policy.seed(0)
        written = policy.generate(prompts, lengths, config.new_tokens, task.episodes.stop).lengths
        least, most = (factor, most) if written.float().mean() > config.new_tokens / 2 else (least, factor)


def arguments(config: Config) -> list[str]:
    """Return the command line of one side."""
    given = ["--side", config.side, "--setting", config.setting, "--model", config.model]
    for name in ("rows", "prompt_tokens", "new_tokens", "epochs", "repeats"):
        given += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return given


def compare(config: Config) -> dict[str, float]:
    """Return the metrics of one setting."""
    mine, peer = (arguments(replace(config, side=side)) for side in ("ours", "theirs"))
    with Side(__file__, *mine) as one, Side(__file__, *peer, libraries=config.peers) as other:
        pairs = [(one.work(), other.work()) for _ in range(config.updates)]
    timed, counted = pairs[WARM_UPS:-1], pairs[-1]
    return {
        "wall_time_ratio": statistics.median(a["seconds"] / b["seconds"] for a, b in timed),
        "cpu_time_ratio": statistics.median(a["cpu_seconds"] / b["cpu_seconds"] for a, b in timed),
        "flops_ratio": counted[0]["flops"] / counted[1]["flops"],
        "our_seconds": statistics.median(a["seconds"] for a, _ in timed),
        "their_seconds": statistics.median(b["seconds"] for _, b in timed),
        "our_gflops": counted[0]["flops"] / 1e9,
        "their_gflops": counted[1]["flops"] / 1e9,
        "response_tokens": statistics.mean(a["tokens"] for a, _ in timed),
        "bar": BARS[config.setting],
    }


def main(config: Config) -> None:
    """Print a table of the settings, and the same as JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if config.side != "both":
        return ours(config) if config.side == "ours" else theirs(config)
    results = {}
    print("| setting | wall time | CPU time | operations | bar | mean response |\n" + "| --- " * 6 + "|", flush=True)
    for name in config.settings:
        with tempfile.TemporaryDirectory() as folder:
            lm = load_causal_lm(config.model)
            if name.startswith("eos"):
                end_by_half(lm, config)
            lm.save_pretrained(folder)
            load_tokenizer(config.model).save_pretrained(folder)
            row = results[name] = compare(replace(config, setting=name, model=folder))
        cells = (f"{row[key]:.2f}" for key in ("wall_time_ratio", "cpu_time_ratio", "flops_ratio", "bar"))
        print(f"| {name} | {' | '.join(cells)} | {row['response_tokens']:.1f}/{config.new_tokens} |", flush=True)
    print(json.dumps({name: {key: round(x, 3) for key, x in row.items()} for name, row in results.items()}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config))
