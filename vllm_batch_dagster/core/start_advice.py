"""What to tell the person whose engine does not start: what it means, which setting to change, and whether the same
start can succeed later. Pure; the message quotes the log's own numbers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_batch_dagster.core.start_faults import Cause, StartFault


@dataclass(frozen=True, slots=True)
class Advice:
    """`meaning` and `mend` are sentences. `may_pass`: the same start may succeed later without a change of ours."""

    meaning: str
    mend: str
    may_pass: bool = False


def advise(fault: StartFault) -> Advice:
    """Return the advice for a fault that no rung has answered."""
    return _ADVICE[fault.cause](fault.numbers)


Numbers = Mapping[str, float]


def _free_memory(numbers: Numbers) -> Advice:
    return Advice(
        f"Other programs hold the memory: {numbers['free']:g} of {numbers['total']:g} GiB are free.",
        "Stop them, or lower GPU_MEMORY_UTILIZATION.",
        may_pass=True,
    )


def _kv_space(numbers: Numbers) -> Advice:
    return Advice(
        f"The KV cache of {numbers['wanted']:g} GiB does not fit: {numbers['free']:g} of {numbers['total']:g} GiB of "
        "the machine's memory are free.",
        "Stop other programs, or lower CPU_KVCACHE_GIB.",
        may_pass=True,
    )


def _kv_too_small(numbers: Numbers) -> Advice:
    length = f"{numbers['estimated']:.0f} or less" if "estimated" in numbers else "a smaller value"
    return Advice(
        f"A request of {numbers['length']:.0f} tokens needs {numbers['needed']:g} GiB of KV cache, and there are "
        f"{numbers['available']:g} GiB.",
        f"Set --max-model-len of the model to {length}, or to `auto`, which takes what fits; or give it more memory "
        "(GPU_MEMORY_UTILIZATION, on a CPU CPU_KVCACHE_GIB). The context is never shortened below what --max-model-len "
        "states, because longer requests would then be refused.",
    )


def _say(meaning: str, mend: str, *, may_pass: bool = False) -> Callable[[Numbers], Advice]:
    return lambda _numbers: Advice(meaning, mend, may_pass)


_ADVICE: Mapping[Cause, Callable[[Numbers], Advice]] = {
    Cause.FREE_MEMORY: _free_memory,
    Cause.KV_SPACE: _kv_space,
    Cause.KV_TOO_SMALL: _kv_too_small,
    Cause.NO_KV_MEMORY: _say(
        "Weights and activations fill the engine's share of the memory.",
        "Raise GPU_MEMORY_UTILIZATION, lower MAX_NUM_BATCHED_TOKENS, or take a smaller or quantised model.",
    ),
    Cause.SEQUENCES: _say("There are too many sequences at once.", "Lower MAX_NUM_SEQS."),
    Cause.GRAPH_CAPTURE: _say(
        "Capturing CUDA graphs needs more memory than is left.",
        "Lower GPU_MEMORY_UTILIZATION, or add --enforce-eager to ENGINE_ARGS.",
    ),
    Cause.ACTIVATIONS: _say("One step of the engine needs too much.", "Lower MAX_NUM_BATCHED_TOKENS and MAX_NUM_SEQS."),
    Cause.OUT_OF_MEMORY: _say(
        "The device's memory ran out.", "Lower GPU_MEMORY_UTILIZATION, MAX_NUM_SEQS and MAX_NUM_BATCHED_TOKENS."
    ),
    Cause.HOST_MEMORY: _say(
        "The machine's memory ran out.", "Stop other programs, or lower CPU_KVCACHE_GIB.", may_pass=True
    ),
    Cause.WEIGHTS: _say(
        "The weights do not fit on the device.",
        "Take a smaller or a quantised model, or give it --tensor-parallel-size or --cpu-offload-gb in the model's "
        "`args`. The model is never quantised by itself, because its answers would change.",
    ),
    Cause.PORT_TAKEN: _say("Another program took the port.", "Set ENGINE_PORT to a free one, or to 0.", may_pass=True),
    Cause.MODEL_MISSING: _say(
        "The model was not found, or has no weights.", "Correct its `path` in the model catalogue."
    ),
    Cause.MODEL_GATED: _say(
        "The hub refuses the model.", "Ask for access on its page, set HF_TOKEN, and restart `vllm-batch up`."
    ),
    Cause.MODEL_UNREACHABLE: _say(
        "The model's files are not on this machine and the hub does not answer.",
        "Mend the network, or set the model's `path` to a folder.",
        may_pass=True,
    ),
    Cause.UNSUPPORTED: _say("This vLLM has no code for the model.", "Use another version of vLLM, or another model."),
    Cause.ARGUMENT: _say("vLLM refuses an argument.", "Correct the model's `args` or ENGINE_ARGS."),
    Cause.DEVICE: _say(
        "vLLM cannot use the device.", "Check the driver with nvidia-smi, ENGINE_DEVICE, and the model's --dtype."
    ),
    Cause.INSTALLATION: _say(
        "The engine environment is not complete.", "Run `make setup`, or set ENGINE_PYTHON to the Python that has vLLM."
    ),
    Cause.TOO_SLOW: _say("It was still loading.", "Raise ENGINE_START_SECONDS.", may_pass=True),
    Cause.UNKNOWN: _say("The log does not say it in words that are known here.", "Read its end.", may_pass=True),
}
