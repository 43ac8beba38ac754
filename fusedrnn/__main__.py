"""`python -m fusedrnn doctor | parity | bench | demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "doctor": "what runs on this machine, and what does not and why",
    "parity": "every cell, attention, dtype and instruction set against torch under the error budget",
    "bench": "times against torch, interleaved: of layers, or of attention",
    "demo": "two trained models of other people, before and after replace()",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command with the arguments that follow it; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn",
        description="Fused recurrent kernels for PyTorch.",
        epilog="\n".join(f"{name:8}{what}" for name, what in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help=" | ".join(COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command; --help lists them")
    parsed = parser.parse_args(argv)
    status: int = import_module(f"fusedrnn.{parsed.command}").main(parsed.arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
