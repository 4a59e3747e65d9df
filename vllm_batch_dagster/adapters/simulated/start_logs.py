"""What vLLM, PyTorch and the hub write into the log when an engine cannot start, and the fault that writes it.

The sentences are those of vLLM 0.32 (`v1/core/kv_cache_utils.py`, `v1/worker/*.py`), PyTorch and transformers, with
numbers of a 16 GB card. Each is written as vLLM writes it: a traceback of its engine core, then the API server's own.
"""

import sys
from collections.abc import Mapping

from vllm_batch_dagster.adapters.simulated.faults import Faults

_CORE = "(EngineCore pid=42) ERROR 11-26 10:00:00 [core.py:1100] "
_API = "(APIServer pid=41) "
_TORCH_OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.02 GiB. GPU 0 has a total capacity of 15.57 GiB "
    "of which 310.19 MiB is free. Including non-PyTorch memory, this process has 15.26 GiB memory in use."
)
_SEE = "See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."

_ERRORS: Mapping[str, str] = {
    "free_memory": (
        "ValueError: Free memory on device cuda:0 (11.39/15.57 GiB) on startup is less than desired GPU memory "
        "utilization (0.92, 14.33 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
    ),
    "cpu_free_memory": (
        "ValueError: Available memory on node 0 (12.81/14.96 GiB) on startup is less than desired CPU memory "
        "utilization (0.92, 13.76 GiB). On the CPU backend, the `--gpu-memory-utilization` flag controls the fraction "
        "of CPU memory reserved (despite its name). To resolve: decrease `--gpu-memory-utilization` (e.g. "
        "`--gpu-memory-utilization 0.5`) or reduce CPU memory used by other processes."
    ),
    "kv_space": (
        "ValueError: Available memory on node 0 (2.71/23.46 GiB) on kv cache allocation is less than requested memory "
        "for kv (4.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory used by "
        "other processes."
    ),
    "no_kv_memory": (
        "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when "
        f"initializing the engine (this flag also controls CPU memory reservation on the CPU backend, despite its "
        f"name). {_SEE}"
    ),
    "auto_fit": (
        "ValueError: Cannot auto-fit max_model_len: not enough GPU memory available to serve even a single token. Try "
        "increasing `gpu_memory_utilization`."
    ),
    "kv_too_small": (
        "ValueError: To serve at least one request with the model's max seq len (32768), (4.0 GiB KV cache is needed, "
        "which is larger than the available KV cache memory (2.41 GiB). Based on the available memory, the estimated "
        "maximum model length is 19728. Try increasing `gpu_memory_utilization` (which also controls CPU memory on the "
        f"CPU backend) or decreasing `max_model_len` when initializing the engine. {_SEE}"
    ),
    "sequences": (
        "RuntimeError: CUDA out of memory occurred when warming up sampler with 256 dummy requests. Please try "
        "lowering `max_num_seqs` or `gpu_memory_utilization` when initializing the engine."
    ),
    "mamba_blocks": (
        "ValueError: max_num_seqs (256) exceeds available Mamba cache blocks (97). Each decode sequence requires one "
        "Mamba cache block, so CUDA graph capture cannot proceed. Please lower max_num_seqs to at most 97 or increase "
        "gpu_memory_utilization."
    ),
    "graph_capture": f'  File "vllm/v1/worker/gpu_model_runner.py", line 6300, in capture_model\n{_TORCH_OOM}',
    "activations": f'  File "vllm/v1/worker/gpu_model_runner.py", line 6150, in profile_run\n{_TORCH_OOM}',
    "weights": (
        "Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization to free memory for "
        "weights, increasing --tensor-parallel-size, or using --quantization. See "
        "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more tips. "
        f"(original error: {_TORCH_OOM})"
    ),
    "host_memory": (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you "
        "tried to allocate 2147483648 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "out_of_memory": _TORCH_OOM,
    "port_taken": "OSError: [Errno 98] Address already in use",
    "model_missing": (
        "OSError: someone/nothing is not a local folder and is not a valid model identifier listed on "
        "'https://huggingface.co/models'"
    ),
    "model_gated": "OSError: You are trying to access a gated repo.",
    "model_unreachable": (
        "OSError: We couldn't connect to 'https://huggingface.co' to load the files, and couldn't find them in the "
        "cached files."
    ),
    "unsupported": (
        "ValueError: Model architectures ['NewForCausalLM'] are not supported for now. Supported architectures: "
        "dict_keys(['LlamaForCausalLM'])"
    ),
    "argument": "vllm serve: error: unrecognized arguments: --max-modle-len 4096",
    "device": "RuntimeError: No CUDA GPUs are available",
    "installation": "/usr/bin/python3: No module named vllm",
}

_FAILURES = (
    "INFO 11-26 09:59:50 [utils.py:300] Initializing a V1 LLM engine (v0.32.0)",
    "WARNING 11-26 09:59:51 [importing.py:20] ModuleNotFoundError: No module named 'triton'",
)
_EPILOGUE = f"{_API}RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}"
SERVING_OUT_OF_MEMORY = f"{_CORE}EngineCore encountered a fatal error.\n{_CORE}{_TORCH_OOM}\n"


def log_of(name: str) -> str:
    """Return the log of a start that failed for the reason `name`; any other text comes back as it is."""
    error = _ERRORS.get(name)
    if error is None:
        return f"{name}\n"
    cause = [f"{_CORE}Traceback (most recent call last):", *(f"{_CORE}{line}" for line in error.splitlines())]
    return "\n".join((*_FAILURES, *cause, _EPILOGUE)) + "\n"


def failures() -> list[str]:
    """Return the reasons that `log_of` knows."""
    return list(_ERRORS)


def fail_if_told(faults: Faults, knobs: Mapping[str, float]) -> None:
    """End the process as a start that failed, unless the memory settings `knobs` satisfy the fault. Raises "
    "SystemExit."""
    needs = faults.start_needs
    if faults.start_says and not (needs and all(_holds(name, knobs[name], limit) for name, limit in needs.items())):
        write_log(log_of(faults.start_says))
        raise SystemExit(1)


_AT_LEAST = frozenset({"enforce_eager", "cpu_kvcache_gib", "raised_utilization"})


def _holds(name: str, value: float, limit: float) -> bool:
    return value >= limit if name in _AT_LEAST else value <= limit


def write_log(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
