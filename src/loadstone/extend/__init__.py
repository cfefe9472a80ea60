"""Vocabulary extension: new tokens for tokenizer and model in one call, and what they did to the old text.

Why not as others do it: transformers' `resize_token_embeddings` knows nothing of the tokenizer, so ids and rows drift
apart, a padded matrix is cut, and new tokens that fall into padding keep untrained rows; it sets `requires_grad` anew.
torchtune and litgpt leave the rows to the user. Nobody measures; here each way to initialise is, before one is chosen.
"""

from .extension import extend
from .report import Report
from .rows import METHODS
from .tokens import extend_tokenizer, unused_by_template, with_chat_template
from .view import matrix_view

__all__ = [
    "METHODS",
    "Report",
    "extend",
    "extend_tokenizer",
    "matrix_view",
    "unused_by_template",
    "with_chat_template",
]
