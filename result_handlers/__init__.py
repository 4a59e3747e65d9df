"""The seed's name for the handler plug-ins: what was written for `result_handlers` runs unchanged. See `handlers`."""

from handlers.base import ResultHandler
from handlers.registry import register_handler

__all__ = ["ResultHandler", "register_handler"]
