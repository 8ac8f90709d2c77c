"""Wall time and FLOPs of GRPO, compared with TRL 1.16's GRPOTrainer, which generates with transformers.

    python benchmarks/grpo_vs_trl.py --trl .peers/trl-1.16 .peers/site-packages   # installation: measuring/peers.py

One update: 64 episodes, 8 for each prompt; a reward function of negligible cost; group-relative advantages; k3 to a
reference model in the loss with beta = 0.04; mean over tokens ("dapo"); 1 or 4 epochs of one optimiser step each. Both
sides have the weights of the embedded model, the same prompts and stop tokens, AdamW without weight decay, one thread
and float32.

In half of the settings all responses have full length. In the other half 1 token in 30 is a stop token, so that the
mean length is about half of the limit. Prompts are openings of reviews of about 10 tokens. In the last two settings a
prompt is six openings long, because textgym encodes the prompt of a group once and TRL encodes it eight times.

Each side runs in its own process. After a warm-up update, or two on a GPU, they take turns, one update each. The table
has the medians of the paired ratios. FLOPs are counted in separate runs.

Not paired: the sampled tokens, because each side has its own random numbers (the table has both mean lengths); the
order of prompts; and the metrics that each side computes.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from measuring.device import DEVICE, WARM_UPS
from measuring.peers import Clock, Figures, Side, count_flops, in_turns, report, run_script, say

BAR, BETA, LEARNING_RATE = 0.6, 0.04, 1e-5


@dataclass
class Config:
    trl: tuple[Path, ...] = (Path(".peers/trl-1.16"), Path(".peers/site-packages"))
    """Folders with the packages `trl` and `datasets`."""
    rows: int = 64
    group_size: int = 8
    new_tokens: int = 48
    updates: int = 10**6
    """Maximum number of updates of a side; the benchmark stops earlier."""
    repeats: int = 5
    """Number of timed updates of each side, after the warm-ups."""
    side: Literal["both", "ours", "trl"] = "both"
    """Side that this process runs; "both" starts a process for each side."""
    epochs: int = 1
    openings: int = 1
    """Number of openings in a prompt."""
    stop: tuple[int, ...] = ()
    """Stop tokens; without stop tokens all responses have full length."""
    flops: bool = False
    """Count floating-point operations instead of measuring time."""
    liger: bool = False
    """Let TRL compute its loss with Liger kernels, which need a GPU and the package liger-kernel."""


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Return rewards that differ within each group, because textgym skips groups of equal rewards."""
    return [float(row) for row in range(len(completions))]


def prompts(openings: int = 1) -> list[dict[str, str]]:
    from textgym.data.prompts import OPENINGS

    lines = OPENINGS.read_text().splitlines()
    return [{"prompt": " ".join(lines[i : i + openings])} for i in range(len(lines) - openings + 1)]


def ours(config: Config) -> tuple[Callable[[Callable[[], None]], Any], Callable[[], float]]:
    """Return a function that trains with a callback after every update, and one for the mean response length."""
    import gymnasium as gym

    import textgym
    from textgym.agents import GRPO, GRPOConfig

    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=config.rows,
        prompts=prompts(config.openings),
        tokenizer="tiny",
        reward=reward,
        kl_mode="deferred",
        kl_coef=BETA,
        max_new_tokens=config.new_tokens,
        min_new_tokens=0 if config.stop else config.new_tokens,
        stop=config.stop,
        device=DEVICE,
    )
    settings = GRPOConfig(
        episodes_per_update=config.rows,
        group_size=config.group_size,
        num_epochs=config.epochs,
        learning_rate=LEARNING_RATE,
        kl_in="loss",
        kl_gradient="k3",
    )
    agent = GRPO(textgym.ActorCritic.from_pretrained("tiny", device=DEVICE), envs, settings)
    lengths: list[float] = []

    def learn(after_update: Callable[[], None]) -> None:
        def note(agent: Any, metrics: dict[str, float]) -> None:
            lengths.append(metrics["val/response_tokens"])
            after_update()

        agent.learn(config.rows * config.updates, callback=[note])

    return learn, lambda: statistics.mean(lengths)


