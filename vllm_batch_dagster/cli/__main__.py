"""`python -m vllm_batch_dagster.cli`: the same as the `vllm-batch` command."""

from vllm_batch_dagster.cli.main import run

if __name__ == "__main__":
    run()
