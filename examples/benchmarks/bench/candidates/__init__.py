"""Choices between candidates: retrieved ones ranked again by letters, random ones answered by title."""

from .answers import Answer, AnswerReport, TitleAnswers, read_answer
from .candidate_training import CandidateTraining, KeptEpoch
from .letters import LetterModel, letter_tokens
from .prompts import LETTERS, TITLES, CandidatePrompts, ChoiceTemplate, normalised
from .reranker import Reranker, reranked_scores
from .sets import CandidateSet, Retriever, draw_candidates
from .task import CandidateTask

__all__ = [
    "LETTERS",
    "TITLES",
    "Answer",
    "AnswerReport",
    "CandidatePrompts",
    "CandidateSet",
    "CandidateTask",
    "CandidateTraining",
    "ChoiceTemplate",
    "KeptEpoch",
    "LetterModel",
    "Reranker",
    "Retriever",
    "TitleAnswers",
    "draw_candidates",
    "letter_tokens",
    "normalised",
    "read_answer",
    "reranked_scores",
]
