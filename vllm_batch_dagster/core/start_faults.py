"""Why an engine did not start, or died: read from the lines of its own log. Pure; the ladder answers what it finds.

In: the log of one start. Out: a cause, the numbers that the log gives for it, and the line to quote. The texts are
those of vLLM 0.32, of PyTorch and of Hugging Face's libraries; the engine report, section 7, lists the memory ones.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

_QUOTED = 500


class Cause(StrEnum):
    """What went wrong. The values are stable: they stand in metadata and in the ladder's file."""

    FREE_MEMORY = "free_memory"
    """Somebody else holds the device's memory: less is free than the share that we ask for."""
    NO_KV_MEMORY = "no_kv_memory"
    """Weights and activations fill our share: nothing is left for the KV cache."""
    KV_TOO_SMALL = "kv_too_small"
    """The KV cache does not hold one request of the stated context length."""
    KV_SPACE = "kv_space"
    """On a CPU: the stated KV cache is larger than the free memory of the machine."""
    SEQUENCES = "sequences"
    """Too many sequences at once for what is left."""
    GRAPH_CAPTURE = "graph_capture"
    """Out of memory while CUDA graphs were captured."""
    ACTIVATIONS = "activations"
    """Out of memory in the profiling run: one step of the engine is too large."""
    OUT_OF_MEMORY = "out_of_memory"
    """Out of device memory anywhere else, also while serving."""
    HOST_MEMORY = "host_memory"
    """Out of the machine's own memory."""
    WEIGHTS = "weights"
    """The weights do not fit."""
    PORT_TAKEN = "port_taken"
    MODEL_MISSING = "model_missing"
    MODEL_GATED = "model_gated"
    MODEL_UNREACHABLE = "model_unreachable"
    """The model's files are to be fetched, and the hub does not answer."""
    UNSUPPORTED = "unsupported"
    """vLLM has no code for this architecture."""
    ARGUMENT = "argument"
    DEVICE = "device"
    INSTALLATION = "installation"
    TOO_SLOW = "too_slow"
    """Still loading when ENGINE_START_SECONDS were over."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class StartFault:
    """A cause with what the log says of it. `numbers` in GiB, tokens, sequences or a share, by name; `quote` is the
    log's own line, empty when the cause is unknown."""

    cause: Cause
    quote: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)


# Most telling first: a wrapper such as "Engine core initialization failed" follows most of them in the log.
_MEMORY_PATTERNS: Sequence[tuple[Cause, str]] = (
    (Cause.WEIGHTS, r"Failed to load model - not enough GPU memory"),
    (
        Cause.FREE_MEMORY,
        r"(?:Free memory on device|Available memory on node) .*?\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on startup "
        r"is less than desired (?:GPU|CPU) memory utilization \((?P<utilization>[\d.]+), (?P<wanted>[\d.]+) GiB\)",
    ),
    (
        Cause.KV_SPACE,
        r"Available memory on node .*?\((?P<free>[\d.]+)/(?P<total>[\d.]+) GiB\) on kv cache allocation is less than "
        r"requested memory for kv \((?P<wanted>[\d.]+)",
    ),
    (
        Cause.KV_TOO_SMALL,
        r"To serve at least one request with the model's max seq len \((?P<length>\d+)\), \(?(?P<needed>[\d.]+) GiB KV "
        r"cache is needed, which is larger than the available KV cache memory \((?P<available>-?[\d.]+) GiB\)"
        r"(?:.*?estimated maximum model length is (?P<estimated>\d+))?",
    ),
    (Cause.NO_KV_MEMORY, r"No available memory for the cache blocks"),
    (Cause.NO_KV_MEMORY, r"Cannot auto-fit max_model_len: not enough GPU memory"),
    (
        Cause.SEQUENCES,
        r"CUDA out of memory occurred when warming up (?:sampler|pooler).*? with (?P<sequences>\d+) dummy requests",
    ),
    (
        Cause.SEQUENCES,
        r"max_num_seqs \((?P<sequences>\d+)\) exceeds available Mamba cache blocks \((?P<blocks>\d+)\)",
    ),
)
_OTHER_PATTERNS: Sequence[tuple[Cause, str]] = (
    (Cause.PORT_TAKEN, r"(?i)\[Errno 98\] .*|address already in use|error while attempting to bind on address"),
    (
        Cause.MODEL_GATED,
        r"(?i)gated repo|is a gated repository|GatedRepoError|Access to model .* is restricted|40[13] Client Error",
    ),
    (
        Cause.MODEL_UNREACHABLE,
        r"We couldn't connect to|Max retries exceeded|Temporary failure in name resolution|LocalEntryNotFoundError",
    ),
    (
        Cause.MODEL_MISSING,
        r"is not a local folder and is not a valid model identifier|Invalid repository ID or local directory|"
        r"Cannot find any model weights with|Repository Not Found|RepositoryNotFoundError|"
        r"is not a local folder or a valid repository name",
    ),
    (
        Cause.UNSUPPORTED,
        r"Model architectures? .* (?:are not supported for now|was supported in vLLM until|is not supported in-tree)",
    ),
    (Cause.INSTALLATION, r"No module named '?vllm"),
    (
        Cause.DEVICE,
        r"Failed to infer device type|No CUDA GPUs are available|no kernel image is available|"
        r"driver (?:version is insufficient|on your system is too old)|only supported on GPUs with compute capability",
    ),
    (
        Cause.ARGUMENT,
        r"error: (?:unrecognized arguments|argument |ambiguous option)|User-specified max_model_len|"
        r"max_num_batched_tokens \(\d+\) (?:is smaller than|must be)|invalid tool call parser|"
        r"invalid reasoning parser|validation errors? for \w+Config",
    ),
)
Compiled = Sequence[tuple[Cause, re.Pattern[str]]]
_MEMORY: Compiled = [(cause, re.compile(pattern)) for cause, pattern in _MEMORY_PATTERNS]
_OTHERS: Compiled = [(cause, re.compile(pattern)) for cause, pattern in _OTHER_PATTERNS]

