"""See the package."""

from handlers.base import ResultHandler

__all__ = ["ResultHandler"]
