"""Creates Dagster's databases under DAGSTER_HOME: `python -m vllm_batch_dagster.cli.dagster_storage`.

A process of its own, because Dagster takes a second to import and keeps connections. Run by `up` and `init` before
any service: two services that meet an empty database both create it, and one dies.
"""

ENGINE_POOL = "engine"
ENGINE_RUNS = 1  # one engine, so one chunk run at a time


def main() -> None:
    from dagster import DagsterInstance

    with DagsterInstance.get() as instance:
        # Each storage creates its tables when it is first touched.
        instance.run_storage.get_run_ids(limit=1)
        instance.event_log_storage.get_pool_limits()
        instance.all_instigator_state()
        # A pool that only has a default limit lets its first two runs start together.
        instance.event_log_storage.set_concurrency_slots(ENGINE_POOL, ENGINE_RUNS)


if __name__ == "__main__":
    main()
