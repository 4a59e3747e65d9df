"""The `vllm-batch` command: a front door like the API and the graph. `main` has the list of subcommands."""
