"""What a call of the program asks for: repetitions, sizes, where to work and where to write."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lines of the input files."""

    cold: int = 256
    chunks: int = 2000
    overhead: int = 5000
    memory: tuple[int, ...] = (1000, 10_000, 50_000)


QUICK = Sizes(cold=16, chunks=400, overhead=200, memory=(100, 300, 1000))


@dataclass(frozen=True, slots=True)
class Plan:
    """`folder` is temporary; `results` takes what stays."""

    folder: Path
    results: Path
    runs: int
    sizes: Sizes
