"""Reading from an engine's log why it did not start, and what the person is told."""

import pytest

from vllm_batch_dagster.adapters.simulated.start_logs import SERVING_OUT_OF_MEMORY, failures, log_of
from vllm_batch_dagster.core.start_advice import advise
from vllm_batch_dagster.core.start_faults import Cause, StartFault, classify_log, find_memory_death, read_reduced_length

NAMED = {"cpu_free_memory": Cause.FREE_MEMORY, "auto_fit": Cause.NO_KV_MEMORY, "mamba_blocks": Cause.SEQUENCES}
# As `vllm serve` wrote them on this project's machines.
GOOD_START = """\
(APIServer pid=1) WARNING 11-26 09:59:51 [importing.py:20] ModuleNotFoundError: No module named 'triton'
(APIServer pid=1) WARNING 11-26 09:59:51 [interface.py:2] Failed to import from vllm._C: libcuda.so.1: cannot open \
shared object file: No such file or directory
(EngineCore pid=2) INFO 11-26 10:00:01 [kv_cache_utils.py:2478] Auto-fit max_model_len: reduced from 8192 to 2432 to fit
(APIServer pid=1) INFO:     Application startup complete.
"""


def classify(name: str) -> StartFault:
    return classify_log(log_of(name).splitlines())


@pytest.mark.parametrize("name", failures())
def test_each_failure_is_told_from_the_others(name: str) -> None:
    fault = classify(name)
    assert fault.cause is NAMED.get(name, Cause(name) if name not in NAMED else None)
    assert fault.quote
    assert len(fault.quote) <= 500
    assert "pid=" not in fault.quote


def test_every_cause_is_told_or_is_no_sentence_of_the_log() -> None:
    told = {classify(name).cause for name in failures()}
    assert set(Cause) - told == {Cause.TOO_SLOW, Cause.UNKNOWN}


def test_the_numbers_of_the_log_are_read() -> None:
    assert classify("free_memory").numbers == {"free": 11.39, "total": 15.57, "utilization": 0.92, "wanted": 14.33}
    assert classify("cpu_free_memory").numbers["free"] == 12.81
    assert classify("kv_space").numbers == {"free": 2.71, "total": 23.46, "wanted": 4.0}
    assert classify("kv_too_small").numbers == {"length": 32768, "needed": 4.0, "available": 2.41, "estimated": 19728}
    assert classify("sequences").numbers == {"sequences": 256}
    assert classify("mamba_blocks").numbers == {"sequences": 256, "blocks": 97}


def test_a_model_that_does_not_fit_for_a_single_token_has_no_estimate() -> None:
    text = log_of("kv_too_small").replace(
        "Based on the available memory, the estimated maximum model length is 19728. ", ""
    )
    fault = classify_log(text.splitlines())
    assert "estimated" not in fault.numbers
    assert "a smaller value" in advise(fault).mend


def test_a_log_without_a_known_sentence_is_unknown() -> None:
    assert classify_log([]) == StartFault(Cause.UNKNOWN)
    assert classify_log(GOOD_START.splitlines()).cause is Cause.UNKNOWN, "warnings are no reasons"


def test_the_memory_that_ran_out_while_serving_is_found() -> None:
    fault = find_memory_death(SERVING_OUT_OF_MEMORY.splitlines())
    assert fault is not None
    assert (fault.cause, "Tried to allocate 1.02 GiB" in fault.quote) == (Cause.OUT_OF_MEMORY, True)
    assert find_memory_death(GOOD_START.splitlines()) is None


def test_a_context_that_was_cut_is_read() -> None:
    assert read_reduced_length(GOOD_START.splitlines()) == (8192, 2432)
    assert read_reduced_length(log_of("weights").splitlines()) is None


@pytest.mark.parametrize("cause", list(Cause))
def test_there_is_advice_for_every_cause(cause: Cause) -> None:
    names = ("free", "total", "wanted", "length", "needed", "available")
    advice = advise(StartFault(cause, numbers=dict.fromkeys(names, 1.0)))
    assert advice.meaning.endswith(".")
    assert advice.mend.endswith(".")


def test_the_advice_has_the_numbers_and_the_setting() -> None:
    advice = advise(classify("kv_too_small"))
    assert "32768 tokens needs 4 GiB of KV cache, and there are 2.41 GiB" in advice.meaning
    assert "--max-model-len of the model to 19728 or less" in advice.mend
    assert not advice.may_pass
    assert "11.39 of 15.57 GiB are free" in advise(classify("free_memory")).meaning
    assert advise(classify("free_memory")).may_pass
