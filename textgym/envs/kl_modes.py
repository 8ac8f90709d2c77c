"""What each `kl_mode` of an environment can do, and what applies the KL penalty."""

from __future__ import annotations

from textgym.envs.config import KLMode
from textgym.envs.spaces import KLPayer
from textgym.models.distributions.masks import ActionMask
from textgym.rewards.kl import KLController, KLPenalty, warn_of_filter
from textgym.settings import Estimator

ESTIMATORS: dict[KLMode, tuple[Estimator, ...]] = {
    "reference": ("k1",),
    "exact": ("k1", "k2", "k3"),
    "deferred": ("k1", "k2", "k3", "full"),
}
"""Estimators that are possible in each mode. An environment sees the log-probs of tokens, not whole distributions."""


def check_kl_mode(
    mode: KLMode,
    penalty: KLPenalty | None,
    coef: float | KLController,
    estimator: Estimator,
    clamp: float | None,
    action_mask: ActionMask | None,
) -> None:
    """Check that an environment can apply a KL penalty in a mode.

    Args:
        mode: The mode.
        penalty: The penalty, `None` without a reference.
        coef: Its coefficient, beta.
        estimator: Its estimator.
        clamp: Its bound, in nats a token.
        action_mask: The environment's mask.

    Raises:
        ValueError: If it cannot.
    """
    if penalty is None:
        if mode != "deferred" and coef != 0:
            raise ValueError("kl_coef is set but there is no reference: name one, for example reference='tiny'")
        return
    if estimator not in ESTIMATORS[mode]:
        raise ValueError(
            f"kl_estimator={estimator!r} is not possible in kl_mode={mode!r}, which has {ESTIMATORS[mode]}; "
            "kl_mode='deferred' has all estimators"
        )
    if mode == "reference" and (clamp is not None or not isinstance(coef, int | float)):
        raise ValueError(
            "kl_mode='reference' does not compute the KL, so there can be no kl_clamp and no controller: give kl_coef "
            "as a number and no kl_clamp, or use kl_mode='deferred'"
        )
    if mode != "deferred" and coef != 0:
        warn_of_filter(action_mask, estimator)


def kl_payer(mode: KLMode, coef: float | KLController) -> KLPayer:
    """Return what applies the KL penalty."""
    if (coef if isinstance(coef, int | float) else coef.coef) == 0:
        return "nobody"
    return "agent" if mode == "deferred" else "environment"
