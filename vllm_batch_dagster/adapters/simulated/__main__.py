"""`python -m vllm_batch_dagster.adapters.simulated --port 8000`: serve until SIGTERM or SIGINT.

In: options, and faults in SIMULATED_FAULTS. Out: a server on loopback that looks like vLLM and says that it is not.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from vllm_batch_dagster.adapters.simulated.faults import VARIABLE, read_faults
from vllm_batch_dagster.adapters.simulated.server import Options, SimulatedEngine

_LOOPBACK = "127.0.0.1"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the server. Raises SystemExit for wrong arguments."""
    args = _parser().parse_args(argv)
    options = Options(
        models=tuple(args.model or ["simulated"]),
        latency=args.latency,
        latency_of={name: float(seconds) for name, seconds in args.latency_of},
        max_num_seqs=args.max_num_seqs,
        max_model_len=args.max_model_len,
        witness=args.witness,
        faults=read_faults(os.environ.get(VARIABLE, "")),
        api_key=args.api_key,
    )
    asyncio.run(_serve(options, args.port, args.start_seconds, args.keep_alive))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m vllm_batch_dagster.adapters.simulated", description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="loopback port")
    parser.add_argument("--model", nargs="+", metavar="NAME", help="served names; the first is echoed")
    parser.add_argument("--latency", type=float, default=0.0, metavar="S", help="seconds per request")
    parser.add_argument(
        "--latency-of", nargs=2, action="append", default=[], metavar=("NAME", "S"), help="of one model"
    )
    parser.add_argument("--max-num-seqs", type=int, default=128, help="requests at once; the others wait")
    parser.add_argument("--max-model-len", type=int, default=2048, help="longest prompt, in words")
    parser.add_argument("--witness", type=Path, metavar="FILE", help="append the X-Request-Id of every request")
    parser.add_argument("--api-key", default="", help="bearer key that /v1 asks for")
    parser.add_argument("--start-seconds", type=float, default=0.0, metavar="S", help="time until it is ready")
    parser.add_argument("--keep-alive", type=float, default=120.0, metavar="S", help="idle sockets are closed then")
    return parser


async def _serve(options: Options, port: int, start_seconds: float, keep_alive: float) -> None:
    _say(f"SIMULATED ENGINE for {', '.join(options.models)}: its answers are made up")
    await asyncio.sleep(start_seconds)
    runner = web.AppRunner(
        SimulatedEngine(options).app(),
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=keep_alive,
        shutdown_timeout=1.0,
    )
    await runner.setup()
    await web.TCPSite(runner, _LOOPBACK, port, backlog=1024).start()
    _say(f"ready on http://{_LOOPBACK}:{port}")
    await _until_told_to_stop()
    await runner.cleanup()


async def _until_told_to_stop() -> None:
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    await told.wait()


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
