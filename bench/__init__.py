"""`python -m bench`: measures the product against vLLM's run_batch and the targets. See docs/benchmarks.md."""
