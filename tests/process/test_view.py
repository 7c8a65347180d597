"""`vigil view` on the real system, in a real browser, at the sizes of a desktop and a phone.

VIGIL_SHOTS=FOLDER keeps pictures of the page, for people.
"""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest

from common import bus
from common.frames import Ring
from common.messages import Result
from common.paths import PROJECT, Paths
from services.cli import web
from tests.support import System, until

DESKTOP, PHONE, SMALL = (1440, 900), (390, 844), (360, 740)
ZONE = [[40, 60], [300, 60], [300, 420], [40, 420]]
CONFIG = f"""
[cameras.belt]
source = "virtual"
fps = 10
slots = 8
[cameras.belt.zones.left]
points = {ZONE}
[cameras.shelf]
source = "folder"
path = "shelf"
fps = 5
[groups.main]
model = "{PROJECT}/models/factory"
hang_s = 30
"""


class Viewer:
    """The command, beside whatever runs."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "services.cli.main", "view", "--port", "0", *arguments],
            cwd=PROJECT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        said = re.search(r"http://\S+?:(\d+)/\S*", self.process.stdout.readline())
        assert said is not None
        self.url, self.port = said[0], int(said[1])

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), body

    def status(self) -> Any:
        status, _, body = self.get("/api/status")
        assert status == 200, body
        return json.loads(body)

    def stop(self) -> None:
        self.process.kill()
        self.process.__exit__(None, None, None)


@pytest.fixture
def viewer(paths: Paths) -> Iterator[Callable[..., Viewer]]:
    started: list[Viewer] = []

    def start(*arguments: str) -> Viewer:
        started.append(Viewer(*arguments))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def config(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a system that does not run."""
    file = paths.root / "vigil.toml"
    file.write_text(CONFIG)
    monkeypatch.setenv("VIGIL_CONFIG", str(file))
    return file


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


