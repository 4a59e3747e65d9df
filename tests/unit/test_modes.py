"""Who chooses the validation mode: the batch's metadata, else the server."""

from collections.abc import Mapping

import pytest

from vllm_batch_dagster.core.modes import ValidationMode, choose_mode

STRICT, LENIENT = ValidationMode.STRICT, ValidationMode.LENIENT


@pytest.mark.parametrize("default", [STRICT, LENIENT])
@pytest.mark.parametrize("metadata", [None, {}, {"validation": "Lenient"}, {"validation": ""}, {"mode": "lenient"}])
def test_metadata_of_the_users_own_chooses_nothing(metadata: Mapping[str, str] | None, default: ValidationMode) -> None:
    assert choose_mode(metadata, default) is default


@pytest.mark.parametrize("default", [STRICT, LENIENT])
@pytest.mark.parametrize("mode", [STRICT, LENIENT])
def test_the_batch_is_asked_first(mode: ValidationMode, default: ValidationMode) -> None:
    assert choose_mode({"validation": mode.value, "team": "x"}, default) is mode
