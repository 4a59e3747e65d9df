"""What `up` says when everything is ready, in the foreground and detached. Pure."""

from vllm_batch_dagster.cli.addresses import listening_addresses
from vllm_batch_dagster.settings import Settings


def banner(settings: Settings, seconds: float, *, is_detached: bool) -> list[str]:
    """Return the lines that say where everything is, after a start that took `seconds`."""
    urls = {address.service: address.url for address in listening_addresses(settings)}
    stop = "`vllm-batch down`" if is_detached else "Ctrl-C here, or `vllm-batch down` elsewhere"
    return [
        f"ready in {seconds:.0f} s",
        f"  API         {urls['api']}/v1",
        f"  Dagster UI  {urls['web']}",
        f"  state       {settings.vllm_batch_home}",
        f"  stop        {stop}",
    ]
