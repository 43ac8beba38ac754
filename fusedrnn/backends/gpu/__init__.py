"""A layer on a GPU but for its scan: rows, states, the products before and after. A backend brings `Scans`.

Not a backend itself: the GPU backends import it, and it none of them.
"""

from .backward import backward, before
from .call import Call, Cell, Saved, Scans, precision, saved_tensors
from .forward import forward, prepared, project_input

__all__ = [
    "Call",
    "Cell",
    "Saved",
    "Scans",
    "backward",
    "before",
    "forward",
    "precision",
    "prepared",
    "project_input",
    "saved_tensors",
]
