"""How the tasks of one run end: threads are waited for, and of many errors the one that matters is raised.

Used by the inference stage only.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class BatchStopped(Exception):
    """The batch was cancelled or its window closed. Control flow inside the inference stage only."""


async def finish_on_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` on a thread. When cancelled, still wait for its end: nobody may close a journal under it."""
    task = asyncio.create_task(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(task)
    finally:
        await asyncio.wait([task])


@asynccontextmanager
async def first_error(group: asyncio.TaskGroup) -> AsyncIterator[asyncio.TaskGroup]:
    """Enter `group`, and raise the first error itself instead of an ExceptionGroup around it."""
    try:
        async with group:
            yield group
    except BaseExceptionGroup as errors:
        raise _leaf(errors) from None


def _leaf(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that matters: any other before a stop, a stop before nothing."""
    leaves = [_leaf(error) if isinstance(error, BaseExceptionGroup) else error for error in errors.exceptions]
    return min(leaves, key=lambda error: isinstance(error, BatchStopped))
