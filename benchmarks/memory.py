"""Peak memory of one PPO update by vocabulary size, compared with the PPO of TRL 1.12, its last version with PPO.

    python benchmarks/memory.py --trl .peers/trl-1.12 .peers/site-packages        # installation: measuring/peers.py
    python benchmarks/memory.py --trl                                             # textgym only

One update: 64 episodes of 16 + 48 tokens, one epoch of 4 minibatches. Policy, critic, reference and reward model are
random models, 128 wide and 2 layers deep, so that most weights depend on the vocabulary. "separate" has a critic with
its own trunk, which TRL requires; "shared" is textgym's default. Each run is a process of its own and measures the
second update, when Adam's moments exist.

    peak       peak memory of rollout and update in MB, minus the memory of the process before it made the models
    state      bytes of weights of the four models, gradients and Adam's two moments. All of them grow with the
               vocabulary in any implementation
    working    peak - state: activations, logits and temporary tensors; if the embedding is tied to the head also its
               second gradient, because autograd computes one for each use before it adds them
    growth     working divided by working of the first vocabulary size
    update     for textgym: working without the rollout, and its growth

On the CPU memory is the resident set size of the process, whose peak the kernel records. `MALLOC_MMAP_THRESHOLD_` makes
malloc return freed blocks at once; otherwise the peak would include memory that malloc keeps. On CUDA it is the memory
that torch allocated.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from measuring.device import DEVICE
from measuring.peers import Figures, report, run_script, say

PEAK_BAR, GROWTH_BAR = 0.5, 0.2


@dataclass
class Config:
    trl: tuple[Path, ...] = (Path(".peers/trl-1.12"), Path(".peers/site-packages"))
    """Folders with the packages `trl` and `datasets`; without folders only textgym is measured."""
    vocab_sizes: tuple[int, ...] = (50_000, 150_000)
    hidden_size: int = 128
    layers: int = 2
    tied: bool = True
    """Whether input and output embedding share their weights."""
    rows: int = 64
    prompt_tokens: int = 16
    new_tokens: int = 48
    side: Literal["all", "separate", "shared", "trl"] = "all"
    """What this process runs; "all" starts a process for each side and vocabulary size."""
    model: Path = Path()
    """Folder of the random model, for one side."""


class Meter:
    """Measures the peak memory of an update."""

    def __init__(self) -> None:
        self.before, self.updates, self.rollout = _memory("VmRSS"), 0, 0
        self.figures: Figures = {}

    def lap(self) -> int:
        """Return the peak in bytes since the last lap, and reset it."""
        peak = _memory("VmHWM") - self.before
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")
        return peak

    def note_rollout(self) -> None:
        """Record the peak of a rollout; called by sides that separate rollout and training."""
        self.rollout = self.lap()

    def note_update(self, models: Sequence[torch.nn.Module], optimizer: Any) -> None:
        """Record the peak of an update; the second update is reported."""
        self.updates += 1
        update = self.lap()
        if self.updates == 2:
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            tensors = {p.data_ptr(): p for model in models for p in model.parameters()}
            state = sum(p.nbytes for p in tensors.values()) + 3 * sum(p.nbytes for p in trained)
            figures = {"peak": max(update, self.rollout), "state": state}
            figures["working"] = figures["peak"] - state
            if self.rollout:
                figures["update"] = update - state
            self.figures = {name: size / 2**20 for name, size in figures.items()}


def _memory(what: Literal["VmRSS", "VmHWM"]) -> int:
    """Return the current or the peak memory in bytes."""
    if DEVICE == "cuda":
        return torch.cuda.memory_allocated() if what == "VmRSS" else torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def classifier(config: Config) -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(config.model, num_labels=1, dtype=torch.float32)


def ours(config: Config) -> Figures:
    import gymnasium as gym

    import textgym
    from textgym import RewardModel
    from textgym.agents import PPO, PPOConfig
    from textgym.models.loading import load_tokenizer

    meter, tokenizer = Meter(), load_tokenizer(config.model)
    envs = gym.make_vec(
        "textgym/Text-v0",
        num_envs=config.rows,
        prompts=[" ".join(f"w{10 * row + i}" for i in range(config.prompt_tokens)) for row in range(config.rows)],
        tokenizer=tokenizer,
        reward=RewardModel(classifier(config).to(DEVICE), tokenizer),
        kl_mode="deferred",
        kl_coef=0.05,
        max_prompt_tokens=config.prompt_tokens,
        max_new_tokens=config.new_tokens,
        min_new_tokens=config.new_tokens,
        device=DEVICE,
    )
    policy = textgym.ActorCritic.from_pretrained(config.model, critic=config.side, device=DEVICE)
    settings = PPOConfig(episodes_per_update=config.rows, minibatch_size=config.rows // 4, num_epochs=1)
    agent = PPO(policy, envs, settings)
    models = [policy, agent.penalty.reference, envs.unwrapped.scorer.functions[0].model]
    collect = agent.collect

    def collected() -> Any:
        rollout = collect()
        meter.note_rollout()
        return rollout

    agent.collect = collected  # type: ignore[method-assign]
    agent.learn(2 * config.rows, callback=[lambda agent, _: meter.note_update(models, agent.optimizer)])
    return meter.figures


def trl(config: Config) -> Figures:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    meter = Meter()
    policy, reference = (AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32) for _ in range(2))
    critic, reward = classifier(config), classifier(config)
    rows = [[10 * row + i for i in range(config.prompt_tokens)] for row in range(2 * config.rows)]
    prompts = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    settings = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=config.rows,
        num_mini_batches=4,
        local_rollout_forward_batch_size=config.rows,
        total_episodes=2 * config.rows,
        num_ppo_epochs=1,
        response_length=config.new_tokens,
        temperature=1.0,
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
        processing_class=AutoTokenizer.from_pretrained(config.model, padding_side="left"),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=prompts,
        eval_dataset=prompts,
    )

    class Note(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **columns: Any) -> None:
            meter.note_update([policy, critic, reference, reward], trainer.optimizer)

    trainer.add_callback(Note())
    trainer.train()
    return meter.figures


def make_model(config: Config, vocab_size: int, folder: str) -> None:
    """Write a random model whose tokens are the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2").save_pretrained(folder)
    shape = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=3 * config.hidden_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.hidden_size // 64,
        max_position_embeddings=config.prompt_tokens + config.new_tokens + 1,
        tie_word_embeddings=config.tied,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(folder)


