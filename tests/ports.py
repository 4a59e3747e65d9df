"""Ports for servers of the tests: nobody else gets one between the choice of it and the start of its server."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from vllm_batch_dagster.adapters.simulated.process import hold_port

HIGHEST = (1 << 16) - 1


@contextmanager
def hold_ports(count: int, beside: int = 0) -> Iterator[Sequence[int]]:
    """Yield free ports, each with the one that lies `beside` above it, which nobody else is given meanwhile.

    They stay bound without listening, with SO_REUSEADDR: the kernel gives them to no other program of the machine that
    asks for any port, and a server that sets SO_REUSEADDR too, as all of ours do, can still listen there.
    """
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            port = held.enter_context(hold_port()).getsockname()[1]
            if beside:
                if port + beside > HIGHEST:
                    continue
                with suppress(OSError):
                    held.enter_context(hold_port(port + beside))
                    found.append(port)
            else:
                found.append(port)
        yield found
