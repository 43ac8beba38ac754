"""`python -m fusedrnn bench`: torch.nn against fusedrnn, interleaved, behind a parity gate."""

from .command import main

__all__ = ["main"]
