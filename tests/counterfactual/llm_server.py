"""A fake OpenAI-compatible server with every kind of fault."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.counterfactual.samples import rewrite_prompt

HOSTILE = (
    "FINDINGS: \ud800 broken",
    "FINDINGS: \x1b[31mred\x00",
    "\u202egnirts",
    "Sorry, I can't help with that.",
    "FINDINGS: a.\n\nFINDINGS: b.\n\nIMPRESSION: c.",
    "x" * 40_000,
    '"; DROP TABLE reports; --',
    "FINDINGS: <script>alert(1)</script> The lungs are clear.\n\nIMPRESSION: Here is the report.",
)


def write_answer(prompt: str) -> str:
    """A correct rewrite, formatted as a chat answer."""
    report = rewrite_prompt(prompt).text
    return f"<think>Let me see.</think>\nHere is the report:\n```\n{report}\n```"


class Handler(BaseHTTPRequestHandler):
    """Answers with the faults in the server's `plan`, one per request, then with `rest`."""

    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        owner: Any = self.server
        with owner.lock:
            owner.bodies.append(body)
            owner.headers.append(dict(self.headers))
            owner.active += 1
            owner.busiest = max(owner.busiest, owner.active)
            if owner.active > 1:
                owner.two_open.set()
            fault = owner.plan.pop(0) if owner.plan else owner.rest
            owner.served[fault] += 1
        try:
            getattr(self, f"do_{fault.partition(':')[0]}")(body, fault.partition(":")[2])
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with owner.lock:
                owner.active -= 1

    def reply(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def answer(self, text: str | None, finish: str = "stop") -> None:
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": finish}
        self.reply(json.dumps({"choices": [choice]}).encode())

    def do_good(self, body: bytes, _: str) -> None:
        time.sleep(0.002)
        self.answer(write_answer(json.loads(body)["messages"][0]["content"]))

    def do_together(self, body: bytes, _: str) -> None:
        """Answer once two requests were open at the same time."""
        server: Any = self.server
        assert server.two_open.wait(60)
        self.do_good(body, "")

    def do_status(self, _: bytes, code: str) -> None:
        self.reply(b"SECRET of the server", int(code), Retry_After="0")

    def do_slow(self, _: bytes, __: str) -> None:
        time.sleep(1.5)
        self.answer("late")

    def do_drip(self, _: bytes, __: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        for _n in range(40):
            self.wfile.write(b" ")
            time.sleep(0.05)

    def do_broken(self, _: bytes, __: str) -> None:
        self.reply(b'{"choices": [{"message": {"content": "FIND', Content_Length="5000")

    def do_json(self, _: bytes, text: str) -> None:
        self.reply(text.encode())

    def do_deep(self, _: bytes, __: str) -> None:
        self.reply(b"[" * 200_000)

    def do_huge(self, _: bytes, __: str) -> None:
        self.reply(b" " * (3 << 20))

    def do_empty(self, _: bytes, __: str) -> None:
        self.answer("")

    def do_nothing(self, _: bytes, __: str) -> None:
        self.answer(None)

    def do_short(self, _: bytes, __: str) -> None:
        self.answer("FINDINGS: The", "length")

    def do_held(self, body: bytes, _: str) -> None:
        owner: Any = self.server
        owner.gate.wait(20)
        self.do_good(body, _)

    def do_hostile(self, _: bytes, index: str) -> None:
        self.answer(HOSTILE[int(index)])


class Host(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the default of 5, connections wait a second on a busy machine

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.gate = threading.Event()
        self.plan: list[str] = []
        self.rest = "good"
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.served: Counter[str] = Counter()
        self.active = self.busiest = 0
        self.two_open = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"
