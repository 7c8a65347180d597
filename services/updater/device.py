"""Which device this is, and when its windows are open."""

import time
from collections.abc import Iterable
from pathlib import Path

from common.config import Updates
from common.digest import sha256

_MACHINE_ID = Path("/etc/machine-id")


def device_id(updates: Updates) -> str:
    """The device's name in rollouts: configured, else made from /etc/machine-id, which is not to
    be shown (machine-id(5)), so a hash of it."""
    if updates.device:
        return updates.device
    try:
        machine = _MACHINE_ID.read_text().strip()
    except OSError:
        machine = ""
    digest = sha256()  # not hashlib's, which would load OpenSSL: 4 MB
    digest.update(f"vigil {machine}".encode())
    return str(digest.hexdigest()[:16])


def within(windows: Iterable[str], now_s: float) -> bool:
    """Whether one of "22:00-05:30" (local time, over midnight where it ends before it begins)
    holds now; without any, always."""
    local = time.localtime(now_s)
    minute = 60 * local.tm_hour + local.tm_min
    any_window = False
    for window in windows:
        any_window = True
        begin, end = (int(t[:2]) * 60 + int(t[3:]) for t in window.split("-"))
        inside = begin <= minute < end if begin < end else minute >= begin or minute < end
        if inside or begin == end:
            return True
    return not any_window
