"""A lint of PTX: what a program's threads did to memory must be ordered before one of them releases it."""

from __future__ import annotations

import re
from collections import defaultdict

_PREDICATE = r"(?:(@!?[%\w]+)\s+)?"
_LABEL = re.compile(r"(\$\w+):")
# Triton's own labels begin with $; a loop within inline assembly touches nothing but a barrier object.
_BRANCH = re.compile(_PREDICATE + r"bra(?:\.uni)?\s+(\$\w+)")
_END = re.compile(r"(?:ret|exit|trap)\b")
_BARRIER = re.compile(r"(?:bar(?:rier)?(?:\.cta)?\.(?:sync|red)|barrier\.cluster\.arrive)\b")
_RELEASE = re.compile(_PREDICATE + r"(?:atom|red|st)\.[\w.:]*\b(?:release|acq_rel)\b")
_ACCESS = re.compile(_PREDICATE + r"(?:ld|st|red|atom|cp\.async|cp\.reduce\.async)\.[\w.:]*\bglobal\b")


def unguarded_releases(ptx: str) -> list[str]:
    """The releases that a path reaches without a barrier after an access to global memory.

    Such a release, made by one thread, publishes what that thread did and not what the others did
    (PTX ISA, memory consistency model: causality order needs the barrier between them).

    Returns:
        A line per release: its number in the PTX and its text.
    """
    statements = [
        (number, text.strip(" \t{}"))
        for number, line in enumerate(ptx.splitlines(), 1)
        for text in line.split("//")[0].split(";")
    ]
    labels = {found[1]: i for i, (_, text) in enumerate(statements) if (found := _LABEL.match(text))}
    # whether an access may be open before a statement; paths are followed until they tell nothing new
    reached: defaultdict[int, set[bool]] = defaultdict(set)
    paths = [(0, False)]
    bad = set()
    while paths:
        i, open_access = paths.pop()
        while i < len(statements) and open_access not in reached[i]:
            reached[i].add(open_access)
            text = statements[i][1]
            if _RELEASE.match(text):
                if open_access:
                    bad.add(i)
            elif _BARRIER.match(text):
                open_access = False
            elif _ACCESS.match(text):
                open_access = True
            elif branch := _BRANCH.match(text):
                paths.append((labels[branch[2]], open_access))
                if not branch[1]:
                    break
            elif _END.match(text):
                break
            i += 1
    return [f"line {number}: {text}" for number, text in (statements[i] for i in sorted(bad))]
