"""The life of a camera, pure: what happened and when goes in, its state comes out.

connecting -> streaming <-> stalled | frozen | dark
                  ^ all of them -> lost -> (a pause that grows) -> streaming
"""

import random
from dataclasses import dataclass

from common.config import Camera
from common.states import CameraState, Sight

DARK_S = 1.0  # dark, or bright again, for so long: the state says so; each frame says it at once
FIRST_PAUSE_S = 0.5
SETTLED_S = 10.0  # streamed for so long, the next loss is a first one again
LIVE_LEVEL, LIVE_SPREAD = 8.0, 2.0  # of grey: a live picture has more than that


@dataclass(frozen=True)
class Look:
    """What tells one frame from another.

    `brightness` and `spread` are mean and standard deviation, 0..255, each of the colour that has
    most of it; `digest` stands for its pixels, None where they were not looked at.
    """

    brightness: float = 128.0
    spread: float = 128.0
    mark: int | None = None
    digest: int | None = None


class Life:
    """
    Args:
        live: it can freeze or be covered; a file may show the same dark picture for ever.
    """

    def __init__(self, camera: Camera, *, live: bool, now: int) -> None:
        self._camera = camera
        level, spread = camera.dark_level, camera.dark_spread
        self._level = (LIVE_LEVEL if live else 0.0) if level is None else level
        self._spread = (LIVE_SPREAD if live else 0.0) if spread is None else spread
        self._frozen_ns = round(camera.frozen_s * 1e9) if live else 0
        self.state, self.since_ns, self.reason = CameraState.CONNECTING, now, ""
        self.look = Look()
        self._frame_ns = self._moved_ns = self._connected_ns = now
        self._dark_ns = 0  # since when frames are dark, or bright in the state dark; 0: they aren't
        self._failures = 0
        self._renewed = False  # a frozen camera was connected anew, in vain
        self.reconnects = 0

    def _go(self, state: CameraState, now: int, reason: str = "") -> None:
        if state is not self.state:
            self.state, self.since_ns = state, now
        self.reason = reason

    def connected(self, now: int) -> None:
        self.reconnects += self.state is not CameraState.CONNECTING
        self._frame_ns = self._connected_ns = now
        if self.look.digest is None:
            self._moved_ns = now  # else the same pixels may come again: it is as frozen as before

    def heard(self, now: int) -> None:
        """A frame came that nobody looked at."""
        self._frame_ns = now
        if self.state is CameraState.STALLED:
            self._go(CameraState.STREAMING, now)

    def frame(self, look: Look, now: int) -> Sight:
        """A frame came; what it is worth."""
        self._frame_ns = now
        moved = look.digest is not None and look.digest != self.look.digest
        moved |= look.mark is not None and look.mark != self.look.mark
        mark = self.look.mark if look.mark is None else look.mark
        digest = self.look.digest if look.digest is None else look.digest
        self.look = Look(look.brightness, look.spread, mark, digest)
        if moved or mark is digest is None:  # nothing tells one from another
            self._moved_ns = now
        frozen_ns = now - self._moved_ns
        if self._frozen_ns and frozen_ns >= self._frozen_ns:
            self._go(CameraState.FROZEN, now, f"the same picture for {frozen_ns / 1e9:.0f} s")
            return Sight.FROZEN
        self._renewed = False
        dark = look.brightness < self._level or look.spread < self._spread
        if dark is not (self.state is CameraState.DARK):
            self._dark_ns = self._dark_ns or now
        else:
            self._dark_ns = 0
        turned = self._dark_ns and now - self._dark_ns >= DARK_S * 1e9
        if dark and (turned or self.state is CameraState.DARK):
            what = "too dark" if look.brightness < self._level else "covered"
            seen = f"brightness {look.brightness:.0f}, spread {look.spread:.1f}"
            self._go(CameraState.DARK, now, f"{what}: {seen}")
        elif turned or self.state is not CameraState.DARK:
            self._go(CameraState.STREAMING, now)
        if turned:
            self._dark_ns = 0
        return Sight.DARK if dark else Sight.CLEAR

    def silent(self, now: int) -> str:
        """No frame is there; why the connection is to be given up, "" while it is not."""
        silent_s = (now - self._frame_ns) / 1e9
        if silent_s >= self._camera.lost_s:
            return f"no frame for {silent_s:.1f} s"
        if silent_s >= self._camera.no_frame_s:
            self._go(CameraState.STALLED, now, f"no frame for {silent_s:.1f} s")
        return ""

    def stuck(self, now: int) -> bool:
        """Whether it is frozen so long that a new connection is worth a try; once."""
        long = now - self.since_ns >= self._camera.lost_s * 1e9
        if self.state is not CameraState.FROZEN or not long or self._renewed:
            return False
        self._renewed = True
        return True

    def failed(self, reason: str, now: int) -> int:
        """The source is gone, or was not to be had; returns how long to wait, ns."""
        settled = self._frame_ns - self._connected_ns >= SETTLED_S * 1e9
        if settled and self.state is not CameraState.LOST:
            self._failures = 0
        self._go(CameraState.LOST, now, reason)
        pause_s = FIRST_PAUSE_S * 2.0 ** min(self._failures, 30)
        self._failures += 1
        # Jitter: what failed together does not come back together.
        return round(min(pause_s, self._camera.reconnect_max_s) * random.uniform(0.5, 1.0) * 1e9)

    def ended(self, now: int) -> None:
        self._go(CameraState.ENDED, now, "nothing more to read")
