"""What a scenario found: figures with their repetitions, targets, notes. Pure; `report` writes them down."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Target:
    """The median of a figure must be at most (or at least) `limit`."""

    limit: float
    at_least: bool = False

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    @property
    def words(self) -> str:
        return f"at {'least' if self.at_least else 'most'} {format_number(self.limit)}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity, measured once per repetition. Raises ValueError when there is no value."""

    name: str
    unit: str
    values: tuple[float, ...]
    target: Target | None = None

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"the figure {self.name!r} has no value")

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    @property
    def is_met(self) -> bool | None:
        """Whether the median meets the target; None when the figure has none."""
        return None if self.target is None else self.target.is_met(self.median)

    def as_data(self) -> dict[str, Any]:
        """Return what the JSON file holds."""
        target = {"words": self.target.words, "limit": self.target.limit, "met": self.is_met} if self.target else None
        spread = {"median": round(self.median, 4), "min": round(self.low, 4), "max": round(self.high, 4)}
        return {"name": self.name, "unit": self.unit, **spread, "values": [round(v, 4) for v in self.values]} | (
            {"target": target} if target else {}
        )


@dataclass(frozen=True, slots=True)
class Result:
    """One scenario. `setup` says what was run, `raw` holds every repetition as it was read."""

    name: str
    title: str
    figures: Sequence[Figure]
    setup: Mapping[str, Any] = field(default_factory=dict)
    raw: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()


def collect(name: str, unit: str, rows: Sequence[Mapping[str, Any]], key: str, target: Target | None = None) -> Figure:
    """Return the figure that takes `key` from each repetition."""
    return Figure(name, unit, tuple(float(row[key]) for row in rows), target)


def format_number(value: float) -> str:
    """Three significant digits below 100, whole numbers above."""
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
