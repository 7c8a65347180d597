"""What no update may go below: versions of the signed metadata, its time, serials of channels,
releases. No power cut, lost metadata or wrong clock lowers one.

A floor stands for as long as the keys that raised it: a root that takes these away voids it, since
who stole them may have raised it out of everyone's reach (the TUF specification, 5.3.11).
"""

import time
import zlib
from pathlib import Path

import msgspec

from common import durable
from common.errors import UntrustedError

COPIES = ("floors.json", "floors.copy.json")  # the first that is whole counts
_MOST = 2**53  # a number beyond it was not counted up to


class Floor(msgspec.Struct, frozen=True):
    value: int
    keys: str = ""  # fingerprint of the keys that may raise it; "": nothing voids it


class Floors(msgspec.Struct, frozen=True):
    versions: dict[str, Floor] = {}  # of each role's metadata
    times: dict[str, Floor] = {}  # when a role's was signed, seconds since 1970
    serials: dict[str, Floor] = {}  # of each channel
    releases: dict[str, int] = {}  # the highest that ran, of a group and bundle

    @property
    def time_s(self) -> float:
        return max((floor.value for floor in self.times.values()), default=0)


class _File(msgspec.Struct):
    crc: int
    floors: msgspec.Raw


def load(folder: Path) -> tuple[Floors, list[Path]]:
    """The floors, and the files that are damaged; none of them there is the beginning."""
    found, damaged = [], []
    for path in (folder / name for name in COPIES):
        try:
            found.append(_parse(durable.read(path)))
        except FileNotFoundError:
            pass
        except (OSError, ValueError):
            damaged.append(path)
    return found[0] if found else Floors(), damaged


def save(folder: Path, floors: Floors) -> None:
    """
    Raises:
        StorageError: nothing that rests on them may be done.
    """
    for name in COPIES:
        durable.write(folder / name, _render(floors))


def _render(floors: Floors) -> bytes:
    body = msgspec.json.encode(floors)
    return msgspec.json.encode(_File(zlib.crc32(body), msgspec.Raw(body)))


def _parse(content: bytes) -> Floors:
    try:
        file = msgspec.json.decode(content, type=_File)
        if zlib.crc32(file.floors) != file.crc:
            raise ValueError("damaged")
        return msgspec.json.decode(file.floors, type=Floors)
    except msgspec.MsgspecError as error:
        raise ValueError(f"damaged: {error}") from error


def raised(old: dict[str, Floor], seen: dict[str, Floor], what: str) -> dict[str, Floor]:
    """The floors once these values were verified.

    Args:
        what: the value's name in messages, with {} for the floor's.

    Raises:
        UntrustedError: one is below its floor.
    """
    for name, now in seen.items():
        if not 0 <= now.value <= _MOST:
            raise UntrustedError(f"{what.format(name)} is {now.value}, expected at most {_MOST}")
        was = old.get(name)
        if was is not None and was.keys == now.keys and now.value < was.value:
            raise UntrustedError(
                f"{what.format(name)} is {now.value}, older than {was.value}, which this device "
                "has seen: somebody serves an old state (rollback)"
            )
    return old | seen


def build_time_s() -> float:
    return Path(__file__).stat().st_mtime


def believed(floors: Floors, clock_s: float, built_s: float) -> tuple[float, str]:
    """The latest time that is known to have come, and who says so. The system clock is never
    written into a floor: one that is ahead is cured by setting it."""
    return max(
        (clock_s, "so says the system clock"),
        (built_s, "when Vigil was built"),
        (floors.time_s, "when trusted metadata was signed"),
    )


def trusted_now(folder: Path) -> float:
    """Seconds since 1970, as far as can be known without a clock that is right."""
    return believed(load(folder)[0], time.time(), build_time_s())[0]
