"""Pretrain the embedded language model and write `textgym/models/assets/tiny`.

    python scripts/tiny/pretrain_tiny.py                  # the shipped model: one CPU core, about an hour and a half
    python scripts/tiny/pretrain_tiny.py --steps 50 --output-dir runs/tiny  # a trial
    python scripts/tiny/pretrain_tiny.py --evaluate       # the metrics of the model card, a few minutes

A byte-level BPE and a Llama-architecture decoder, trained on chitchat-dataset and the train split of the movie-review
snippets. Every row of a batch starts at the start of a document, as generation does. Left out, because a model of two
million parameters does not need it: warm restarts, dropout, data parallelism.
"""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from textgym.data.corpora.sources import chitchat, movie_snippets
from textgym.data.files import atomic_folder
from textgym.models.loading import load_causal_lm, load_tokenizer

EOS, PAD = "<|endoftext|>", "<|pad|>"
# Turns that look like contact details or are offensive are left out of the training text.
UNWANTED = re.compile(
    r"\S+@\S+\.\w+|\d{3}[-. ]\d{3}[-. ]\d{4}|\b(fuck|cunt|nigg|fag|rape|porn|slut|whore|dick|pussy)", re.I
)


@dataclass
class Config:
    output_dir: Path = Path("textgym/models/assets/tiny")
    steps: int = 25_000
    batch_size: int = 16
    context: int = 128
    vocab_size: int = 2048
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 416
    matrix_lr: float = 0.02
    """Learning rate of Muon (Jordan et al., 2024), for the weight matrices."""
    embedding_lr: float = 5e-3
    """Learning rate of AdamW, for the embeddings and norms."""
    review_weight: int = 3
    """Sampling weight of a review, relative to a chat turn."""
    seed: int = 0
    eval_every: int = 1000
    evaluate: bool = False
    """Evaluate the model in `output_dir` instead of training one."""


@dataclass
class Documents:
    """Texts of one kind: `train` and `heldout` are lists of groups; a group is a list of consecutive turns."""

    train: list[list[str]]
    heldout: list[list[str]]


def load_documents() -> dict[str, Documents]:
    """Load the texts; every fiftieth conversation is held out, and reviews are held out by `Snippet.split`."""
    chats = [[turn for turn in talk if turn and not UNWANTED.search(turn)] for talk in chitchat()]
    reviews = movie_snippets()
    return {
        "chat": Documents([c for i, c in enumerate(chats) if i % 50], [c for i, c in enumerate(chats) if i % 50 == 0]),
        "reviews": Documents(
            [[s.text] for s in reviews if s.split == "train"], [[s.text] for s in reviews if s.split != "train"]
        ),
    }


def train_tokenizer(documents: dict[str, Documents], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((turn for docs in documents.values() for group in docs.train for turn in group), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


class Stream:
    """Concatenated documents with EOS after each; batches are windows that start at the start of a document."""

    def __init__(self, groups: list[list[str]], tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator) -> None:
        self.rng = rng
        order = rng.permutation(len(groups))
        turns = [turn + EOS for index in order for turn in groups[index]]
        encoded = tokenizer(turns)["input_ids"]
        self.starts = np.cumsum([0, *map(len, encoded)])[:-1]
        self.ids = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in encoded])

    def windows(self, count: int, length: int) -> np.ndarray:
        starts = self.starts[self.rng.integers(len(self.starts), size=count)]
        return self.ids[(starts[:, None] + np.arange(length + 1)) % len(self.ids)]  # (count, length + 1)


def make_model(config: Config, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def nll(model: torch.nn.Module, ids: Tensor, reduction: str = "mean") -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), ignore_index=-100, reduction=reduction)


