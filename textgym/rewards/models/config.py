"""Hyperparameters for training a reward model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from textgym.settings import Count, NotNegative, OnNonFinite, Positive, Seed, Share, check_settings


@dataclass
class RewardModelConfig:
    """Hyperparameters for training a reward model."""

    matrix_learning_rate: NotNegative | None = None
    """Peak learning rate of Muon for the weight matrices; 0 trains them with AdamW instead. None: 0.02 for "tiny", and
    0 for other trunks, because large steps would destroy what they learned in pretraining."""
    learning_rate: NotNegative | None = None
    """Peak learning rate of AdamW for embeddings, norms and the reward head. None: 0.01 for "tiny", 2e-5 for other
    trunks."""
    num_layers: Count | None = None
    """Number of the trunk's lowest layers to keep; the upper layers of small models only help to predict tokens."""
    loss: Literal["pairwise", "ranked_pairs", "plackett_luce", "regression"] = "pairwise"
    """"pairwise": Bradley-Terry on pairs, each of which counts alike; a ranking of K texts is K(K-1)/2 pairs.
    "ranked_pairs": the same with the weight 1 / C(K, 2), so that each ranking counts alike (Ouyang et al., 2022,
    equation 1). "plackett_luce": likelihood of whole rankings (Plackett, 1975). "regression": squared error on ratings,
    normalised for training; scores are then in the unit of the ratings."""
    epochs: Positive = 1.0
    """Passes over the preference pairs, or rankings."""
    batch_size: Count | None = None
    """Pairs, or rankings, in one update; each of their texts is encoded once. Those with the same group or prompt
    follow each other. None: 8, and 1,024 pairs or 16 rankings of those that `textgym reward-model` makes from
    ratings."""
    warmup: Share = 0.1
    """Share of the updates during which the learning rate rises; afterwards it follows a cosine down to 0."""
    weight_decay: NotNegative = 0.1
    """Weight decay of the weight matrices."""
    mean_coefficient: NotNegative = 1.0
    """Weight of the same loss on the mean score over all tokens, which trains the score of every token."""
    use_margin: bool = False
    """Require the scores to differ by more than the pair's `margin` (Touvron et al., 2023, equation 2)."""
    label_smoothing: Share = 0.0
    """Assumed share of pairs whose labels are swapped."""
    use_probability: bool = False
    """Train on a pair's `probability`, which is how likely a rater prefers `chosen`, instead of 1."""
    center_coefficient: NotNegative = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores near 0 (Eisenstein et al., 2023)."""
    on_nonfinite: OnNonFinite = "raise"
    """What to do if the loss or the gradient of a step is NaN or infinite: `"raise"` an error, or `"skip"` the step.
    Skipped steps are counted, and more than 10 of the last 100 are an error."""
    max_length: Count = 512
    """Maximum number of tokens of a text; longer texts lose their beginning."""
    allow_faulty_rows: Share = 0.01
    """Largest share of pairs with a fault, such as a cut text or two equal sides; the data are refused if there are
    more."""
    heldout_fraction: Share = 0.1
    """Share of the pairs held out for the reported accuracy, whole prompts and groups, if no held-out pairs are
    passed."""
    bf16: bool = False
    """Train with bfloat16 autocast, which is faster on hardware with matrix units for it."""
    num_threads: Count = 1
    """Torch threads while training on a CPU. With two, training becomes very slow if another process is running."""
    seed: Seed = 0
    """Seed of the reward head and of the order of the pairs."""

    def __post_init__(self) -> None:
        check_settings(self)

    def resolved(self, base: object) -> RewardModelConfig:
        """Return a copy in which what is not set has the default for a trunk."""
        matrix, other = (0.02, 0.01) if str(base) == "tiny" else (0.0, 2e-5)
        return replace(
            self,
            matrix_learning_rate=matrix if self.matrix_learning_rate is None else self.matrix_learning_rate,
            batch_size=8 if self.batch_size is None else self.batch_size,
            learning_rate=other if self.learning_rate is None else self.learning_rate,
        )