_DEVICE_OOM = re.compile(r"OutOfMemoryError|(?:CUDA|HIP|XPU) (?:error: )?out of memory")
_HOST_OOM = re.compile(
    r"DefaultCPUAllocator: can't allocate|^(?:.*\s)?MemoryError|std::bad_alloc|Cannot allocate memory"
)
# Frames of the traceback above an OutOfMemoryError, which itself does not say what was going on.
_FRAMES = (
    (Cause.GRAPH_CAPTURE, re.compile(r"capture_model|capture_graph|_capture_cudagraphs|cudagraph_capture")),
    (Cause.WEIGHTS, re.compile(r"in load_model|in load_weights|in initialize_model")),
    (Cause.ACTIVATIONS, re.compile(r"in profile_run|in _dummy_run|in determine_available_memory")),
)
_PREFIX = re.compile(r"^\([^)]*pid=\d+\)\s*(?:[A-Z]+ \d\d-\d\d [\d:]+ \[[^\]]*\]\s*)?")
_AUTO_FIT = re.compile(r"Auto-fit max_model_len: reduced from (\d+) to (\d+)")


def classify_log(lines: Sequence[str]) -> StartFault:
    """Return why the engine that wrote `lines` ended; `Cause.UNKNOWN` when nothing in them is known."""
    return _match(_MEMORY, lines) or find_memory_death(lines) or _match(_OTHERS, lines) or StartFault(Cause.UNKNOWN)


def _match(patterns: Compiled, lines: Sequence[str]) -> StartFault | None:
    for cause, pattern in patterns:
        for line in lines:
            if found := pattern.search(line):
                return StartFault(cause, _quote(line, found.start()), _numbers(found))
    return None


def find_memory_death(lines: Sequence[str]) -> StartFault | None:
    """Return an exhausted memory that `lines` speak of, also of an engine that had been serving."""
    for position, line in enumerate(lines):
        if found := _DEVICE_OOM.search(line):
            return StartFault(_place(lines[:position]), _quote(line, found.start()))
        if found := _HOST_OOM.search(line):
            return StartFault(Cause.HOST_MEMORY, _quote(line, found.start()))
    return None


def read_reduced_length(lines: Sequence[str]) -> tuple[int, int] | None:
    """Return the model's context length and the shorter one to which vLLM fitted it; None when it was not cut."""
    for line in lines:
        if found := _AUTO_FIT.search(line):
            return int(found[1]), int(found[2])
    return None


def _place(above: Sequence[str]) -> Cause:
    """The innermost frame that is known decides: each is nested in one of those after it."""
    text = "\n".join(above[-200:])
    return next((cause for cause, frame in _FRAMES if frame.search(text)), Cause.OUT_OF_MEMORY)


def _quote(line: str, start: int) -> str:
    """The sentence without the prefix of vLLM's logger; from the match on when what stands before it is long."""
    clean = _PREFIX.sub("", line).strip()
    return clean[:_QUOTED] if len(clean) <= _QUOTED else line[start : start + _QUOTED].strip()


def _numbers(found: re.Match[str]) -> dict[str, float]:
    return {name: float(value) for name, value in found.groupdict().items() if value is not None}
