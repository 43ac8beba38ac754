"""`python -m fusedrnn doctor | parity | bench | demo`."""

from __future__ import annotations

import argparse
import os
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


def _process() -> int:
    """:func:`main` for a shell, which knows what ended a process: 128 and the number of a signal."""
    try:
        try:
            return main()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:  # who read this has read enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        return 128 + 13
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + 2


if __name__ == "__main__":
    sys.exit(_process())
