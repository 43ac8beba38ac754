"""Every attention score, by name. A new score is a file here and a kernel struct per backend."""

from .additive import ADDITIVE
from .dot import DOT
from .spec import Score

SCORES: dict[str, Score] = {score.name: score for score in (ADDITIVE, DOT)}


def factor(score: str, scale: float) -> float:
    """What a kernel multiplies a score's energies by."""
    return 1.0 if SCORES[score].weighted else scale


__all__ = ["SCORES", "Score", "factor"]
