"""textgym evaluate and chat: what a policy writes, and how good it is."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from rich.text import Text

from textgym.agents.runs.chat import chat
from textgym.agents.runs.evaluate import evaluated
from textgym.agents.runs.progress import LiveProgress
from textgym.commands import sheets
from textgym.commands.models import decoder_start, make_envs, place_of
from textgym.display import printable, rich_text
from textgym.flags import Chat, Evaluate
from textgym.models.actor_critic import ActorCritic
from textgym.models.distributions.sampling_rules import SamplingRules
from textgym.models.machine.devices import device_name


def evaluate(command: Evaluate) -> None:
    """Figures and samples of a policy and its reference on the same prompts and seeds; a task's own have intervals."""
    live, place = LiveProgress(), place_of(command)
    live.console.print(f"device: {device_name(place)}", markup=False)
    names = {"reference": command.reference, "policy": command.policy}
    if command.against is not None:
        names["other policy"] = command.against
    policies = {name: _loaded(model, command, place) for name, model in names.items()}
    envs = make_envs(command.env, command.num_envs, command.env_kwargs, place, **_models(command, **policies))
    for policy in policies.values():
        policy.rules = SamplingRules(command.min_p, command.repetition_penalty, command.no_repeat_ngram_size)
    found = evaluated(
        policies,
        envs,
        envs.unwrapped.reference,
        prompts=command.prompts,
        seed=command.seed,
        num_beams=command.num_beams,
        metrics=command.metrics,
    )
    samples = found.samples
    live.console.print(found.table())
    if command.pairwise_sheet is not None:
        other = "reference" if command.against is None else "other policy"
        for line in sheets.write(command, {name: samples[name] for name in ("policy", other)}):
            live.console.print(line, markup=False)
    for transcript in samples["policy"].transcripts[: command.samples]:
        shown = rich_text(transcript["prompt"]), rich_text(transcript["completion"], "bold")
        live.console.print(Text.assemble(*shown))


def answer(command: Chat) -> None:
    """Completions of what is typed, until the end of the input."""
    place = place_of(command)
    policy, reference = (_loaded(model, command, place) for model in (command.policy, command.reference))
    models = _models(command, policy=policy, reference=reference)
    envs = make_envs(command.env, 1, command.env_kwargs, place, on_reward_error="skip", **models)
    print("Type a prompt and press Enter. Ctrl-D ends it.", flush=True)
    chat(policy, envs, reference, typed(sys.stdin), lambda text: print(printable(text), flush=True), command.seed)


def _loaded(model: str, command: Evaluate | Chat, place: torch.device) -> ActorCritic:
    """Return a policy by its name."""
    return ActorCritic.from_pretrained(
        model, temperature=command.temperature, device=place, trust_remote_code=command.trust_remote_code
    )


def _models(
    command: Evaluate | Chat, policy: ActorCritic, reference: ActorCritic, **others: ActorCritic
) -> dict[str, Any]:
    """Return what the environment is told of the models; its reference is the one that is loaded already."""
    frozen = reference.lm.requires_grad_(False)
    return {"tokenizer": command.reference, "reference": frozen, **decoder_start(policy)}


def typed(stream: Iterable[str]) -> Iterator[str]:
    """Yield the lines of the input.

    Raises:
        ValueError: a line is no text in the input's encoding.
    """
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="surrogateescape")  # so that lines before a wrong one are answered
    for number, line in enumerate(stream, start=1):
        try:
            line.encode()
        except UnicodeEncodeError as error:
            encoding = getattr(stream, "encoding", "UTF-8")
            raise ValueError(
                f"line {number} of the input is not {encoding} text: convert it, or set PYTHONIOENCODING to what it is"
            ) from error
        yield line
