"""`python -m vllm_batch_dagster.adapters.simulated --port 8000`: serve until SIGTERM or SIGINT.

In: options, faults in SIMULATED_FAULTS, the witness log in SIMULATED_WITNESS. Out: a server on loopback that looks like
vLLM and says that it is not.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from aiohttp import web

from vllm_batch_dagster.adapters.simulated.faults import VARIABLE, read_faults
from vllm_batch_dagster.adapters.simulated.server import Options, SimulatedEngine
from vllm_batch_dagster.adapters.simulated.start_logs import fail_if_told

_LOOPBACK = "127.0.0.1"
_WITNESS_VARIABLE = "SIMULATED_WITNESS"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the server. Raises SystemExit for wrong arguments."""
    args = _parser().parse_args(argv)
    fail_if_told(read_faults(os.environ.get(VARIABLE, "")), read_knobs(args))
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


def read_knobs(args: argparse.Namespace) -> Mapping[str, float]:
    """Return the memory settings of the command line and the environment, by the names of `Faults.start_needs`."""
    return {
        "max_num_seqs": args.max_num_seqs,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "gpu_memory_utilization": args.gpu_memory_utilization,
        "raised_utilization": args.gpu_memory_utilization,
        "enforce_eager": float(args.enforce_eager),
        "cpu_kvcache_gib": float(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 0),
    }


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
    witness = os.environ.get(_WITNESS_VARIABLE) or None
    witness_help = f"append the X-Request-Id of every request (default: {_WITNESS_VARIABLE})"
    parser.add_argument("--witness", type=Path, default=witness, metavar="FILE", help=witness_help)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.0, help="looked at by start faults only")
    parser.add_argument("--max-num-batched-tokens", type=int, default=0, help="looked at by start faults only")
    parser.add_argument("--enforce-eager", action="store_true", help="looked at by start faults only")
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