def trl(config: Config) -> tuple[Callable[[Callable[[], None]], Any], Callable[[], float]]:
    """Return the functions of `ours` for TRL."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from textgym.models.loading import resolve

    model = AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32)
    model.generation_config.eos_token_id = [model.config.eos_token_id, *config.stop]
    settings = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=config.rows,
        num_generations=config.group_size,
        num_iterations=config.epochs,
        max_completion_length=config.new_tokens,
        max_steps=config.updates * config.epochs,
        generation_kwargs=None if config.stop else {"min_new_tokens": config.new_tokens},
        beta=BETA,
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        bf16=False,
        use_liger_kernel=config.liger,
        gradient_checkpointing=False,
        use_cpu=DEVICE == "cpu",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    lengths: list[float] = []

    def noted(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return reward(completions)

    tokenizer = AutoTokenizer.from_pretrained(resolve("tiny"), padding_side="left")
    trainer = GRPOTrainer(
        model,
        noted,
        args=settings,
        train_dataset=Dataset.from_list(prompts(config.openings)),
        processing_class=tokenizer,
    )

    def learn(after_update: Callable[[], None]) -> None:
        class Note(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **columns: Any) -> None:
                if state.global_step % config.epochs == 0:
                    after_update()

        trainer.add_callback(Note())
        trainer.train()

    return learn, lambda: statistics.mean(lengths)


def run_side(config: Config) -> None:
    """Run one update at each request, or print the number of operations of an update."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    learn, length = (ours if config.side == "ours" else trl)(config)
    if config.flops:
        say({"flops": count_flops(lambda: learn(lambda: None)) / config.updates})
        return
    clock = Clock()
    clock.start()
    learn(lambda: clock.lap(tokens=length()))


def arguments(config: Config) -> list[str]:
    """Return the command line of one side."""
    given = ["--side", config.side, "--flops" if config.flops else "--no-flops"]
    given.append("--liger" if config.liger else "--no-liger")
    for name in ("rows", "group_size", "new_tokens", "updates", "epochs", "openings"):
        given += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return [*given, "--stop", *map(str, config.stop)] if config.stop else given


def one_in_thirty(new_tokens: int) -> tuple[int, ...]:
    """Return tokens, ordered by id, whose total frequency in the model's samples is 1 in 30."""
    from textgym.models.loading import load_causal_lm, load_tokenizer

    tokenizer, lm = load_tokenizer("tiny"), load_causal_lm("tiny")
    torch.manual_seed(0)
    batch = [tokenizer(row["prompt"], return_tensors="pt") for row in prompts()[:32]]
    drawn = torch.cat(
        [
            lm.generate(**x, do_sample=True, top_k=0, min_new_tokens=new_tokens, max_new_tokens=new_tokens)[0]
            for x in batch
        ]
    )
    counts = torch.bincount(drawn, minlength=len(tokenizer))
    counts[counts > len(drawn) / 100] = 0  # no frequent token, such as a full stop
    chosen = (counts.cumsum(0) <= len(drawn) / 30) & (counts > 0)
    return tuple(chosen.nonzero()[:, 0].tolist())


def compare(config: Config, flops: bool = True) -> Figures:
    """Return one row of the table, with the ratio of `flops` or without it."""
    mine, peer = replace(config, side="ours"), replace(config, side="trl")
    with (
        Side(__file__, *arguments(mine), libraries=config.trl) as one,
        Side(__file__, *arguments(peer), libraries=config.trl) as other,
    ):
        for _ in range(WARM_UPS):
            one.work(), other.work()
        timed, said, theirs = in_turns(one.work, other.work, config.repeats)
    row = {
        "prompts": "long" if config.openings > 1 else "short",
        "responses": "stop" if config.stop else "full length",
        "epochs": config.epochs,
        "tokens": said[-1]["tokens"],
        "peer's": theirs[-1]["tokens"],
        **timed,
    }
    if flops:
        counted = [
            run_script(__file__, *arguments(replace(side, flops=True, updates=2)), libraries=config.trl)["flops"]
            for side in (mine, peer)
        ]
        row["FLOPs ratio"] = counted[0] / counted[1]
    return {**row, f"bar {BAR}": "met" if timed["wall time ratio"] <= BAR else "missed"}


def main(config: Config) -> None:
    if config.side != "both":
        return run_side(config)
    stop = one_in_thirty(config.new_tokens)
    settings = [(openings, epochs, tokens) for openings, epochs in ((1, 1), (1, 4), (6, 1)) for tokens in ((), stop)]
    report(compare(replace(config, openings=n, epochs=epochs, stop=tokens)) for n, epochs, tokens in settings)
    return None


if __name__ == "__main__":
    main(tyro.cli(Config))
