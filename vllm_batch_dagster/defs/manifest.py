"""What the Dagster UI shows of a batch's manifest: digests, and which engine and model gave the answers."""

from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg

from vllm_batch_dagster.core.manifest import Manifest
from vllm_batch_dagster.core.provenance import Origin
from vllm_batch_dagster.defs.services import Services
from vllm_batch_dagster.stages.manifests import manifest_path

_UNKNOWN = "unknown"


def describe_manifest(manifest: Manifest | None, services: Services) -> Mapping[str, Any]:
    """Return the metadata of `merged_output` that is about its manifest; nothing for a batch without files."""
    if manifest is None:
        return {}
    files = {"input_sha256": manifest.input, "output_sha256": manifest.output, "errors_sha256": manifest.errors}
    path = manifest_path(
        services.workspace,
        manifest.batch,
        manifest.output.name if manifest.output else None,
        manifest.errors.name if manifest.errors else None,
    )
    return {
        **{name: digest.sha256 for name, digest in files.items() if digest},
        "manifest": dg.MetadataValue.path(str(path)),
        "answered_by": dg.MetadataValue.md("\n".join(_rows(manifest.origins))),
    }


def _rows(origins: Iterable[Origin]) -> Iterable[str]:
    yield "| model | weights | engine | device | dtype |"
    yield "|---|---|---|---|---|"
    for origin in origins:
        weights, engine = origin.model.weights, origin.engine
        cells = (
            origin.model.name,
            f"{weights.digest[:16]} ({weights.method})" if weights else _UNKNOWN,
            f"{engine.kind} {', '.join(engine.versions) or _UNKNOWN}",
            engine.device or _UNKNOWN,
            engine.dtype or _UNKNOWN,
        )
        yield "| " + " | ".join(cells) + " |"
