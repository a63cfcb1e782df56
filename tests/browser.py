"""Headless Chromium for tests, over its DevTools pipe: no driver and no package besides the browser itself."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
LIMIT = 120
"""Seconds after which a browser that does not answer is ended."""

LAUNCH = """
import os, sys
read, write = map(int, sys.argv[1:3])
os.dup2(read, 103), os.dup2(write, 104)  # out of the way of the two numbers below
os.dup2(103, 3), os.dup2(104, 4)
os.closerange(103, 105)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium reads commands from descriptor 3 and answers on 4; a process of its own puts the pipes there."""


def find_browser() -> str | None:
    """The path of Chromium or Chrome; CHROMIUM names another."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A browser with one page. Use as a context manager."""

    def __init__(self, path: str):
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += [
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile.name}",
            "--hide-scrollbars",
            "about:blank",
        ]
        command = [sys.executable, "-c", LAUNCH, str(theirs_in), str(theirs_out), path, *flags]
        fds = theirs_in, theirs_out
        self._process = subprocess.Popen(command, pass_fds=fds, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for descriptor in fds:
            os.close(descriptor)
        self._out, self._in = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb", 0)
        self._number, self._rest, self.events = 0, b"", []
        [page] = [one for one in self._call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self._call("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.wait()
        self._out.close()
        self._in.close()
        self._profile.cleanup()

    def open(self, file: Path, width: int, height: int = 900) -> None:
        """Loads a file into a window of so many CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def evaluate(self, expression: str):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, file: Path) -> None:
        """The whole page as PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))

    def call(self, method: str, **params):
        return self._call(method, self._session, **params)

    def _call(self, method: str, session: str | None = None, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        self._out.write(json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def _receive(self) -> dict:
        """The next message; events are kept."""
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], LIMIT)
            piece = os.read(self._in.fileno(), 1 << 20) if ready else b""
            assert piece, (
                "the browser ended or does not answer; try chromium --headless --no-sandbox --dump-dom about:blank"
            )
            self._rest += piece
        message, self._rest = self._rest.split(b"\0", 1)
        parsed = json.loads(message)
        if "method" in parsed:
            self.events.append(parsed)
        return parsed
