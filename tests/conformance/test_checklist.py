"""The suite itself: one test for each number of the contract's checklist."""

import ast
import re
from pathlib import Path

NUMBERS = range(1, 74)


def test_every_number_has_exactly_one_test() -> None:
    trees = [ast.parse(path.read_text()) for path in Path(__file__).parent.glob("test_*.py")]
    names = [node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    numbers = [int(found[1]) for name in names if (found := re.match(r"test_h(\d{3})_", name))]
    assert sorted(numbers) == list(NUMBERS)
