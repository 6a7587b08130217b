"""Choices between candidates: retrieved ones ranked again by letters, random ones answered by title."""

from .answers import Answer, AnswerReport, TitleAnswers, read_answer
from .candidate_prompts import LETTERS, TITLES, CandidatePrompts, ChoiceTemplate, normalised
from .candidate_sets import CandidateSet, Retriever, draw_candidates
from .candidate_task import CandidateTask
from .candidate_training import CandidateTraining, KeptEpoch
from .letters import LetterModel, letter_tokens
from .reranking import Reranker, reranked_scores

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
