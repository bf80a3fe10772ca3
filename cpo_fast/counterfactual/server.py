"""The `server` generator: any OpenAI-compatible chat-completions endpoint, for example vLLM.

Reports are patient data: they are sent to loopback and private addresses only, unless remote hosts
are allowed. Redirects and proxies are not followed, and no message or error contains text that was
sent or received. Answers are not trusted: they are limited in bytes and time, and read as data.
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
from cpo_fast.counterfactual.writers import (
    Draft,
    GaveUpError,
    check_minimums,
    choose_sampling,
)
from cpo_fast.errors import DataError, RecordError, UsageError
from cpo_fast.types import ConceptGraph

MAX_RESPONSE = 1 << 20
"""Maximum size of an answer in bytes."""

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds before the first retry, doubled for each further retry, and the maximum, which also
limits Retry-After."""

_TRANSIENT_STATUS = frozenset({408, 409, 425, 429, *range(500, 600)})
_RECORD_STATUS = frozenset({400, 413, 422})
_LOCAL_NETWORKS = [
    ipaddress.ip_network(n)
    for n in ("127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
]


class _FailedError(Exception):
    """A failed request that can be retried; `wait` is the delay requested by the server, in s."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.wait = reason, wait


def is_local_address(address: str) -> bool:
    """Whether an IP address is loopback or private (RFC 1918, RFC 4193)."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip
    return any(ip.version == net.version and ip in net for net in _LOCAL_NETWORKS)


class ServerWriter:
    """Requests chat completions of `model` from `url` (".../v1"), `concurrency` at a time.

    A request with a transient error (no connection, time-out, 408, 409, 425, 429, 5xx, an answer
    that is not JSON) is retried up to `max_retries` times, after a delay that doubles each time or
    that the server requests. Then its record is set aside as "server-...". `faults` counts failed
    requests by reason. Raises UsageError for an unusable URL or host, and while writing for 401,
    403, 404 and redirects; DataError if no request of a round reaches a server.
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
            raise UsageError("--server_url: only host, port and path are allowed")
        check_minimums(
            ("concurrency", concurrency, 1),
            ("requests_per_second", requests_per_second, 0),
            ("timeout_s", timeout, 0.001),
            ("max_retries", max_retries, 0),
            ("temperature", temperature, 0),
            ("max_new_tokens", max_new_tokens, 1),
        )
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
        """Addresses of the host; UsageError for a remote one unless remote hosts are allowed."""
        try:
            found = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise UsageError(f"--server_url: the host {self._host} has no address") from None
        addresses = [str(where[0]) for *_, where in found]
        if not self._allow_remote and not all(map(is_local_address, addresses)):
            raise UsageError(
                f"--server_url: {self._host} is neither loopback nor private; to send patient "
                f"reports there, add --allow_remote_host"
            )
        return addresses

    def write(self, graph: ConceptGraph, tasks: Sequence[Task]) -> Iterator[tuple[int, Draft]]:
        unreachable: list[tuple[int, Draft]] = []  # held back until one answer arrives
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
                f"command again to continue"
            )
        yield from unreachable

    def _draft(self, prompt: str, task: Task) -> Draft:
        try:
            return parse_rewrite(self._ask(self._body(prompt, task)), task.report)
        except RecordError as error:
            return error

    def _body(self, prompt: str, task: Task) -> bytes:
        temperature, seed = choose_sampling(task, self._temperature)
        return json.dumps(
            {
                "model": self._model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": temperature,
                "seed": seed & 0x7FFFFFFF,
                "max_tokens": self._max_new,
                "stream": False,
            }
        ).encode()

    def _ask(self, body: bytes) -> str:
        """The text of the answer, after retries if necessary."""
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
        """Wait until the rate limit permits the next request."""
        if self._interval:
            with self._lock:
                start = max(self._next, time.monotonic())
                self._next = start + self._interval
            time.sleep(max(0.0, start - time.monotonic()))

    def _connect(self) -> http.client.HTTPConnection:
        """Connect to an address that was checked; the name is looked up once for both steps."""
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
                connection = self._connect()
            except TimeoutError:
                raise _FailedError("server-timeout") from None
            except (OSError, UsageError):
                raise _FailedError("server-unreachable") from None
            # The time-out of a socket restarts with every byte; this one limits the whole request.
            timer = threading.Timer(self._timeout, _shut_down, (connection.sock, late))
            timer.daemon = True
            timer.start()
            connection.request("POST", self._path, body, self._headers)
            response = connection.getresponse()
            data = response.read(MAX_RESPONSE + 1)
            if late.is_set():
                raise _FailedError("server-timeout")
            self._check_status(response, len(data))
            return data
        except (OSError, http.client.HTTPException, ValueError) as error:
            slow = late.is_set() or isinstance(error, TimeoutError)
            raise _FailedError("server-timeout" if slow else "server-broke-off") from None
        finally:
            if timer is not None:
                timer.cancel()
            if connection is not None:
                connection.close()

    def _check_status(self, response: http.client.HTTPResponse, size: int) -> None:
        status = response.status
        if size > MAX_RESPONSE:
            raise _FailedError("server-answer-too-large")
        if status in _TRANSIENT_STATUS:
            raise _FailedError(
                f"server-status-{status}", _parse_retry_after(response.getheader("Retry-After"))
            )
        if status in _RECORD_STATUS:
            self._count(f"server-status-{status}")
            raise GaveUpError(f"server-status-{status}", "the server rejects this record")
        if status != 200:
            raise UsageError(
                f"the server at {self._host}, port {self._port} answers with status {status}; "
                f"check --server_url (including /v1), --model and the key"
            )


def _shut_down(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with contextlib.suppress(OSError):  # already closed
        sock.shutdown(socket.SHUT_RDWR)


def _parse_retry_after(retry_after: str | None) -> float | None:
    """Delay in seconds given by a Retry-After header (seconds or a date); None without one."""
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
    """The text of the first choice; raises _FailedError if `data` is not a chat completion."""
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
