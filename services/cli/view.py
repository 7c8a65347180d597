"""A page to look through: every camera live with what its model finds, rates, states, incidents.

Nothing is encoded, and nothing is listened to, unless somebody looks.
"""

import argparse
import json
import os
import re
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from common.errors import ConfigError, NotRunningError, VigilError
from common.messages import TruthItem
from common.paths import Paths
from common.processes import processes
from services.cli.listen import configuration, listener, require_running
from services.cli.observe import PREFIXES, Observer, Status
from services.cli.web import Answer, Headers, Request, Server

if TYPE_CHECKING:
    from services.cli.live import Live, Shot  # brings cv2, which only a picture needs

PORT = 8600
NICE = 10  # the lanes come first
FIRST_S = 1.5  # listened before the first word: three beats
ROUND_S = 1.0
BATCH_S = 0.02  # messages gather for so long: fewer wakings
ASKED_S = 3.0  # nobody has asked for so long: nothing is listened to
NEWS_S = 0.5  # a request for a picture waits so long for a newer one
TICK_S = 0.02
TRUTH_TICKS = 3  # what is true of a frame is heard a little later
SIDES = (320, 640, 960)  # of pictures, pixels

_PAGE = Path(__file__).with_name("page")
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
JSON = "application/json"
TOKEN = re.compile("[A-Za-z0-9_-]{8,64}")
LOOPBACK = ("127.0.0.1", "::1")

