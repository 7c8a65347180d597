"""The life of a camera: what happens and when, and the state that it is in then."""

from collections.abc import Callable
from typing import Any

import pytest

from common.config import Camera
from common.states import Sight
from services.capture.life import FIRST_PAUSE_S, Life, Look

CAMERA = Camera("rtsp", no_frame_s=2, lost_s=5, frozen_s=10, reconnect_max_s=8)
CLEAR: dict[str, Any] = {"brightness": 120.0, "spread": 40.0}
BLACK: dict[str, Any] = {"brightness": 3.0, "spread": 1.0}
TAPE = {"brightness": 90.0, "spread": 1.0}
NIGHT = {"brightness": 5.0, "spread": 12.0}  # too dark, though a lamp or two can be seen

# Steps: seconds, then what happens, then the state and, of a frame, what it is worth.
# A number n: a frame whose mark is n; ("raw", n): one whose pixels have the digest n.
Step = tuple[float, Any, str]
LIVES: dict[str, list[Step]] = {
    "streams from its first frame": [(0, "up", "connecting"), (0.1, 1, "streaming")],
    "stalls, and comes back": [
        (0, "up", "connecting"), (1, 1, "streaming"), (2.9, "silence", "streaming"),
        (3.1, "silence", "stalled"), (3.2, 2, "streaming"),
    ],
    "stalls, and frames come that nobody looks at": [
        (0, "up", "connecting"), (3, "silence", "stalled"), (3.1, "heard", "streaming"),
    ],
    "silent for too long": [
        (0, "up", "connecting"), (1, 1, "streaming"), (4, "silence", "stalled"),
        (6.1, "silence", "given-up"), (6.1, "gone", "lost"), (7, "up", "lost"),
        (7.1, 1, "streaming"),
    ],
    "refused from the start": [(0.5, "gone", "lost"), (2, "gone", "lost"), (9, "up", "lost")],
    "frames come, their time stands still": [
        (0, "up", "connecting"), (1, 7, "streaming"), (10.9, 7, "streaming"),
        (11, 7, "frozen FROZEN"), (11.1, 8, "streaming"),
    ],
    "frozen, a new connection shows it alive": [
        (0, "up", "connecting"), (0, 7, "streaming"), (10, 7, "frozen FROZEN"),
        (14.9, "stuck", "no"), (15, "stuck", "yes"), (15, "gone", "lost"), (16, "up", "lost"),
        (16.1, 1, "streaming"),
    ],
    "a raw picture, still the same after a new connection": [
        (0, "up", "connecting"), (0, ("raw", 5), "streaming"), (0.5, ("raw", None), "streaming"),
        (10, ("raw", 5), "frozen FROZEN"), (15, "stuck", "yes"), (15, "gone", "lost"),
        (16, "up", "lost"), (16.1, ("raw", 5), "frozen FROZEN"), (40, ("raw", 5), "frozen FROZEN"),
        (40, "stuck", "no"), (41, ("raw", 6), "streaming"),
    ],
    "a still scene of a compressed source goes on": [
        (0, "up", "connecting"), *((at, at, "streaming") for at in range(60)),
    ],
    "nothing tells frames apart": [
        (0, "up", "connecting"), (0, None, "streaming"), (99, None, "streaming"),
    ],
    "dark: each frame says it at once, the state after a second": [
        (0, "up", "connecting"), (1, 1, "streaming"), (2, (BLACK, 2), "streaming DARK"),
        (2.9, (BLACK, 3), "streaming DARK"), (3, (BLACK, 4), "dark DARK"),
        (4, 5, "dark"), (4.9, 6, "dark"), (5, 7, "streaming"),
    ],
    "a flicker is no state": [
        (0, "up", "connecting"), (1, 1, "streaming"), (2, (BLACK, 2), "streaming DARK"),
        (2.5, 3, "streaming"), (3.2, (BLACK, 4), "streaming DARK"), (3.9, 5, "streaming"),
    ],
    "covered": [
        (0, "up", "connecting"), (0, (TAPE, 1), "streaming DARK"), (1, (TAPE, 2), "dark DARK"),
    ],
    "night": [
        (0, "up", "connecting"), (0, (NIGHT, 1), "streaming DARK"), (1, (NIGHT, 2), "dark DARK"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", LIVES)
def test_a_life(name: str) -> None:
    life = Life(CAMERA, live=True, now=0)
    for seconds, happens, expected in LIVES[name]:
        now = round((1000 + seconds) * 1e9)
        state, _, worth = expected.partition(" ")
        sight = Sight.CLEAR
        match happens:
            case "up":
                life.connected(now)
            case "heard":
                life.heard(now)
            case "silence":
                given_up = life.silent(now)
                assert bool(given_up) is (state == "given-up"), seconds
                state = life.state if given_up else state
            case "gone":
                life.failed("unplugged", now)
                assert life.reason == "unplugged"
            case "stuck":
                assert life.stuck(now) is (state == "yes"), seconds
                state = life.state
            case "raw", digest:
                sight = life.frame(Look(**CLEAR, digest=digest), now)
            case dict() as look, mark:
                sight = life.frame(Look(**look, mark=mark), now)
            case mark:
                sight = life.frame(Look(**CLEAR, mark=mark), now)
        assert life.state == state, f"at {seconds} s"
        assert sight is Sight[worth or "CLEAR"], f"at {seconds} s"


def test_a_file_is_never_frozen_or_dark() -> None:
    life = Life(CAMERA, live=False, now=0)
    for second in range(100):
        assert life.frame(Look(**BLACK, mark=1, digest=1), second * 10**9) is Sight.CLEAR
    assert life.state == "streaming"


def test_a_file_is_dark_where_it_is_asked() -> None:
    life = Life(Camera("video", path="x", dark_level=8), live=False, now=0)
    assert life.frame(Look(**BLACK), 0) is Sight.DARK


def pauses(life: Life, count: int, at: Callable[[int], int] = lambda n: n) -> list[float]:
    return [life.failed("gone", at(n)) / 1e9 for n in range(count)]


def test_pauses_grow_with_jitter_up_to_the_limit() -> None:
    many = [pauses(Life(CAMERA, live=True, now=0), 8) for _ in range(50)]
    for number, column in enumerate(zip(*many, strict=True)):
        whole = min(FIRST_PAUSE_S * 2**number, CAMERA.reconnect_max_s)
        assert whole / 2 <= min(column) < max(column) <= whole
        assert len(set(column)) > 40, "what failed together does not come back together"


def test_who_streamed_for_a_while_starts_anew_with_a_short_pause() -> None:
    life = Life(CAMERA, live=True, now=0)
    pauses(life, 6)
    for streamed_s, short in ((1, False), (60, True)):
        life.connected(0)
        life.frame(Look(mark=streamed_s), round(streamed_s * 1e9))
        pause_s = life.failed("gone", round(streamed_s * 1e9)) / 1e9
        assert (pause_s <= FIRST_PAUSE_S) is short
