"""Overlap with reference texts: BLEU, chrF, TER, ROUGE and METEOR, computed by their standard libraries.

Every function reads the column `references`, with one reference text or a list of alternatives per row. Values have the
library's units: 0 to 100 for BLEU and chrF, edits per hundred words for TER (which is an error rate, so give it a
negative weight), and 0 to 1 for ROUGE and METEOR. The BLEU, chrF and TER of a whole test set are not means over texts;
`corpus` computes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from textgym.data.messages import Text, plain
from textgym.rewards.functions.references import References, listed
from textgym.rewards.functions.words import UnicodeWords, unread_share
from textgym.settings import WholeNumber, check_settings


@dataclass(frozen=True)
class CorpusMetric:
    """Base class for the metrics of sacrebleu, which have a score per text and a score per corpus."""

    def __post_init__(self) -> None:
        check_settings(self)

    def __call__(self, completions: Sequence[Text], references: References, **_: Any) -> list[float | None]:
        """Return the sentence score of each completion, or `None` where there is no reference."""
        metric = self._metric(True)
        texts = plain(completions)
        return [
            float(metric.sentence_score(text.strip(), wanted).score) if wanted else None
            for text, wanted in zip(texts, listed(references), strict=True)
        ]

    def corpus(self, completions: Sequence[Text], references: References) -> float:
        """Return the score of all completions together, equal to that of sacrebleu's command line.

        Rows without a reference are left out.

        Raises:
            ValueError: If no row has a reference.
        """
        rows = [
            (text.strip(), wanted)
            for text, wanted in zip(plain(completions), listed(references), strict=True)
            if wanted
        ]
        if not rows:
            raise ValueError(
                f"{type(self).__name__} needs references, and none of the {len(completions)} rows has one: fill the "
                "column 'references', or leave the metric out"
            )
        # sacrebleu wants one list per alternative, as long as the corpus, with `None` where a text has fewer of them.
        width = max(len(wanted) for _, wanted in rows)
        streams = [[wanted[i] if i < len(wanted) else None for _, wanted in rows] for i in range(width)]
        return float(self._metric(False).corpus_score([text for text, _ in rows], streams).score)

    def _metric(self, sentence: bool) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Bleu(CorpusMetric):
    """BLEU from 0 to 100, by sacrebleu (extra `metrics`; Post, 2018).

    Attributes:
        tokenize: Name of sacrebleu's tokeniser.
        lowercase: Whether to ignore case.

    >>> round(Bleu()(["the cat sat on the mat"], references=["the cat sat on a mat"])[0], 2)
    53.73
    """

    tokenize: str = "13a"
    lowercase: bool = False

    def _metric(self, sentence: bool) -> Any:
        # A text with fewer than 4 words has no 4-grams and would always score 0; `effective_order` leaves out the
        # orders that a text does not have. sacrebleu recommends it for sentences, and corpus BLEU is defined without
        # it.
        return _sacrebleu("BLEU", tokenize=self.tokenize, lowercase=self.lowercase, effective_order=sentence)


@dataclass(frozen=True)
class Chrf(CorpusMetric):
    """chrF from 0 to 100, by sacrebleu (extra `metrics`; Popovic, 2015).

    Attributes:
        word_order: Order of the word n-grams; 0 for chrF, 2 for chrF++.

    >>> round(Chrf()(["the cat"], references=["the cats"])[0], 2)
    77.57
    """

    word_order: WholeNumber = 0

    def _metric(self, sentence: bool) -> Any:
        return _sacrebleu("CHRF", word_order=self.word_order)


@dataclass(frozen=True)
class Ter(CorpusMetric):
    """Translation edit rate by sacrebleu: edits per hundred words, lower is better (extra `metrics`; Snover, 2006).

    >>> Ter()(["the cat sat"], references=[["the cat sat", "a cat sat"]])
    [0.0]
    """

    def _metric(self, sentence: bool) -> Any:
        return _sacrebleu("TER")


@dataclass(frozen=True)
class Rouge:
    """ROUGE F1 from 0 to 1, by rouge-score: the maximum over the references (extra `metrics`; Lin, 2004).

    rouge-score reads Latin letters without accents and digits, and nothing else. So its value of a Russian or Chinese
    text is 0 whatever the completion, and as a reward it is a constant; a warning says so. `tokenize="unicode"` reads
    every script.

    Attributes:
        kind: Which ROUGE; `rougeLsum` treats each line as a sentence.
        use_stemmer: Whether to compare the stems of words, which is for English.
        tokenize: `"latin"`, rouge-score's own, or `"unicode"`: words of every script, and single characters where a
            script has no spaces between words, such as Chinese, Japanese and Thai.

    Raises:
        ValueError: If both `use_stemmer` and `tokenize="unicode"` are chosen.

    >>> round(Rouge("rouge1")(["the cat sat"], references=["the cat ran"])[0], 3)
    0.667
    >>> Rouge("rouge1", tokenize="unicode")(["кошка спит"], references=["кошка ест"])
    [0.5]
    """

    kind: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = "rougeL"
    use_stemmer: bool = False
    tokenize: Literal["latin", "unicode"] = "latin"

    def __post_init__(self) -> None:
        check_settings(self)
        if self.use_stemmer and self.tokenize == "unicode":
            raise ValueError("use_stemmer supports only English: leave it out with tokenize='unicode'")

    def __call__(self, completions: Sequence[Text], references: References, **_: Any) -> list[float | None]:
        """Score completions."""
        scorer = _rouge(self.kind, self.use_stemmer, self.tokenize)
        wanted = listed(references)
        if self.tokenize == "latin":
            _warn_of_unread_letters(wanted)
        return [
            float(scorer.score_multi(alternatives, text)[self.kind].fmeasure) if alternatives else None
            for text, alternatives in zip(plain(completions), wanted, strict=True)
        ]


@dataclass(frozen=True)
class Meteor:
    """METEOR from 0 to 1, by nltk: the maximum over the references (extra `metrics`; Banerjee and Lavie, 2005).

    It has the parameters of the paper, and not those of the Java program METEOR 1.5, whose figures are other ones; see
    docs/rewards.md. Words match if they or their stems are equal. With `synonyms`, words that WordNet lists as synonyms
    match too; download it with `python -m nltk.downloader wordnet`.

    >>> round(Meteor()(["the cat sat"], references=["the cats sat"])[0], 3)
    0.981
    """

    synonyms: bool = False

    def __post_init__(self) -> None:
        check_settings(self)

    def __call__(self, completions: Sequence[Text], references: References, **_: Any) -> list[float | None]:
        """Score completions."""
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
            for text, wanted in zip(plain(completions), listed(references), strict=True)
        ]


class _NoSynonyms:
    """Stand-in for WordNet that has no synonyms, so that METEOR works without the download."""

    def synsets(self, word: str) -> list[Any]:
        return []


def _wordnet() -> Any:
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError as error:
        raise ImportError("Meteor(synonyms=True) needs WordNet: python -m nltk.downloader wordnet") from error
    return wordnet


@lru_cache(maxsize=16)
def _sacrebleu(name: str, **settings: Any) -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise ImportError(f"{name} needs sacrebleu: pip install 'textgym[metrics]'") from error
    return getattr(metrics, name)(**settings)


@lru_cache(maxsize=8)
def _rouge(kind: str, use_stemmer: bool, tokenize: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("Rouge needs rouge-score: pip install 'textgym[metrics]'") from error
    return RougeScorer([kind], use_stemmer=use_stemmer, tokenizer=UnicodeWords() if tokenize == "unicode" else None)


def _warn_of_unread_letters(references: list[list[str]]) -> None:
    """Warn if rouge-score does not read most letters of a reference."""
    for alternatives in references:
        for text in alternatives:
            if unread_share(text) > 0.5:
                warnings.warn(
                    f"rouge-score reads only Latin letters and digits, and most letters of the reference {text[:40]!r} "
                    "are others, so that ROUGE is near 0 whatever the completion: use Rouge(tokenize='unicode')",
                    stacklevel=3,
                )
                return
