"""Choices between candidates: retrieved ones ranked again by letters, random ones answered by title."""

from .answers import AnswerReport, TitleAnswers
from .candidate_training import CandidateTraining
from .letters import LetterModel, letter_tokens
from .prompts import LETTERS, TITLES, CandidatePrompts, ChoiceTemplate
from .reranker import Reranker
from .sets import Retriever
from .task import CandidateTask

__all__ = ["LETTERS", "TITLES", "AnswerReport", "CandidatePrompts", "CandidateTask", "CandidateTraining"]
__all__ += ["ChoiceTemplate", "LetterModel", "Reranker", "Retriever", "TitleAnswers", "letter_tokens"]
