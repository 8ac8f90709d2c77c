"""Record the numbers of TRL 1.12's PPO, its last one, on given tensors, for comparison in tests/agents.

    pip install --target .peers-ppo --no-deps trl==1.12.0
    python scripts/peers/record_ppo.py --trl .peers-ppo

TRL computes them inside one long method, `train`. So this script parses the installed source and runs the statements
that set the names below, unchanged and in order, on given tensors. The numbers are stored in tests/agents/trl/ppo.json.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import tyro

OUTPUT = Path(__file__).parents[2] / "tests" / "agents" / "trl" / "ppo.json"
SOURCE = Path("trl", "experimental", "ppo", "ppo_trainer.py")
HELPERS = ("masked_mean", "masked_var", "masked_whiten")
BEFORE = "response_idxs"
"""The first statement that is run; earlier ones collect responses."""
NAMES = set(
    re.findall(
        r"\w+",
        """
        response_idxs padding_mask sequence_lengths_p1 padding_mask_p1 values logprobs ref_logprobs
        logr kl non_score_reward rewards actual_start actual_end
        lastgaelam advantages_reversed gen_length nextvalues delta advantages returns
        mb_advantage mb_responses mb_logprobs mb_return mb_values new_logprobs vpred vpredclipped
        vf_losses1 vf_losses2 vf_loss_max vf_loss vf_clipfrac
        logprobs_diff ratio pg_losses pg_losses2 pg_loss_max pg_loss pg_clipfrac
        """,
    )
)
RECORDED = ("rewards", "values", "returns", "advantages", "vpred", "vf_loss", "vf_clipfrac", "pg_loss", "pg_clipfrac")
ROWS, WIDTH, LAST = 4, 6, (2, 5, 0, 4)  # index of each response's last token; one fills the width


@dataclass
class Args:
    trl: Path
    """Folder with the package `trl`."""


def targets(statement: ast.stmt) -> set[str]:
    """Return the names that a statement, or one nested in it, sets."""
    return {
        node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    } | {
        node.value.id
        for node in ast.walk(statement)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name)
    }


def chosen(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield assignments to the needed names; loops and branches that set only these are yielded whole."""
    for statement in statements:
        names = targets(statement) - {"t"}  # the step of the loop over time
        if names and names <= NAMES:
            yield statement
        elif isinstance(statement, ast.If | ast.For | ast.With):
            yield from chosen(statement.body)


def statements_of(source: str) -> list[ast.stmt]:
    """Return the helpers and the selected statements of `train`, in order."""
    module = ast.parse(source)
    helpers: list[ast.stmt] = [n for n in module.body if isinstance(n, ast.FunctionDef) and n.name in HELPERS]
    train = next(n for n in ast.walk(module) if isinstance(n, ast.FunctionDef) and n.name == "train")
    body = list(chosen(train.body))
    first = next(index for index, statement in enumerate(body) if targets(statement) == {BEFORE})
    return [*helpers, *body[first:]]


def given(gamma: float, lam: float, whiten_rewards: bool) -> dict[str, Any]:
    """Return the variables that the statements read but do not set."""
    rng = torch.Generator().manual_seed(0)
    old = -torch.rand(ROWS, WIDTH, generator=rng) - 0.5
    new = old + 0.3 * torch.randn(ROWS, WIDTH, generator=rng)
    values = 0.5 * torch.randn(ROWS, WIDTH, generator=rng)
    predicted = values + 0.4 * torch.randn(ROWS, WIDTH, generator=rng)
    return {
        "torch": torch,
        "INVALID_LOGPROB": 1.0,
        "args": SimpleNamespace(
            gamma=gamma,
            lam=lam,
            kl_coef=0.1,
            kl_estimator="k1",
            whiten_rewards=whiten_rewards,
            cliprange=0.2,
            cliprange_value=0.2,
        ),
        "responses": torch.zeros(ROWS, WIDTH, dtype=torch.long),
        "sequence_lengths": torch.tensor(LAST),
        "logprobs": old,
        "ref_logprobs": old + 0.5 * torch.randn(ROWS, WIDTH, generator=rng),
        "scores": torch.randn(ROWS, generator=rng),
        "values": values,
        "micro_batch_inds": slice(None),  # all rows are one batch
        "new": new,
        "selective_log_softmax": lambda *_: new,
        "logits": None,
        "context_length": 1,
        "vpred_temp": torch.cat([predicted, torch.zeros(ROWS, 1)], 1)[:, :, None],
    }


def main(args: Args) -> None:
    (metadata,) = args.trl.glob("trl-*.dist-info/METADATA")
    version = next(line for line in metadata.read_text().splitlines() if line.startswith("Version: "))
    body = statements_of((args.trl / SOURCE).read_text())
    cases = []
    for gamma, lam, whiten_rewards in ((1.0, 0.95, False), (0.9, 0.8, False), (1.0, 0.95, True)):
        names = given(gamma, lam, whiten_rewards)
        for statement in body:
            exec(compile(ast.Module([statement], []), str(SOURCE), "exec"), names)
            if targets(statement) == {"returns"}:
                names["raw_advantages"] = names["advantages"]
            if targets(statement) == {"actual_end"}:
                names["unscored"] = names["rewards"].clone()
        case = {"gamma": gamma, "lam": lam, "whiten_rewards": whiten_rewards}
        recorded = (*RECORDED, "raw_advantages", "new_logprobs", "logprobs", "unscored")
        cases.append({**case, **{name: names[name].tolist() for name in recorded}})
    shared = {"trl": version.removeprefix("Version: "), "last": LAST, "scores": names["scores"].tolist()}
    OUTPUT.write_text(json.dumps({**shared, "cases": cases}, indent=1) + "\n")
    print(f"{len(body)} statements, {len(cases)} cases of TRL {shared['trl']}: {OUTPUT}")


if __name__ == "__main__":
    main(tyro.cli(Args))
