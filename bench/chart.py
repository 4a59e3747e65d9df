"""Draws the gauges of a batch as an SVG: running and waiting over time, chunk borders marked. Pure, by hand."""

from collections.abc import Iterator, Sequence

from bench.gauges import Border, Sample

WIDTH, HEIGHT = 960, 420
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 64, 56
_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_LABEL_ROWS = 5  # the first window may begin several chunks at once
_SERIES = (("running + waiting", "#555555"), ("running", "#1f77b4"), ("waiting", "#d95f02"))


def draw_gauges(samples: Sequence[Sample], borders: Sequence[Border], title: str) -> str:
    """Return the chart. Time 0 is the first sample. Raises ValueError for fewer than two samples."""
    if len(samples) < 2:
        raise ValueError("a chart needs at least two samples")
    axes = _Axes(samples[0].at, samples[-1].at, max(sample.total for sample in samples))
    rows = (
        ([sample.total for sample in samples], _SERIES[0][1]),
        ([sample.running for sample in samples], _SERIES[1][1]),
        ([sample.waiting for sample in samples], _SERIES[2][1]),
    )
    times = [sample.at for sample in samples]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" role="img" aria-label="{_escape(title)}">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="15" font-weight="bold">{_escape(title)}</text>',
        *_legend(),
        *axes.draw(),
        *(part for border in borders for part in axes.mark(border)),
        *(axes.line(times, values, colour) for values, colour in rows),
        *map(axes.dot, samples),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


class _Axes:
    """Maps time and count to the picture."""

    def __init__(self, begin: float, end: float, highest: float) -> None:
        self._begin = begin
        self._seconds = max(end - begin, 0.001)
        self._step = _pick_step(highest, 6)
        self._top = self._step * (int(highest / self._step) + 1)

    def x(self, at: float) -> float:
        return round(LEFT + (at - self._begin) / self._seconds * (WIDTH - LEFT - RIGHT), 1)

    def y(self, count: float) -> float:
        return round(HEIGHT - BOTTOM - count / self._top * (HEIGHT - TOP - BOTTOM), 1)

    def draw(self) -> Iterator[str]:
        """Yield grid, ticks and the names of the axes."""
        foot, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for number in range(int(self._top / self._step) + 1):
            y = self.y(number * self._step)
            yield f'<line x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}" stroke="#dddddd"/>'
            yield f'<text x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{number * self._step:g}</text>'
        step = _pick_step(self._seconds, 10)
        for number in range(int(self._seconds / step) + 1):
            x = self.x(self._begin + number * step)
            yield f'<line x1="{x}" y1="{foot}" x2="{x}" y2="{foot + 5}" stroke="black"/>'
            yield f'<text x="{x}" y="{foot + 19}" text-anchor="middle">{number * step:g}</text>'
        yield f'<path d="M{LEFT},{TOP} V{foot} H{right}" fill="none" stroke="black"/>'
        yield f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 12}" text-anchor="middle">seconds</text>'
        middle = (TOP + foot) / 2
        yield f'<text transform="translate(16,{middle}) rotate(-90)" text-anchor="middle">requests in the engine</text>'

    def mark(self, border: Border) -> Iterator[str]:
        """Yield the line at which a chunk begins."""
        x = self.x(border.at)
        yield f'<line x1="{x}" y1="{TOP}" x2="{x}" y2="{HEIGHT - BOTTOM}" stroke="#999999" stroke-dasharray="4 3"/>'
        y = TOP + 11 + 12 * ((border.index - 1) % _LABEL_ROWS)
        yield f'<text x="{x + 3}" y="{y}" font-size="10" fill="#666666">chunk {border.index:04d}</text>'

    def dot(self, sample: Sample) -> str:
        """A dot per reading: how dense they are is part of the evidence."""
        return f'<circle cx="{self.x(sample.at)}" cy="{self.y(sample.total)}" r="1.6" fill="{_SERIES[0][1]}"/>'

    def line(self, times: Sequence[float], values: Sequence[float], colour: str) -> str:
        points = " ".join(f"{self.x(at)},{self.y(value)}" for at, value in zip(times, values, strict=True))
        return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'


def _legend() -> Iterator[str]:
    x = LEFT
    for name, colour in _SERIES:
        yield f'<line x1="{x}" y1="42" x2="{x + 22}" y2="42" stroke="{colour}" stroke-width="3"/>'
        yield f'<text x="{x + 28}" y="46">{name}</text>'
        x += 150
    yield f'<line x1="{x}" y1="42" x2="{x + 22}" y2="42" stroke="#999999" stroke-dasharray="4 3"/>'
    yield f'<text x="{x + 28}" y="46">first line of a chunk is sent</text>'


def _pick_step(span: float, most: int) -> float:
    """Return the smallest round step that needs at most `most` ticks."""
    return next((step for step in _STEPS if span / step <= most), _STEPS[-1])


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
