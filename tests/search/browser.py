"""A headless Chromium over its debugging pipe: pages opened at a size and in a theme, and asked.

Nothing but the standard library: messages are JSON with a zero byte after each, on file
descriptors 3 (to the browser) and 4 (from it).
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Browser", "chromium", "open_browser"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--remote-debugging-pipe",
)
_WAIT_S = 60.0


def chromium() -> str | None:
    """The browser's program; None where there is none."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of a running browser."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write = read, write
        self._buffer = b""
        self._number = 0
        self._session = ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log", "Accessibility", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + _WAIT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(end - time.monotonic(), 0.0))
            assert ready, "the browser does not answer"
            part = os.read(self._read, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        first, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(first)
        return message

    def open(self, page: Path, *, width: int = 1280, dark: bool = False) -> None:
        """Load a file and wait until it is drawn."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media="screen", features=[theme])
        self.events.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(one.get("method") == "Page.loadEventFired" for one in self.events):
            self.events.append(self._next())
        self.run("document.fonts.ready.then(() => 1)")

    def run(self, script: str) -> Any:
        """The value of an expression on the page."""
        found = self.ask(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, key: str, *, shift: bool = False) -> None:
        """One key, down and up."""
        for kind in ("keyDown", "keyUp"):
            codes = {"Tab": 9, "Enter": 13}
            self.ask(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=key,
                windowsVirtualKeyCode=codes[key],
                modifiers=8 if shift else 0,
            )

    def complaints(self) -> list[str]:
        """Errors and warnings that the page caused, and addresses beyond it that it asked for."""
        found = []
        for one in self.events:
            method, said = one.get("method"), one.get("params", {})
            if method == "Runtime.exceptionThrown" or (
                method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning")
            ):
                found.append(json.dumps(said))
            if method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning"):
                found.append(json.dumps(said))
            address = said.get("request", {}).get("url", "")
            if method == "Network.requestWillBeSent" and not address.startswith("file:"):
                found.append(address)
        return found

    def tree(self) -> list[dict[str, Any]]:
        """What a screen reader is told: role and name of every node that it is told of."""
        nodes = self.ask("Accessibility.getFullAXTree")["nodes"]
        return [
            {"role": one["role"]["value"], "name": one.get("name", {}).get("value", "")}
            for one in nodes
            if not one.get("ignored")
        ]

    def picture(self, path: Path, *, top: float = 0.0, height: float | None = None) -> None:
        """A PNG of the whole page, or of a part of it."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {
            "x": 0,
            "y": top,
            "width": size["width"],
            "height": min(height or size["height"], size["height"] - top),
            "scale": 1,
        }
        shot = self.ask(
            "Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip
        )
        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def open_browser(program: str, profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own, ended with the block."""
    to_browser, mine_out = os.pipe()
    mine_in, from_browser = os.pipe()

    def place() -> None:
        """The two ends at 3 and 4; first out of the way of each other."""
        first, second = (os.dup(end) for end in (to_browser, from_browser))
        while first in (3, 4):
            first = os.dup(first)
        while second in (3, 4):
            second = os.dup(second)
        os.dup2(first, 3)
        os.dup2(second, 4)

    process = subprocess.Popen(
        [program, *_FLAGS, f"--user-data-dir={profile}"],
        preexec_fn=place,  # noqa: PLW1509  # a test has one thread
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Browser(mine_in, mine_out)
    finally:
        process.kill()
        process.wait(timeout=_WAIT_S)
        os.close(mine_in)
        os.close(mine_out)
