"""A model catalogue that is given its models."""

from collections.abc import Sequence

from vllm_batch_dagster.core.models import Model


class MemoryCatalog:
    """See ModelCatalog."""

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = tuple(models)

    def find(self, name: str) -> Model | None:
        return next((model for model in self._models if name in model.names), None)

    def all(self) -> Sequence[Model]:
        return self._models
