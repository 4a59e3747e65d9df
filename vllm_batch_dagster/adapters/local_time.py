"""The local time of a time zone, for DISPATCH_HOURS."""

from collections.abc import Callable
from datetime import datetime
from zoneinfo import ZoneInfo


def local_time(zone: str) -> Callable[[float], datetime]:
    """Return what turns unix seconds into the local time of `zone` (IANA name), of the machine's for an empty one."""
    chosen = ZoneInfo(zone) if zone else None
    return lambda seconds: (
        datetime.fromtimestamp(seconds, chosen) if chosen else datetime.fromtimestamp(seconds).astimezone()
    )
