"""The `server` generator: any OpenAI-compatible chat-completions endpoint, for example vLLM.

Reports are patient data: they go to loopback and private addresses only unless a flag says
otherwise, redirects and proxies are not followed, and no message or error holds what was sent or
received. What a server answers is not trusted: it is bounded in bytes and in time, and is read as
data only.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import random
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from cpo_fast.counterfactual.prompt import Task, build_prompt, parse_rewrite
from cpo_fast.counterfactual.seeding import hash_seed
from cpo_fast.counterfactual.writers import Draft, GaveUpError
from cpo_fast.errors import DataError, RecordError, UsageError
from cpo_fast.types import ConceptGraph

MAX_RESPONSE = 1 << 20
"""Bytes of an answer above which it is not read on."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the first retry, doubled for each further one, and the bound, which holds for
Retry-After as well."""

_AGAIN = frozenset({408, 409, 425, 429, *range(500, 600)})
_ABOUT_THE_RECORD = frozenset({400, 413, 422})
_NEAR = [
    ipaddress.ip_network(n)
    for n in ("127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
]


class _FailedError(Exception):
    """One request that may be sent again; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait


def is_local_address(address: str) -> bool:
    """Whether an IP address is loopback or private (RFC 1918, RFC 4193)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return any(ip.version == net.version and ip in net for net in _NEAR)


class ServerWriter:
    """Asks `url` (".../v1") for chat completions of `model`, `concurrency` at a time.

    A request that fails in a way that may pass (no connection, time-out, 408, 409, 425, 429, 5xx,
    an answer that is no JSON) is sent again up to `max_retries` times, after a wait that doubles or
    that the server names. Then its record is set aside as "server-...". `faults` counts every
    failed request by reason. Raises UsageError for a URL or host that can't be used, and while
    writing for 401, 403, 404 and redirects; DataError when a whole round finds no server.
    """

    name = "server"

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str = "",
        allow_remote_host: bool = False,
        concurrency: int = 8,
        requests_per_second: float = 0.0,
        timeout: float = 120.0,
        max_retries: int = 5,
        temperature: float = 0.0,
        max_new_tokens: int = 1024,
    ) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise UsageError(f"--server_url {url}: give http://host:port/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UsageError("--server_url holds more than host, port and path; leave that out")
        for flag, value, least in (
            ("concurrency", concurrency, 1),
            ("requests_per_second", requests_per_second, 0),
            ("timeout_s", timeout, 0.001),
            ("max_retries", max_retries, 0),
            ("temperature", temperature, 0),
            ("max_new_tokens", max_new_tokens, 1),
        ):
            if not least <= value < float("inf"):
                raise UsageError(f"--{flag} must be at least {least}, not {value}")
        self._secure = parts.scheme == "https"
        self._host = parts.hostname
        self._port = port or (443 if self._secure else 80)
        self._path = parts.path.rstrip("/") + "/chat/completions"
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._allow_remote = allow_remote_host
        self._model, self._temperature, self._max_new = model, temperature, max_new_tokens
        self._timeout, self._max_retries = timeout, max_retries
        self._concurrency = concurrency
        self._interval = 1 / requests_per_second if requests_per_second else 0.0
        self._next, self._lock = 0.0, threading.Lock()
        self.window = 8 * concurrency
        self.faults: Counter[str] = Counter()
        self._addresses()

    def _addresses(self) -> list[str]:
        """The addresses of the host; all of them must be near unless remote hosts are allowed."""
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise UsageError(f"--server_url: the host {self._host} has no address") from None
        addresses = [str(where[0]) for *_, where in found]
        if not self._allow_remote and not all(map(is_local_address, addresses)):
            raise UsageError(
                f"--server_url: {self._host} is neither loopback nor private, and the reports of "
                f"patients would be sent there; add --allow_remote_host if that is allowed"
            )
        return addresses

    def write(self, graph: ConceptGraph, tasks: Sequence[Task]) -> Iterator[tuple[int, Draft]]:
        unreachable: list[tuple[int, Draft]] = []  # until an answer shows that there is a server
        with ThreadPoolExecutor(self._concurrency) as pool:
            futures = {
                pool.submit(self._draft, build_prompt(graph, task), task): index
                for index, task in enumerate(tasks)
            }
            try:
                for future in as_completed(futures):
                    draft = future.result()
                    if isinstance(draft, GaveUpError) and draft.reason == "server-unreachable":
                        unreachable.append((futures[future], draft))
                    else:
                        yield futures[future], draft
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if len(unreachable) == len(tasks):
            raise DataError(
                f"no server answers at {self._host}, port {self._port}; start it and run the same "
                f"command again: it goes on where it stopped"
            )
        yield from unreachable

    def _draft(self, prompt: str, task: Task) -> Draft:
        try:
            return parse_rewrite(self._asked(self._body(prompt, task)), task.report)
        except RecordError as error:
            return error

    def _body(self, prompt: str, task: Task) -> bytes:
        chance = hash_seed(task.seed, task.study_id, task.target, str(task.attempt))
        retry = 0.7 if task.attempt else 0.0  # the same words again would fail again
        return json.dumps(
            {
                "model": self._model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": max(self._temperature, retry),
                "seed": chance & 0x7FFFFFFF,
                "max_tokens": self._max_new,
                "stream": False,
            }
        ).encode()

    def _asked(self, body: bytes) -> str:
        """The text of the answer, after as many requests as it takes."""
        for attempt in range(self._max_retries + 1):
            self._pace()
            try:
                return _parse_completion(self._request(body))
            except _FailedError as failed:
                self._count(failed.reason)
                if attempt == self._max_retries:
                    raise GaveUpError(failed.reason, f"{attempt + 1} requests") from None
                wait = FIRST_WAIT * 2**attempt * random.uniform(0.5, 1.0)
                time.sleep(min(max(wait, failed.wait or 0.0), LONGEST_WAIT))
        raise AssertionError("the loop returns or raises")

    def _count(self, reason: str) -> None:
        with self._lock:
            self.faults[reason] += 1

    def _pace(self) -> None:
        """Wait for the next free place of the rate limit."""
        if self._interval:
            with self._lock:
                start = max(self._next, time.monotonic())
                self._next = start + self._interval
            time.sleep(max(0.0, start - time.monotonic()))

    def _connected(self) -> http.client.HTTPConnection:
        """A connection to an address that was checked: the name is looked up once for both."""
        last: OSError = OSError()
        for address in self._addresses():
            try:
                sock = socket.create_connection((address, self._port), self._timeout)
            except OSError as error:
                last = error
                continue
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._secure:
                context = ssl.create_default_context()
                sock = context.wrap_socket(sock, server_hostname=self._host)
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
            connection.sock = sock
            return connection
        raise last

    def _request(self, body: bytes) -> bytes:
        late = threading.Event()
        connection: http.client.HTTPConnection | None = None
        timer: threading.Timer | None = None
        try:
            try:
                connection = self._connected()
            except TimeoutError:
                raise _FailedError("server-timeout") from None
            except (OSError, UsageError):
                raise _FailedError("server-unreachable") from None
            # A time-out of the socket starts anew with every byte; this one does not.
            timer = threading.Timer(self._timeout, _shut_down, (connection.sock, late))
            timer.daemon = True
            timer.start()
            connection.request("POST", self._path, body, self._headers)
            response = connection.getresponse()
            data = response.read(MAX_RESPONSE + 1)
            if late.is_set():
                raise _FailedError("server-timeout")
            self._judge(response, len(data))
            return data
        except (OSError, http.client.HTTPException, ValueError) as error:
            slow = late.is_set() or isinstance(error, TimeoutError)
            raise _FailedError("server-timeout" if slow else "server-broke-off") from None
        finally:
            if timer is not None:
                timer.cancel()
            if connection is not None:
                connection.close()

    def _judge(self, response: http.client.HTTPResponse, size: int) -> None:
        status = response.status
        if size > MAX_RESPONSE:
            raise _FailedError("server-answer-too-large")
        if status in _AGAIN:
            raise _FailedError(
                f"server-status-{status}", _parse_retry_after(response.getheader("Retry-After"))
            )
        if status in _ABOUT_THE_RECORD:
            self._count(f"server-status-{status}")
            raise GaveUpError(f"server-status-{status}", "the server does not take this record")
        if status != 200:
            raise UsageError(
                f"the server at {self._host}, port {self._port} answers with status {status}; "
                f"check --server_url (with its /v1), --model and the key"
            )


def _shut_down(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):  # it is closed already
        sock.shutdown(socket.SHUT_RDWR)


def _parse_retry_after(retry_after: str | None) -> float | None:
    """The wait that a Retry-After header asks for, as seconds or as a date; None without any."""
    if not retry_after:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _parse_completion(data: bytes) -> str:
    """The text of the first choice; _FailedError for what is no chat completion."""
    try:
        choice = json.loads(data)["choices"][0]
        text, finish = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise _FailedError("server-answer-malformed") from None
    if finish == "length":
        raise RecordError("answer-cut-short", "longer than --max_new_tokens")
    if text is None:
        raise RecordError("answer-empty")
    if not isinstance(text, str):
        raise _FailedError("server-answer-malformed")
    return text
