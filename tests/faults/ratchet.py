"""The cases that are known to be broken. A listed one may fail; one that passes must be taken off the list."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

KNOWN = Path(__file__).with_name("known_broken.json")


def read_known(path: Path = KNOWN) -> Mapping[str, str]:
    """Return case -> what is broken about it and since when."""
    known: Mapping[str, str] = json.loads(path.read_text())
    return known


def judge(outcomes: Mapping[str, Sequence[str]], known: Collection[str]) -> list[str]:
    """Return why the run fails; empty when it does not. `outcomes` are the problems of each case that was run."""
    new = [
        f"{case} is broken: {'; '.join(problems)}"
        for case, problems in outcomes.items()
        if problems and case not in known
    ]
    fixed = [
        f"{case} is mended: take it off {KNOWN.name}"
        for case in sorted(known)
        if case in outcomes and not outcomes[case]
    ]
    return [*new, *fixed]
