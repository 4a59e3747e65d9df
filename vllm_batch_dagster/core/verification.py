"""What a verification of a batch found: problems with their place and mend, notes, and how much was looked at."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

MOST_FINDINGS = 100


class Kind(StrEnum):
    """Which of a batch's files a problem is in."""

    INPUT = "input"
    INDEX = "index"
    JOURNAL = "journal"
    RESULT = "result"
    OUTPUT = "output"
    ERRORS = "errors"
    MANIFEST = "manifest"
    RECORD = "record"


@dataclass(frozen=True, slots=True)
class Problem:
    """`file` is a file id or a path in the folder of the batch; `line` counts from 1 in the file or, for journals and
    results, in the byte index; `offset` is in bytes. `mend` says what puts it right."""

    kind: Kind
    file: str
    message: str
    mend: str
    line: int | None = None
    offset: int | None = None

    @property
    def place(self) -> tuple[str, int | None]:
        return self.file, self.offset


@dataclass(slots=True)
class VerifyReport:
    """Problems are kept up to MOST_FINDINGS, and counted beyond. `checked` counts bytes, lines and answers."""

    batch_id: str
    status: str = ""
    is_published: bool = False
    problems: list[Problem] = field(default_factory=list)
    problem_count: int = 0
    notes: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)
    _places: set[tuple[str, int | None]] = field(default_factory=set)

    @property
    def is_good(self) -> bool:
        return self.problem_count == 0

    def add(self, problem: Problem) -> None:
        """Add a problem, unless one is known at the same place: the first to find it knows most."""
        if problem.offset is not None and problem.place in self._places:
            return
        self.problem_count += 1
        if len(self.problems) < MOST_FINDINGS:
            self.problems.append(problem)
            self._places.add(problem.place)

    def has(self, *kinds: Kind) -> bool:
        return any(problem.kind in kinds for problem in self.problems)


def rerun_chunk(batch_id: str, index: int) -> str:
    """Return the mend for damaged answers of a published chunk."""
    cell = f"{batch_id}|{index:04d}"
    return f"run chunk {index:04d} again: materialize partition {cell} of chunk_results; the merge follows by itself"


def merge_again(batch_id: str) -> str:
    """Return the mend for damaged merged files: they are made of journals, without an engine."""
    return f"materialize partition {batch_id} of merged_output again"


def index_again(batch_id: str) -> str:
    """Return the mend for a damaged byte index: it is made of the input file, without an engine."""
    return f"materialize partition {batch_id} of validated_input again"