@torch.no_grad()
def bits_per_character(
    model: Any, groups: list[list[str]], tokenizer: PreTrainedTokenizerFast, context: int, stride: int = 64
) -> float:
    """Return bits per character of held-out groups, each after one EOS.

    Every token is predicted from the last `context - stride` to `context` tokens: windows overlap.
    """
    bits, characters = 0.0, 0
    for group in groups:
        text = "".join(turn + EOS for turn in group)
        ids = tokenizer(EOS + text)["input_ids"]
        characters += len(text) - (len(EOS) - 1) * len(group)  # an EOS counts as one character
        for start in range(0, max(len(ids) - context, 0) + stride, stride):
            window = ids[start : start + context + 1]
            known = 0 if start == 0 else context - stride  # already predicted in the previous window
            if len(window) - 1 <= known:
                break
            logits = model(input_ids=torch.tensor([window[:-1]])).logits[0, known:]
            targets = torch.tensor(window[known + 1 :])
            bits += F.cross_entropy(logits, targets, reduction="sum").item() / math.log(2)
    return bits / characters


def train(config: Config, documents: dict[str, Documents]) -> None:
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    tokenizer = train_tokenizer(documents, config.vocab_size)
    chat, reviews = documents["chat"], documents["reviews"]
    stream = Stream(chat.train + reviews.train * config.review_weight, tokenizer, rng)
    model = make_model(config, tokenizer)
    compiled = torch.compile(model)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=config.matrix_lr, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW(others, lr=config.embedding_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: schedule(step, config.steps)) for o in optimizers]
    started = time.time()
    for step in range(1, config.steps + 1):
        batch = torch.from_numpy(stream.windows(config.batch_size, config.context))
        loss = nll(compiled, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if step % config.eval_every == 0 or step == config.steps:
            figures = {
                "step": step,
                "minutes": round((time.time() - started) / 60, 1),
                "train_loss": round(loss.item(), 3),
                "chat_bpc": round(bits_per_character(model, chat.heldout, tokenizer, config.context), 4),
                "reviews_bpc": round(bits_per_character(model, reviews.heldout[:500], tokenizer, config.context), 4),
            }
            print(json.dumps(figures), flush=True)
            save(model, tokenizer, config.output_dir)


def report(config: Config, documents: dict[str, Documents]) -> dict[str, Any]:
    """Print the metrics of the model card: held-out bits per character, and samples."""
    model, tokenizer = load_causal_lm(config.output_dir), load_tokenizer(config.output_dir)
    bpc = {kind: bits_per_character(model, docs.heldout, tokenizer, config.context) for kind, docs in documents.items()}
    weights = {"chat": num_characters(documents["chat"])}
    weights["reviews"] = config.review_weight * num_characters(documents["reviews"])
    torch.manual_seed(config.seed)
    prompts = ["The movie", "A film that", "Hi, how are", "I think that"]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        # Held-out text in the proportions of the training mixture.
        "bits_per_character": sum(bpc[kind] * weights[kind] for kind in bpc) / sum(weights.values()),
        **{f"bits_per_character_{kind}": value for kind, value in bpc.items()},
        "samples": [sample(model, tokenizer, prompt) for prompt in prompts for _ in range(2)],
    }


def sample(model: Any, tokenizer: Any, prompt: str) -> str:
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, max_new_tokens=40)
    return tokenizer.decode(written[0], skip_special_tokens=True)


def num_characters(documents: Documents) -> int:
    return sum(len(turn) + 1 for group in documents.train for turn in group)


def schedule(step: int, steps: int) -> float:
    """Return the learning-rate factor: linear warm-up over 200 steps, constant, linear to 0 over the last 60%."""
    return min(step / 200, 1.0, (steps - step) / (0.6 * steps))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save fp16 safetensors and tokenizer to a temporary folder, and rename it to the target."""
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    with atomic_folder(folder, "textgym policy", type(model).__name__, overwrite=True) as temporary:
        half.half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    documents = load_documents()
    if not config.evaluate:
        train(config, documents)
    print(json.dumps(report(config, documents), indent=2))


if __name__ == "__main__":
    main(tyro.cli(Config))
