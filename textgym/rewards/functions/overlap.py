"""Overlap with reference texts: BLEU, chrF, TER, ROUGE, METEOR, each by the library that defines it.

Every function reads the column `references`: for each row a text, or a list of texts any of which would do. Values are
in the library's own units: 0 to 100 for BLEU and chrF, edits in a hundred words for TER (so give it a negative
weight), 0 to 1 for ROUGE and METEOR. Where a metric of a whole test set is no mean of sentences, `corpus` computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from textgym.data.messages import Text, plain

References = Sequence[str | Sequence[str] | None]


@dataclass(frozen=True)
class CorpusMetric:
    """What BLEU, chrF and TER share: a metric of sacrebleu, of sentences or of a corpus."""

    def __call__(self, completions: Sequence[Text], references: References, **_: Any) -> list[float | None]:
        """The sentence score of each completion."""
        metric = self._metric(True)
        texts = plain(completions)
        return [
            float(metric.sentence_score(text.strip(), wanted).score) if wanted else None
            for text, wanted in zip(texts, _listed(references), strict=True)
        ]

    def corpus(self, completions: Sequence[Text], references: References) -> float:
        """The score of all completions together, as sacrebleu's command line prints it."""
        rows = [
            (text.strip(), wanted)
            for text, wanted in zip(plain(completions), _listed(references), strict=True)
            if wanted
        ]
        width = max(len(wanted) for _, wanted in rows)
        streams = [[wanted[i] if i < len(wanted) else None for _, wanted in rows] for i in range(width)]
        return float(self._metric(False).corpus_score([text for text, _ in rows], streams).score)

    def _metric(self, sentence: bool) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Bleu(CorpusMetric):
    """BLEU by sacrebleu, 0 to 100 (extra `metrics`; Post, 2018).

    Attributes:
        tokenize: sacrebleu's tokeniser.
        lowercase: whether case counts.

    >>> round(Bleu()(["the cat sat on the mat"], references=["the cat sat on a mat"])[0], 2)
    53.73
    """

    tokenize: str = "13a"
    lowercase: bool = False

    def _metric(self, sentence: bool) -> Any:
        return _sacrebleu("BLEU", tokenize=self.tokenize, lowercase=self.lowercase, effective_order=sentence)


@dataclass(frozen=True)
class Chrf(CorpusMetric):
    """chrF by sacrebleu, 0 to 100 (extra `metrics`; Popovic, 2015).

    Attributes:
        word_order: 2 makes it chrF++.

    >>> round(Chrf()(["the cat"], references=["the cats"])[0], 2)
    77.57
    """

    word_order: int = 0

    def _metric(self, sentence: bool) -> Any:
        return _sacrebleu("CHRF", word_order=self.word_order)


@dataclass(frozen=True)
class Ter(CorpusMetric):
    """Translation edit rate by sacrebleu: edits in a hundred words, lower is better (extra `metrics`; Snover, 2006).

    >>> Ter()(["the cat sat"], references=[["the cat sat", "a cat sat"]])
    [0.0]
    """

    def _metric(self, sentence: bool) -> Any:
        return _sacrebleu("TER")


@dataclass(frozen=True)
class Rouge:
    """ROUGE F1 by rouge-score, 0 to 1, the best over the references (extra `metrics`; Lin, 2004).

    Attributes:
        kind: `rougeLsum` takes each line for a sentence.
        use_stemmer: whether words are compared by their stems.

    >>> round(Rouge("rouge1")(["the cat sat"], references=["the cat ran"])[0], 3)
    0.667
    """

    kind: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = "rougeL"
    use_stemmer: bool = False

    def __call__(self, completions: Sequence[Text], references: References, **_: Any) -> list[float | None]:
        """Scores completions."""
        scorer = _rouge(self.kind, self.use_stemmer)
        return [
            float(scorer.score_multi(wanted, text)[self.kind].fmeasure) if wanted else None
            for text, wanted in zip(plain(completions), _listed(references), strict=True)
        ]


@dataclass(frozen=True)
class Meteor:
    """METEOR by nltk, 0 to 1, the best over the references (extra `metrics`; Banerjee and Lavie, 2005).

    Words match if they or their stems are equal; with `synonyms` also by WordNet, which nltk fetches:
    `python -m nltk.downloader wordnet`.

    >>> round(Meteor()(["the cat sat"], references=["the cats sat"])[0], 3)
    0.981
    """

    synonyms: bool = False

    def __call__(self, completions: Sequence[Text], references: References, **_: Any) -> list[float | None]:
        """Scores completions."""
        try:
            from nltk.tokenize import wordpunct_tokenize
            from nltk.translate.meteor_score import meteor_score
        except ImportError as error:
            raise ImportError("Meteor needs nltk: pip install 'textgym[metrics]'") from error
        wordnet = _wordnet() if self.synonyms else _NoSynonyms()

        def score(text: str, wanted: list[str]) -> float:
            references = [wordpunct_tokenize(reference) for reference in wanted]
            return float(meteor_score(references, wordpunct_tokenize(text), wordnet=wordnet))

        return [
            score(text, wanted) if wanted else None
            for text, wanted in zip(plain(completions), _listed(references), strict=True)
        ]


class _NoSynonyms:
    """A WordNet without words."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _wordnet() -> Any:
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise ImportError("Meteor(synonyms=True) needs WordNet: python -m nltk.downloader wordnet") from error
    return wordnet


def _listed(references: References) -> list[list[str]]:
    """The references of each row; none where the column is `None`, and the row is then left out."""
    return [[row] if isinstance(row, str) else list(row or ()) for row in references]


@lru_cache(maxsize=16)
def _sacrebleu(name: str, **settings: Any) -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise ImportError(f"{name} needs sacrebleu: pip install 'textgym[metrics]'") from error
    return getattr(metrics, name)(**settings)


@lru_cache(maxsize=8)
def _rouge(kind: str, use_stemmer: bool) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("Rouge needs rouge-score: pip install 'textgym[metrics]'") from error
    return RougeScorer([kind], use_stemmer=use_stemmer)
