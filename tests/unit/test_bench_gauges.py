"""The engine's gauges as the measuring program reads, judges and draws them."""

from xml.etree import ElementTree

import pytest

from bench.chart import draw_gauges
from bench.gauges import Border, Sample, busy_span, find_borders, find_drain, read_gauges
from bench.watching import Watch, describe_watches, find_worst

METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="tiny"} 128.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="tiny"} 40.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 7.0
"""


def series(*totals: float) -> list[Sample]:
    """Samples a tenth of a second apart, half running and half waiting."""
    return [Sample(100 + index / 10, total / 2, total / 2) for index, total in enumerate(totals)]


def test_the_two_gauges_are_read_and_not_their_namesakes() -> None:
    assert read_gauges(METRICS, 5.0) == Sample(5.0, 128.0, 40.0)


def test_engines_are_summed() -> None:
    second = METRICS.replace('engine="0"', 'engine="1"')
    assert read_gauges(METRICS + second, 5.0) == Sample(5.0, 256.0, 80.0)


def test_a_text_without_the_gauges_is_no_sample() -> None:
    assert read_gauges("process_cpu_seconds_total 3.0\n", 5.0) is None
    assert read_gauges('vllm:num_requests_running{engine="0"} 1.0\n', 5.0) is None


def test_zeros_before_the_first_and_after_the_last_request_are_no_drain() -> None:
    drain = find_drain(series(0, 0, 8, 4, 6, 0, 0), first_sent=100.0, last_answer=100.6)
    assert (drain.minimum, drain.zeros, drain.samples) == (4, 0, 3)
    assert drain.lead == pytest.approx(0.2)
    assert drain.tail == pytest.approx(0.2)
    assert drain.longest_gap == pytest.approx(0.1)


def test_a_zero_between_is_a_drain() -> None:
    drain = find_drain(series(8, 0, 0, 8), first_sent=100.0, last_answer=100.3)
    assert (drain.minimum, drain.zeros) == (0, 2)


def test_samples_outside_the_batch_do_not_count() -> None:
    drain = find_drain(series(1, 8, 8, 1), first_sent=100.05, last_answer=100.25)
    assert (drain.minimum, drain.samples) == (8, 2)


def test_a_series_without_any_request_is_refused() -> None:
    with pytest.raises(ValueError, match="no sample shows a request"):
        find_drain(series(0, 0), first_sent=100.0, last_answer=100.1)


def test_a_border_has_the_least_sample_near_it() -> None:
    borders = find_borders(series(9, 9, 2, 9, 9, 9, 9, 1), starts=[100.0, 100.2, 100.5], around=0.15)
    assert borders == [Border(1, 100.2, 2), Border(2, 100.5, 9)]


def test_a_border_before_the_engine_shows_a_request_is_not_judged() -> None:
    busy = busy_span(series(0, 0, 0, 0, 5, 7, 0), first_sent=100.0, last_answer=100.6)
    assert find_borders(busy, starts=[100.0, 100.05, 100.45], around=0.1) == [
        Border(1, 100.05, None),
        Border(2, 100.45, 5),
    ]


def test_the_chart_is_well_formed_and_marks_every_border() -> None:
    samples = series(0, 120, 256, 130, 256, 0)
    chart = draw_gauges(samples, [Border(1, 100.2, 130), Border(2, 100.3, 130)], "a <title> & more")
    root = ElementTree.fromstring(chart)
    space = "{http://www.w3.org/2000/svg}"
    words = ["".join(text.itertext()) for text in root.iter(f"{space}text")]
    assert {"a <title> & more", "seconds", "requests in the engine", "running", "waiting"} <= set(words)
    assert [word for word in words if word.startswith("chunk ")] == ["chunk 0001", "chunk 0002"]
    lines = [line.get("points", "").split() for line in root.iter(f"{space}polyline")]
    assert [len(line) for line in lines] == [6, 6, 6]


def test_the_chart_stays_inside_its_frame() -> None:
    chart = draw_gauges(series(0, 512, 1), [], "t")
    root = ElementTree.fromstring(chart)
    points = [
        tuple(map(float, point.split(",")))
        for line in root.iter("{http://www.w3.org/2000/svg}polyline")
        for point in line.get("points", "").split()
    ]
    assert all(64 <= x <= 940 and 64 <= y <= 364 for x, y in points)


def test_one_sample_is_no_chart() -> None:
    with pytest.raises(ValueError, match="at least two samples"):
        draw_gauges(series(1), [], "t")


def test_the_worst_of_the_watched_batches_is_judged_and_not_the_median() -> None:
    def watch(*totals: float) -> Watch:
        samples = series(*totals)
        return Watch(find_drain(samples, 100.0, samples[-1].at), [Border(1, 100.1, totals[1])], samples, 100.0)

    watches = [watch(8, 8, 7), watch(8, 0, 7), watch(8, 8, 7)]
    figures = describe_watches(watches, watch(8, 3, 7))
    assert find_worst(watches) is watches[1]
    assert (figures[0].values, figures[0].is_met) == ((0.0,), False)
    assert [figure.values for figure in figures[1:3]] == [(0.0,), (3.0,)]
    assert watches[1].as_data()["series"][0] == "0.000 s: 4 + 4"
