"""What a call of the program asks for: repetitions, sizes, where to work and where to write."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Sizes:
    """Lines of the input files; of `upload` and `upload_memory` megabytes; of `stored` batches; `polling` seconds; of
    `kills` and `kills_real` lines and kills."""

    cold: int = 256
    chunks: int = 2000
    overhead: int = 5000
    memory: tuple[int, ...] = (1000, 10_000, 50_000)
    validation: int = 50_000
    validation_long: int = 1_000_000
    upload: int = 1000
    upload_memory: tuple[int, ...] = (10, 200, 2000)
    stored: int = 10_000
    polling: int = 20
    recovery: int = 1000
    journal: int = 20_000
    million: int = 1_000_000
    kills: tuple[int, int] = (50_000, 100)
    kills_real: tuple[int, int] = (500, 10)


QUICK = Sizes(
    cold=16,
    chunks=400,
    overhead=200,
    memory=(100, 300, 1000),
    validation=500,
    validation_long=1000,
    upload=20,
    upload_memory=(1, 10, 20),
    stored=200,
    polling=3,
    recovery=200,
    journal=1000,
    million=3000,
    kills=(3000, 4),
    kills_real=(60, 2),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """`folder` is temporary; `results` takes what stays."""

    folder: Path
    results: Path
    runs: int
    sizes: Sizes
