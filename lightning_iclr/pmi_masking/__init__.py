"""PMI-Masking: Principled masking of correlated spans (Levine et al., ICLR 2021)."""

from lightning_iclr.pmi_masking.callbacks import LossByUnit, MaskedParagraph, UnitLengths
from lightning_iclr.pmi_masking.collator import (
    LinearProbability,
    PMIMaskingCollator,
    RandomTokenCollator,
    SpanMaskingCollator,
    WholeWordCollator,
)
from lightning_iclr.pmi_masking.corpora import TextSource, load_glosses
from lightning_iclr.pmi_masking.data import MaskedTextDataModule
from lightning_iclr.pmi_masking.glosses import GlossesDataModule
from lightning_iclr.pmi_masking.module import MaskedLM
from lightning_iclr.pmi_masking.multiple_choice import MultipleChoice, MultipleChoiceDataModule
from lightning_iclr.pmi_masking.ngrams import NgramTable, count_ngrams
from lightning_iclr.pmi_masking.question_answering import (
    AnswerWriter,
    QuestionAnsweringDataModule,
    SpanQuestionAnswering,
)
from lightning_iclr.pmi_masking.scores import frequency_score, naive_pmi_score, pmi_score
from lightning_iclr.pmi_masking.spans import RandomSpanCollator
from lightning_iclr.pmi_masking.text_classification import TextClassification, TextClassificationDataModule
from lightning_iclr.pmi_masking.tokenizers import load_tokenizer, train_wordpiece
from lightning_iclr.pmi_masking.vocabulary import MaskingVocabulary, VocabularySettings

__all__ = [
    "AnswerWriter",
    "GlossesDataModule",
    "LinearProbability",
    "LossByUnit",
    "MaskedLM",
    "MaskedParagraph",
    "MaskedTextDataModule",
    "MaskingVocabulary",
    "MultipleChoice",
    "MultipleChoiceDataModule",
    "NgramTable",
    "PMIMaskingCollator",
    "QuestionAnsweringDataModule",
    "RandomSpanCollator",
    "RandomTokenCollator",
    "SpanMaskingCollator",
    "SpanQuestionAnswering",
    "TextClassification",
    "TextClassificationDataModule",
    "TextSource",
    "UnitLengths",
    "VocabularySettings",
    "WholeWordCollator",
    "count_ngrams",
    "frequency_score",
    "load_glosses",
    "load_tokenizer",
    "naive_pmi_score",
    "pmi_score",
    "train_wordpiece",
]
