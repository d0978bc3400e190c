"""Headless Chromium, controlled through a pair of pipes: no driver, no port, no other package."""

import base64
import contextlib
import json
import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOUND = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
_TIMEOUT = 60  # seconds for an answer
_FLAGS = [
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--remote-debugging-pipe",
]


class Browser:
    """One page, driven by the DevTools protocol; `events` are all that it reported, as `(method, params)`."""

    def __init__(self, commands: int, answers: int):
        self.events: list[tuple[str, dict[str, Any]]] = []
        self._commands, self._answers, self._buffer, self._count, self._session = commands, answers, b"", 0, None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._count:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + _TIMEOUT
        with selectors.DefaultSelector() as selector:
            selector.register(self._answers, selectors.EVENT_READ)
            while b"\0" not in self._buffer:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise TimeoutError("Chromium does not answer")
                read = os.read(self._answers, 1 << 16)
                if not read:
                    raise RuntimeError("Chromium has ended")
                self._buffer += read
        message, _, self._buffer = self._buffer.partition(b"\0")
        told = json.loads(message)
        if "method" in told:
            self.events.append((told["method"], told.get("params", {})))
        return told

    def open(self, path: Path, *, width: int, dark: bool) -> None:
        """Load a file in a window of this width, and wait until it is drawn."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        seen = len(self.events)
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not any(name == "Page.loadEventFired" for name, _ in self.events[seen:]):
            self._next()

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]["value"]

    def screenshot(self, path: Path) -> None:
        """The whole page, however long, as a PNG."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Start Chromium with a temporary directory, and end it."""
    (ours_in, their_out), (their_in, ours_out) = os.pipe(), os.pipe()
    # It reads commands from descriptor 3, and writes replies to 4.
    shell = f'exec "$@" 3<&{their_in} 4>&{their_out}'
    process = subprocess.Popen(
        ["bash", "-c", shell, "bash", str(FOUND), *_FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(their_in, their_out),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(their_in), os.close(their_out)
    try:
        yield Browser(ours_out, ours_in)
    finally:
        os.close(ours_out), os.close(ours_in)  # which ends it
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