def arguments(config: Config) -> list[str]:
    given = ["--side", config.side, "--model", str(config.model)]
    for name in ("rows", "prompt_tokens", "new_tokens"):
        given += [f"--{name.replace('_', '-')}", str(getattr(config, name))]
    return given


def compare(config: Config) -> list[Figures]:
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    sides: list[Any] = ["separate", "shared", *(["trl"] if config.trl else [])]
    peaks: dict[tuple[str, int], Figures] = {}
    for vocab_size in config.vocab_sizes:
        with tempfile.TemporaryDirectory() as folder:
            make_model(config, vocab_size, folder)
            for side in sides:
                run = replace(config, side=side, model=Path(folder))
                peaks[side, vocab_size] = run_script(__file__, *arguments(run), libraries=config.trl)
    rows = []
    for (side, vocab_size), figures in peaks.items():
        row = {"side": side, "vocabulary": vocab_size, **figures}
        first = peaks[side, config.vocab_sizes[0]]
        row["growth"] = figures["working"] / first["working"] - 1
        row["update"] = figures.get("update", "")
        row["update's growth"] = figures["update"] / first["update"] - 1 if "update" in figures else ""
        if config.trl:
            row["peak to TRL's"] = figures["peak"] / peaks["trl", vocab_size]["peak"]
        if side != "trl":
            row["bar: growth"] = "met" if row["growth"] < GROWTH_BAR else "missed"
            if config.trl:
                row["bar: peak"] = "met" if row["peak to TRL's"] <= PEAK_BAR else "missed"
        rows.append(row)
    return rows


def main(config: Config) -> None:
    torch.set_num_threads(1)
    if config.side == "all":
        report(compare(config))
    else:
        say((trl if config.side == "trl" else ours)(config))


if __name__ == "__main__":
    main(tyro.cli(Config))
