"""A small driver of headless Chromium: the DevTools protocol over a pipe, standard library alone.

Chromium reads commands from file descriptor 3 and writes answers and events to 4, each of them
JSON that ends with a zero byte (--remote-debugging-pipe). So no port is opened.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless=new --remote-debugging-pipe --no-sandbox --disable-gpu --hide-scrollbars "
    "--no-first-run --disable-background-networking --disable-component-update "
    "--disable-dev-shm-usage about:blank"
)
PATIENCE = 120  # seconds for anything to happen


def find_chromium():
    """The browser: $CHROMIUM, or the first of its names on PATH; None: there is none."""
    for name in (os.environ.get("CHROMIUM"), *NAMES):
        if name and (found := shutil.which(name)):
            return found
    return None


class Page:
    """One page of a browser of its own; a context manager."""

    def __init__(self, browser, profile):
        to_browser, self.pipe_out = os.pipe()
        self.pipe_in, from_browser = os.pipe()

        def as_three_and_four():
            # first out of the way: one of the two may be 3 or 4 itself
            ends = [os.dup(end) for end in (to_browser, from_browser)]
            for end, number in zip(ends, (3, 4)):
                os.dup2(end, number)

        command = [browser, f"--user-data-dir={profile}", *OPTIONS.split()]
        self.process = subprocess.Popen(
            command,
            preexec_fn=as_three_and_four,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self.last, self.unread, self.events, self.session = 0, b"", [], None

    def __enter__(self):
        (target,) = self.call("Target.getTargets", filter=[{"type": "page"}])["targetInfos"]
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(PATIENCE)
        os.close(self.pipe_in)
        os.close(self.pipe_out)

    def message(self):
        """The next answer or event."""
        while b"\0" not in self.unread:
            if not select.select([self.pipe_in], [], [], PATIENCE)[0]:
                raise TimeoutError("Chromium does not answer")
            data = os.read(self.pipe_in, 1 << 20)
            if not data:
                raise RuntimeError(f"Chromium ended with code {self.process.wait()}")
            self.unread += data
        text, _, self.unread = self.unread.partition(b"\0")
        return json.loads(text)

    def call(self, method, **params):
        """Give a command and wait for its result; events that come before are kept."""
        self.last += 1
        command = {"id": self.last, "method": method, "params": params}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.pipe_out, json.dumps(command).encode() + b"\0")
        while (answer := self.message()).get("id") != self.last:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def open(self, url):
        """Go to a page and wait until all of it is there."""
        self.call("Page.navigate", url=url)
        self.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")

    def value(self, expression):
        """What a JavaScript expression gives, promises awaited."""
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"]["exception"]["description"])
        return done["result"].get("value")

    def wait_for(self, condition):
        """Until a JavaScript expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.value(condition):
            if time.monotonic() > end:
                raise TimeoutError(condition)
            time.sleep(0.05)

    def box(self, selector):
        """Left, top, width and height of an element, scrolled into view first."""
        return self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect(); "
            "return [b.left, b.top, b.width, b.height]; })()"
        )

    def mouse(self, kind, x, y):
        """A mouse event with the left button: mousePressed, mouseMoved or mouseReleased."""
        self.call(
            "Input.dispatchMouseEvent",
            type=kind,
            x=x,
            y=y,
            button="left",
            buttons=int(kind != "mouseReleased"),
            clickCount=1,
        )

    def drag(self, selector, points):
        """Press, move and release along points, which are shares of an element's box."""
        left, top, width, height = self.box(selector)
        places = [(left + u * width, top + v * height) for u, v in points]
        self.mouse("mousePressed", *places[0])
        for place in places[1:]:
            self.mouse("mouseMoved", *place)
        self.mouse("mouseReleased", *places[-1])

    def touch(self, selector, points):
        """The same with a finger."""
        left, top, width, height = self.box(selector)
        for i, (u, v) in enumerate(points):
            finger = {"x": left + u * width, "y": top + v * height}
            kind = "touchMove" if i else "touchStart"
            self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[finger])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def click(self, selector):
        """Click into the middle of an element."""
        self.drag(selector, [(0.5, 0.5)])

    def key(self, key, code=0):
        """Press a key where the focus is; Enter and Space need a code and bring their text."""
        text = {"Enter": "\r", " ": " "}.get(key)
        more = {"text": text} if text else {}
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more
            )
            more = {}

    def look(self, width, height, dark=False, touch=False):
        """Set the size of the window, the colour scheme, and whether there is a touch screen."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=touch,
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path):
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def problems(self):
        """Errors that scripts threw or the browser logged."""
        found = []
        for event in self.events:
            method, params = event.get("method"), event.get("params", {})
            if method == "Runtime.exceptionThrown":
                found.append(params["exceptionDetails"])
            if method == "Log.entryAdded" and params["entry"]["level"] == "error":
                found.append(params["entry"]["text"])
        return found

    def requested(self):
        """All addresses that the page asked for."""
        sent = [e for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]