class Browser:
    """Chromium, driven as a user would look."""

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for argument in (
            "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage",
            f"user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(f"--{argument}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SHIFTS})
        self.driver.get("about:blank")
        self.requests()

    def size(self, size: tuple[int, int], scheme: str = "dark") -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(f"return {script}", *arguments)

    def text(self, selector: str) -> str:
        """What is to be read there, as it is shown."""
        return str(self.run(TEXT, selector))

    def until(self, selector: str, *words: str, timeout_s: float = 15) -> str:
        seen = ""

        def shown() -> bool:
            nonlocal seen
            seen = self.text(selector)
            return all(word in seen for word in words)

        try:
            until(shown, timeout_s, f"{words} in {selector}")
        except AssertionError as error:
            raise AssertionError(f"{error}: {seen!r}\n{self.text('body')}") from None
        return seen

    def shot(self, name: str) -> None:
        if folder := os.environ.get("VIGIL_SHOTS"):
            self.driver.save_screenshot(f"{folder}/{name}.png")

    def log(self, kind: str) -> list[dict[str, Any]]:
        return list(self.driver.get_log(kind))  # type: ignore[no-untyped-call]

    def requests(self) -> list[str]:
        """Every address that was asked for since the last call."""
        logged = self.log("performance")
        messages = (json.loads(row["message"])["message"] for row in logged)
        return [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    one = Browser(tmp_path / "profile")
    yield one
    one.driver.quit()


SHIFTS = """
window.shifted = 0;
new PerformanceObserver((list) => list.getEntries().forEach((one) => { shifted += one.value; }))
  .observe({ type: "layout-shift", buffered: true });
"""
TEXT = """(() => {
  const node = document.querySelector(arguments[0]);
  return node?.checkVisibility() ? node.innerText : "";
})()"""


def camera(name: str, part: str = "") -> str:
    return f'[data-camera="{name}"] {part}'.strip()


# What is drawn over the picture, in shares of its width.
SHOWN = """(() => {
  const stage = document.querySelector('[data-camera="belt"] .stage');
  const all = (kind) => [...stage.querySelectorAll(`.over .${kind}`)];
  const place = (node) => {
    const r = node.getBoundingClientRect(), s = stage.getBoundingClientRect();
    return [r.left - s.left, r.top - s.top, r.right - s.left, r.bottom - s.top]
      .map((x) => x / s.width);
  };
  return {
    sequence: +stage.dataset.sequence,
    items: all("item").map((g) => [g.dataset.label, g.dataset.score, place(g.firstChild)]),
    truth: all("truth").length,
    zones: all("zone").map((g) => [g.dataset.name, place(g.firstChild)]),
  };
})()"""


def judged(paths: Paths, sequence: int) -> Result:
    with Ring.open(paths.rings, paths.accounts, "belt", 1) as ring:
        entry = ring.entry(sequence)
        assert entry is not None
        result = bus.decode("result/belt", entry.result)
        assert isinstance(result, Result)
        return result


def drawn_where_the_result_says(browser: Browser, paths: Paths) -> None:
    """The line is two pixels wide and lies half outside."""
    shown: dict[str, Any] = {}

    def drawn() -> bool:
        shown.update(browser.run(SHOWN))
        return bool(shown["items"] and shown["truth"])

    until(drawn, 10, "boxes of what is found and of what is there")
    items = [item for item in judged(paths, shown["sequence"]).items if item.box][::-1]
    assert [(item.label, f"{item.score:.3f}") for item in items] == [
        (label, score) for label, score, _ in shown["items"]
    ]
    for item, (_, _, place) in zip(items, shown["items"], strict=True):
        assert item.box is not None
        assert place == pytest.approx([side / 640 for side in item.box], abs=0.008)
    ((name, place),) = shown["zones"]
    assert name == "left"
    assert place == pytest.approx([x / 640 for x in (40, 60, 300, 420)], abs=0.008)


def heard(process: psutil.Process) -> bool:
    """Whether it is connected to the messages of any process."""
    return len(process.net_connections("unix")) > 1


def test_the_page(
    system: Callable[[str], System],
    viewer: Callable[..., Viewer],
    browser: Browser,
    paths: Paths,
) -> None:
    shelf = paths.root / "shelf"
    shelf.mkdir()
    noise = np.random.default_rng(1).integers(0, 255, (240, 320, 3), np.uint8)
    cv2.imwrite(str(shelf / "one.png"), noise)
    line = system(CONFIG)
    line.until_valid()
    viewed = viewer()
    eyes = psutil.Process(viewed.process.pid)
    assert eyes.nice() >= 10
    assert not heard(eyes), "nothing is listened to before somebody asks"
    status = viewed.status()
    assert [row["name"] for row in status["cameras"]] == ["belt", "shelf"]
    assert status["cameras"][0]["zones"] == {"left": ZONE}
    assert status["encoded"] == 0
    assert heard(eyes)
    assert not any("cv2" in mapped.path for mapped in eyes.memory_maps())

    browser.size(DESKTOP)
    browser.driver.get(viewed.url)
    browser.until(camera("belt"), "streaming", "valid", "precision", "compute infer")
    browser.until("#verdict", "all is well")
    drawn_where_the_result_says(browser, paths)
    browser.until(camera("belt", "[data-f=precision]"), "0.")
    for name in ("precision", "recall"):
        assert float(browser.text(camera("belt", f"[data-f={name}]"))) > 0.8
    assert browser.text(camera("shelf", ".scores")) == ""
    assert "valid" in browser.text(camera("shelf", ".head"))
    browser.until("#models", "live", "standby", "factory")
    assert "capture-shelf" in browser.text("#processes")
    assert browser.text("#incidents li") == "none"
    assert browser.run("window.shifted") < 0.05, "what is read does not move"
    browser.shot("desktop-dark")

    browser.size(SMALL)
    drawn_where_the_result_says(browser, paths)
    asked = browser.requests()
    seen = browser.run(SHOWN)["sequence"]
    until(lambda: browser.run(SHOWN)["sequence"] > seen + 5, 10, "more pictures")
    since = browser.requests()
    assert [url for url in since if "/api/picture/belt" in url]
    assert not [url for url in since if "/api/picture/shelf" in url], "it is below the screen"
    asked += since

    for size, scheme in ((SMALL, "dark"), (PHONE, "light")):
        browser.size(size, scheme)
        drawn_where_the_result_says(browser, paths)
        assert browser.run("document.documentElement.scrollWidth") <= size[0]
        browser.shot(f"{size[0]}-{scheme}")

    lane = line.process("inference-main-a")
    assert lane is not None
    lane.kill()
    browser.until("#incidents", "inference-main-a", "valid again after")
    shutil.rmtree(shelf)
    browser.until(camera("shelf", ".stage"), "LOST", "root/shelf: ")
    browser.until("#problems", "shelf: the camera is lost")
    assert "problem" in browser.text("#verdict")
    assert "▲" in browser.driver.title
    stage = browser.run("getComputedStyle(document.querySelector('[data-alarm] canvas')).filter")
    assert "grayscale(1)" in stage
    assert browser.text(camera("belt", ".alarm")) == "", "the other camera is not blamed"
    browser.size(DESKTOP, "light")
    browser.shot("lost-light")

    belt = line.process("capture-belt")
    assert belt is not None
    belt.send_signal(signal.SIGSTOP)
    browser.until(camera("belt", ".stage"), "STALE", "old")
    browser.shot("stale-light")
    until(lambda: browser.text(camera("belt", ".alarm")) == "", 15, "the watchdog restarts it")

    asked += browser.requests()
    assert [url for url in asked if not url.startswith(viewed.url)] == []
    assert browser.log("browser") == []

    tab = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    until(lambda: not heard(eyes), 10, "nobody looks, and nothing is listened to")
    before = viewed.status()
    captured = before["cameras"][0]["account"]["captured"]
    more = lambda: viewed.status()["cameras"][0]["account"]["captured"] > captured + 5  # noqa: E731
    until(more, 10, "more frames")
    assert viewed.status()["encoded"] == before["encoded"] > 20
    browser.driver.switch_to.window(tab)
    browser.until(camera("belt", ".head"), "valid")
    line.stop()
    browser.until("#banner", "nothing runs under")
    browser.until(camera("belt", ".stage"), "NOT RUNNING")
    viewed.stop()
    browser.until("#banner", "lost the device")
    browser.until(camera("belt", ".stage"), "NO CONNECTION")
    browser.shot("no-connection-light")


def test_one_picture_for_all_who_look(
    system: Callable[[str], System],
    viewer: Callable[..., Viewer],
    paths: Paths,
    stack: ExitStack,
) -> None:
    """A picture, its result and its truth are of one frame, encoded once; beside them hang clients
    that read nothing."""
    line = system(CONFIG[: CONFIG.index("[cameras.shelf]")] + CONFIG[CONFIG.index("[groups") :])
    line.until_valid()
    viewed = viewer()
    eyes = psutil.Process(viewed.process.pid)
    before = viewed.status()
    assert before["encoded"] == 0
    for _ in range(40):
        client = stack.enter_context(socket.create_connection(("127.0.0.1", viewed.port)))
        client.sendall(b"GET /api/picture/belt?width=640 HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
    looked: list[dict[str, Any]] = []
    lookers = [threading.Thread(target=look, args=(viewed, looked)) for _ in range(3)]
    for looker in lookers:
        looker.start()
    for looker in lookers:
        looker.join(30)
    assert len(looked) == 30
    seen = {told["id"]: told for told in looked}
    for told in seen.values():
        result = judged(paths, told["sequence"])
        assert told["result"]["captured_ns"] == result.captured_ns
        boxes = [list(item.box or ()) for item in result.items]
        assert [item["box"] for item in told["result"]["items"]] == [
            pytest.approx(box, abs=0.06) for box in boxes
        ]
    assert any(told["truth"] for told in seen.values()), "it is waited for, but not for long"
    after = viewed.status()
    captured = [one["cameras"][0]["account"]["captured"] for one in (before, after)]
    assert len(seen) <= after["encoded"] <= captured[1] - captured[0] + 15  # status is a second old
    assert eyes.num_threads() < web.CONNECTIONS + 15
    assert eyes.memory_info().rss < 150e6


def look(viewed: Viewer, looked: list[dict[str, Any]]) -> None:
    """As the page does: ask for the next picture, ten times, and again where that fails."""
    after, until_s, count = "", time.monotonic() + 20, 0
    while count < 10 and time.monotonic() < until_s:
        try:
            status, headers, body = viewed.get(f"/api/picture/belt?width=640&after={after}")
        except ConnectionError:
            continue
        assert status == 200
        told = json.loads(headers["Vigil-Picture"])
        picture = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_COLOR)
        assert picture is not None
        assert picture.shape == (480, 640, 3)
        assert told["id"] != after
        after = told["id"]
        looked.append(told)
        count += 1


def test_who_may_look(viewer: Callable[..., Viewer], paths: Paths, config: Path) -> None:
    """On the device itself, whoever asks for the device by its own name."""
    viewed = viewer()
    for host, status in (
        (f"127.0.0.1:{viewed.port}", 200), ("LOCALHOST:9", 200), ("[::1]:80", 200),
        ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost:80:80", 403), ("", 403),
    ):  # fmt: skip
        assert viewed.get("/", Host=host)[0] == status, host
        assert viewed.get("/api/status", Host=host)[0] == (503 if status == 200 else 403)
    for path in (
        "/page", "/page.html", "/view.py", "/../view.py", "/%2e%2e/view.py", "//etc/passwd",
        "/page/page.js", "/page.js/..", "/api/picture/", "/api/picture/nobody",
        "/api/picture/../picture/belt", "/api/picture/belt/", "/api/",
    ):  # fmt: skip
        assert viewed.get(path)[0] == 404, path
    assert viewed.get("/api/picture/belt")[0] == 204  # no frame yet
    assert viewed.get("/api/picture/belt?width=99999999999&after=%00")[0] == 204


def test_another_address_asks_for_a_token(viewer: Callable[..., Viewer], config: Path) -> None:
    viewed = viewer("--address", "0.0.0.0")
    token = viewed.url.partition("?token=")[2]
    assert len(token) >= 16
    for path in ("/", "/page.js", "/api/status", "/api/picture/belt"):
        for wrong in ("", "?token=", "?token=wrong", f"?token={token}x", f"?tokn={token}"):
            assert viewed.get(path + wrong)[0] == 401, path + wrong
        assert viewed.get(path, Cookie=f"vigil={token}x; other={token}")[0] == 401
    status, headers, _ = viewed.get(f"/?token={token}", Host="device.example")
    assert status == 200
    assert headers["Set-Cookie"] == f"vigil={token}; Path=/; HttpOnly; SameSite=Strict"
    cookie = headers["Set-Cookie"].partition(";")[0]
    status, headers, _ = viewed.get("/page.js", Cookie=f"a=b; {cookie}", Host="device.example")
    assert status == 200
    assert "Set-Cookie" not in headers
    assert viewer("--token", "chosen-by-me").get("/?token=chosen-by-me")[0] == 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--token", "short"], "8 to 64"),
        (["--token", "with; semicolon"], "8 to 64"),
        (["--address", "192.0.2.1"], "192.0.2.1:8600: can't listen there"),
        (["--port", "99999"], "99999: can't listen there"),
    ],
)
def test_what_it_can_not_do_is_one_line(config: Path, arguments: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "services.cli.main", "view", *arguments],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_page_is_all_there_is() -> None:
    """Nothing inline, which its own policy forbids, and nothing from elsewhere."""
    page = (PROJECT / "services/cli/page/page.html").read_text()
    assert not re.findall(r"<style|<script>|\son\w+=|\sstyle=|javascript:", page)
    for file in ("page.html", "page.css", "page.js"):
        text = (PROJECT / "services/cli/page" / file).read_text()
        assert set(re.findall(r"\w+://[^\"'\s]+", text)) <= {"http://www.w3.org/2000/svg"}
