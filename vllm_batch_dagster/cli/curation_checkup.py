"""The rules of the curation and Label Studio as `vllm-batch doctor` sees them."""

from collections.abc import Iterator

from vllm_batch_dagster.cli.checkup import Finding
from vllm_batch_dagster.composition import ask_label_studio, load_curation_rules
from vllm_batch_dagster.core.errors import BatchError
from vllm_batch_dagster.settings import Settings

NEEDS_BOTH = "set LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY, or neither"


def check_curation(settings: Settings) -> Iterator[Finding]:
    """Warnings only: batches run, and what cannot be pushed now is pushed later."""
    try:
        loaded = load_curation_rules(settings)
        yield Finding("curation rules", "ok", f"{loaded.path or 'defaults'} ({loaded.digest})")
    except BatchError as error:
        yield Finding("curation rules", "warn", str(error), "mend the file; until then curated_export fails")
    if settings.pushes_to_label_studio:
        yield _ask(settings)
    elif settings.label_studio_url or settings.label_studio_api_key.get_secret_value():
        yield Finding("Label Studio", "warn", "off: only one of address and key is set", NEEDS_BOTH)


def _ask(settings: Settings) -> Finding:
    try:
        user = ask_label_studio(settings)
    except BatchError as error:
        return Finding("Label Studio", "warn", str(error), "check LABEL_STUDIO_URL and LABEL_STUDIO_API_KEY")
    return Finding("Label Studio", "ok", f"{settings.label_studio_url} as {user}")