_EPILOG = """\
examples:
  vigil view                        at http://127.0.0.1:8600
  vigil view --address 0.0.0.0      for the network: prints the address with its token

It is plain HTTP: where the network is not trusted, look through `ssh -L 8600:127.0.0.1:8600`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help=f"({PORT})")
    parser.add_argument(
        "--address", default="127.0.0.1", help="(127.0.0.1); any that is not this device's own "
        "asks for a token"
    )  # fmt: skip
    parser.add_argument("--token", help="ask for this one, instead of one that is made")


def run(args: argparse.Namespace) -> int:
    watch = Watch(Paths.from_environment())
    door = Door(args.token)
    try:
        server = Server(args.address, args.port, Site(watch, door).answer)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{args.address}:{args.port}: can't listen there: {error}; expected an --address of "
            "this device and a --port that is free"
        ) from error
    address, port = server.server_address[:2]
    if str(address) not in LOOPBACK:
        door.make_token()
    os.nice(NICE)
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"Look at {door.url(str(address), port)} (Ctrl-C ends it)", flush=True)
        watch.run()
    return 0


class Door:
    """Who may look: with a token, whoever has it; else whoever asks for this very device, which no
    page elsewhere can make a browser do (DNS rebinding)."""

    def __init__(self, token: str | None) -> None:
        if token is not None and not TOKEN.fullmatch(token):
            raise ConfigError("--token: expected 8 to 64 of A-Z, a-z, 0-9, _ and -")
        self._token = token

    def make_token(self) -> None:
        import secrets

        self._token = self._token or secrets.token_urlsafe(16)

    def url(self, address: str, port: int) -> str:
        host = socket.gethostname() if address in ("0.0.0.0", "::") else address
        place = f"[{host}]" if ":" in host else host
        return f"http://{place}:{port}/" + (f"?token={self._token}" if self._token else "")

    def ask(self, request: Request) -> Answer | Headers:
        """The headers of the answer to who may come in; the answer to who may not."""
        if self._token is None:
            host = request.headers.get("host", "").lower()
            if re.sub(r":\d+$", "", host).strip("[]") in ("localhost", *LOOPBACK):
                return ()
            return Answer(403, b"this page is for a browser on the device itself\n")
        cookies = re.findall(r"(?:^|;\s*)vigil=([^;]*)", request.headers.get("cookie", ""))
        if any(self._is(cookie) for cookie in cookies):
            return ()
        if self._is(request.query.get("token", "")):
            return (("Set-Cookie", f"vigil={self._token}; Path=/; HttpOnly; SameSite=Strict"),)
        return Answer(401, b"open the address that vigil view has printed, with its token\n")

    def _is(self, said: str) -> bool:
        import hmac

        assert self._token is not None
        return hmac.compare_digest(said.encode(), self._token.encode())


class Site:
    """What is answered to whom."""

    def __init__(self, watch: "Watch", door: Door) -> None:
        self._watch, self._door = watch, door

    def answer(self, request: Request) -> Answer:
        headers = self._door.ask(request)
        if isinstance(headers, Answer):
            return headers
        if file := FILES.get(request.path):
            return Answer(200, (_PAGE / file[0]).read_bytes(), file[1], headers)
        folder, _, name = request.path.rpartition("/")
        try:
            if request.path == "/api/status":
                return Answer(200, msgspec.json.encode(self._watch.seen()), JSON, headers)
            if folder == "/api/picture" and name in self._watch.config.cameras:
                return self._picture(name, request.query, headers)
        except VigilError as error:
            return Answer(503, msgspec.json.encode({"error": str(error)}), JSON, headers)
        return Answer(404, b"no such page\n")

    def _picture(self, name: str, query: dict[str, str], headers: Headers) -> Answer:
        """The JPEG, with all that is known of it in a header: never those of two frames."""
        asked = query.get("width", "")
        wanted = int(asked) if re.fullmatch("[0-9]{1,5}", asked) else SIDES[-1]
        side = next((side for side in SIDES if side >= wanted), SIDES[-1])
        shot = self._watch.picture(name, side, query.get("after", ""))
        if shot is None:
            return Answer(204, headers=headers)
        truth = self._watch.truth(name, shot.frame)
        told = {
            "id": shot.id,
            "age_s": round((time.monotonic_ns() - shot.captured_ns) / 1e9, 3),
            "truth": None if truth is None else shot.truth(truth),
            **shot.told,
        }
        head = "Vigil-Picture", json.dumps(told, separators=(",", ":"))
        return Answer(200, shot.jpeg, "image/jpeg", (*headers, head))


class Seen(Status, kw_only=True):
    """What the page shows besides pictures."""

    encoded: int  # pictures, since the start


class Watch:
    """Looks at the system while somebody asks; `run` does the listening."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self.config = configuration(paths)
        self._lives: dict[tuple[str, int], Live] = {}
        self._lock = threading.Lock()
        self._change = threading.Condition()
        self._asked_s = 0.0
        self._said: Status | VigilError | None = None
        self._observer: Observer | None = None

    def seen(self) -> Seen:
        """Raises: VigilError: why nothing can be said."""
        with self._change:
            self._asked_s = time.monotonic()
            self._change.notify_all()
            self._change.wait_for(lambda: self._said is not None, 3 * FIRST_S)
            said = self._said
        if not isinstance(said, Status):
            raise said or NotRunningError("nothing could be heard")
        encoded = sum(live.encoded for live in list(self._lives.values()))
        return Seen(**msgspec.structs.asdict(said), encoded=encoded)

    def picture(self, name: str, side: int, after: str) -> "Shot | None":
        """The newest picture; None where none but `after` comes within NEWS_S."""
        with self._lock:
            if (live := self._lives.get((name, side))) is None:
                from services.cli.live import Live

                live = Live(self._paths, name, self.config.cameras[name], side)
                self._lives[name, side] = live
        until = time.monotonic() + NEWS_S
        while (shot := live.newest()) is None or shot.id == after:
            if time.monotonic() > until:
                return None
            time.sleep(TICK_S)
        return shot

    def truth(self, name: str, frame: tuple[int, int]) -> Sequence[TruthItem] | None:
        for _ in range(TRUTH_TICKS if self.config.cameras[name].source == "virtual" else 0):
            observer = self._observer
            if observer is None or (truth := observer.truth(name, frame)) is not None:
                return truth if observer else None
            time.sleep(TICK_S)
        return None

    def run(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(self._wanted)
            try:
                self._listen()
            except VigilError as error:
                self._say(error)
                time.sleep(ROUND_S)
            self._observer = self._said = None

    def _wanted(self) -> bool:
        return time.monotonic() - self._asked_s < ASKED_S

    def _listen(self) -> None:
        config = configuration(self._paths)
        names = [process.name for process in processes(config)]
        with self._lock:
            if config != self.config:
                self._lives.clear()
            self.config = config
        with listener(config, self._paths, PREFIXES) as listening:
            self._observer = Observer(config, self._paths, listening)
            self._observer.listen(FIRST_S, BATCH_S)
            while self._wanted():
                require_running(self._paths, names)  # else another vigil.toml may be next
                self._say(self._observer.status())
                self._observer.listen(ROUND_S, BATCH_S)

    def _say(self, said: Status | VigilError) -> None:
        with self._change:
            self._said = said
            self._change.notify_all()
