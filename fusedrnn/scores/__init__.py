"""Every attention score, by name. A new score is a file here and a kernel struct per backend."""

from .additive import ADDITIVE
from .dot import DOT
from .spec import Score

SCORES: dict[str, Score] = {score.name: score for score in (ADDITIVE, DOT)}

__all__ = ["SCORES", "Score"]
