"""The `server` generator against a faulty HTTP server on loopback."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpo_fast.counterfactual import counterfactuals, server
from cpo_fast.counterfactual.__main__ import main
from cpo_fast.counterfactual.prompt import parse_rewrite
from cpo_fast.counterfactual.server import ServerWriter, is_local_address
from cpo_fast.errors import DataError, RecordError, UsageError
from cpo_fast.types import Report
from tests.counterfactual.llm_server import HOSTILE, Host
from tests.counterfactual.samples import GRAPH, REPORTS, read_jsonl, study, write_open_i


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setattr(server, "FIRST_WAIT", 0.01)
    made = Host()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_open_i(tmp_path / "reports", REPORTS)


def run(dataset: Path, output: Path, url: str, *more: str, timeout_s: int = 60) -> int:
    flags = ["--generator", "server", "--server_url", url, "--model", "m"]
    flags += ["--timeout_s", str(timeout_s)]
    return main(["--dataset", str(dataset), "--output", str(output), *flags, *more])


def expect_ids(dataset: Path, folder: Path) -> list[str]:
    main(["--dataset", str(dataset), "--output", str(folder / "graph.jsonl")])
    return [row["id"] for row in read_jsonl(folder / "graph.jsonl")]


FAULTS = [
    "status:429",
    "status:500",
    "slow",
    "drip",
    "broken",
    "json:{}",
    "json:not json",
    'json:{"choices": [{"message": {"content": [1]}}]}',
    "status:503",
    "deep",
    "huge",
    "empty",
    "nothing",
    "short",
    *(f"hostile:{number}" for number in range(len(HOSTILE))),
]


def test_every_fault_is_counted_and_loses_no_record(
    host: Host, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host.plan = FAULTS * 2
    output = tmp_path / "cf.jsonl"
    assert run(dataset, output, host.url, "--max_retries", "40", timeout_s=1) == 0
    printed = capsys.readouterr()
    found = read_jsonl(output)
    # no record is lost or duplicated
    assert sorted(row["id"] for row in found) == sorted(expect_ids(dataset, tmp_path))
    assert read_jsonl(tmp_path / "cf.jsonl.rejected.jsonl") == []
    assert {row["generator"] for row in found} == {"server"}
    assert all(all(row["checks"].values()) for row in found)
    assert "Here is" not in output.read_text() and "```" not in output.read_text()
    counts = {"429": 2, "500": 2, "503": 2}
    for code, number in counts.items():
        assert f"server-status-{code}: {number}\n" in printed.out
    late = printed.out.split("server-timeout: ")[1].split("\n")[0]
    assert int(late) >= 4  # more on a busy machine
    assert "server-answer-malformed: 10\n" in printed.out
    assert "server-answer-too-large: 2\n" in printed.out
    assert "SECRET" not in printed.out + printed.err
    assert "clavicle" not in printed.out + printed.err


def test_permanent_faults_are_set_aside_with_a_reason(
    host: Host, dataset: Path, tmp_path: Path
) -> None:
    expected = expect_ids(dataset, tmp_path)
    for rest, reason in (
        ("status:500", "server-status-500"),
        ("status:400", "server-status-400"),
        ("broken", "server-answer-malformed"),
        ("empty", "answer-empty"),
        ("short", "answer-cut-short"),
        ("hostile:0", "answer-unprintable"),
        ("hostile:3", "answer-sections"),
        ("hostile:5", "answer-too-long"),
    ):
        host.rest = rest
        output = tmp_path / f"{rest}.jsonl".replace(":", "")
        assert run(dataset, output, host.url, "--max_retries", "1") == 1
        rejected = read_jsonl(output.with_name(output.name + ".rejected.jsonl"))
        assert sorted(row["id"] for row in rejected) == sorted(expected)
        assert {row["reason"] for row in rejected} == {reason}
        assert all(row["checks"] == {reason: False} for row in rejected)
        assert read_jsonl(output) == []


def test_slow_answer_delays_no_other_record(host: Host) -> None:
    host.plan = ["held"]
    writer = ServerWriter(host.url, "m", timeout=20, concurrency=2)
    studies = [study(REPORTS[0], 1), study(REPORTS[0], 2)]
    made = counterfactuals(studies, GRAPH, num_targets=1, generator=writer)
    first = next(made)
    assert first.passed and host.served["good"] == 1 and not host.gate.is_set()
    host.gate.set()
    assert {first.study_id, next(made).study_id} == {s.study_id for s in studies}
    assert next(made, None) is None


def test_text_beyond_the_report_fails_its_check(host: Host) -> None:
    host.rest = "hostile:7"
    writer = ServerWriter(host.url, "m", timeout=1)
    (made,) = counterfactuals([study(REPORTS[0])], GRAPH, num_targets=1, generator=writer)
    assert not made.passed and not made.checks["no_leak"]


def test_rerun_retries_records_with_server_faults(
    host: Host, dataset: Path, tmp_path: Path
) -> None:
    output, rejected = tmp_path / "cf.jsonl", tmp_path / "cf.jsonl.rejected.jsonl"
    host.plan = ["good"] * 4 + ["status:500"] * 3
    run(dataset, output, host.url, "--max_retries", "0", "--concurrency", "1")
    assert Counter(row["reason"] for row in read_jsonl(rejected)) == {"server-status-500": 3}
    requests = len(host.bodies)
    run(dataset, output, host.url, "--max_retries", "0")
    assert len(host.bodies) == requests + 3
    assert sorted(row["id"] for row in read_jsonl(output)) == sorted(expect_ids(dataset, tmp_path))
    assert read_jsonl(rejected) == []
    run(dataset, output, host.url)
    assert len(host.bodies) == requests + 3


def test_killed_run_continues_and_shards_split_the_work(
    host: Host, dataset: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.jsonl"
    run(dataset, whole, host.url)
    text = whole.read_bytes()
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(text[: len(text) // 2])
    requests = len(host.bodies)
    run(dataset, cut, host.url)
    assert sorted(cut.read_bytes().splitlines()) == sorted(text.splitlines())
    assert len(host.bodies) < requests + len(read_jsonl(whole))
    parts = []
    for index in range(3):
        run(dataset, tmp_path / f"{index}.jsonl", host.url, "--shard", f"{index}/3")
        parts += (tmp_path / f"{index}.jsonl").read_bytes().splitlines()
    assert sorted(parts) == sorted(text.splitlines())


def test_requests_are_limited_in_number_and_rate(host: Host, dataset: Path, tmp_path: Path) -> None:
    host.rest = "together"
    run(dataset, tmp_path / "a.jsonl", host.url, "--concurrency", "3")
    assert 1 < host.busiest <= 3
    start = time.monotonic()
    flags = ("--requests_per_second", "40", "--num_targets", "1")
    run(dataset, tmp_path / "b.jsonl", host.url, *flags)
    assert time.monotonic() - start >= (len(REPORTS) - 1) / 40


def test_retry_after_is_respected(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setattr(server, "_parse_retry_after", lambda value: 7.0 if value == "0" else None)
    host.plan = ["status:429"]
    writer = ServerWriter(host.url, "m", timeout=2)
    (made,) = counterfactuals([study(REPORTS[0])], GRAPH, num_targets=1, generator=writer)
    assert made.passed and 7.0 in waits


def test_retry_after_is_parsed_in_seconds_and_as_a_date() -> None:
    assert server._parse_retry_after("3") == 3.0
    assert server._parse_retry_after(None) is None
    assert server._parse_retry_after("soon") is None
    assert server._parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


def test_retries_change_sampling_and_name_the_fault(host: Host) -> None:
    host.plan = ["hostile:7"]
    writer = ServerWriter(host.url, "m", timeout=2)
    list(counterfactuals([study(REPORTS[0])], GRAPH, num_targets=1, generator=writer))
    first, second = (json.loads(body) for body in host.bodies)
    assert (first["temperature"], second["temperature"]) == (0.0, 0.7)
    assert first["seed"] != second["seed"]
    prompt = second["messages"][0]["content"]
    assert "An earlier try was refused: " in prompt and "held more than the report" in prompt


def test_api_key_is_sent_only_in_the_header(
    host: Host, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "k3y")
    run(dataset, tmp_path / "cf.jsonl", host.url, "--api_key_env", "SOME_KEY")
    assert {h["Authorization"] for h in host.headers} == {"Bearer k3y"}
    assert not any(b"k3y" in body for body in host.bodies)
    assert b"k3y" not in (tmp_path / "cf.jsonl").read_bytes()


@pytest.mark.parametrize("status", ["302", "401", "404"])
def test_misconfigured_server_ends_the_run(
    status: str, host: Host, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    host.rest = f"status:{status}"
    assert run(dataset, tmp_path / "cf.jsonl", host.url) == 2
    message = capsys.readouterr().err
    assert f"status {status}" in message and "SECRET" not in message
    assert read_jsonl(tmp_path / "cf.jsonl.rejected.jsonl") == []


def test_missing_server_ends_the_run_and_sets_nothing_aside(
    host: Host, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = host.url
    host.server_close()
    assert run(dataset, tmp_path / "cf.jsonl", url, "--max_retries", "1") == 1
    assert "start it and run the same command again" in capsys.readouterr().err
    assert read_jsonl(tmp_path / "cf.jsonl.rejected.jsonl") == []


@pytest.mark.parametrize(
    ("address", "is_local"),
    [
        ("127.0.0.1", True),
        ("10.1.2.3", True),
        ("172.16.0.1", True),
        ("172.32.0.1", False),
        ("192.168.1.1", True),
        ("::1", True),
        ("::ffff:10.0.0.1", True),
        ("::ffff:8.8.8.8", False),
        ("fd00::1", True),
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("8.8.8.8", False),
        ("2001:4860:4860::8888", False),
    ],
)
def test_local_addresses(address: str, is_local: bool) -> None:
    assert is_local_address(address) is is_local


@pytest.mark.parametrize(
    "url",
    ["http://8.8.8.8/v1", "https://[2001:4860:4860::8888]/v1", "http://169.254.169.254/v1"],
)
def test_remote_host_needs_the_flag(url: str) -> None:
    with pytest.raises(UsageError, match="allow_remote_host"):
        ServerWriter(url, "m")
    ServerWriter(url, "m", allow_remote_host=True)


def test_name_that_later_resolves_to_a_remote_host_is_refused(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = ServerWriter(host.url, "m", timeout=1, max_retries=0)
    answer = [(2, 1, 6, "", ("203.0.113.9", 80))]
    monkeypatch.setattr(server.socket, "getaddrinfo", lambda *_, **__: answer)
    with pytest.raises(DataError, match="no server answers"):
        list(counterfactuals([study(REPORTS[0])], GRAPH, generator=writer))
    assert host.bodies == []


@pytest.mark.parametrize(
    ("url", "more"),
    [
        ("ftp://127.0.0.1", {}),
        ("127.0.0.1:8000", {}),
        ("http://127.0.0.1:99999999/v1", {}),
        ("http://user:pass@127.0.0.1/v1", {}),
        ("http://127.0.0.1/v1?key=1", {}),
        ("http://127.0.0.1/v1", {"concurrency": 0}),
        ("http://127.0.0.1/v1", {"timeout": 0.0}),
        ("http://127.0.0.1/v1", {"requests_per_second": -1.0}),
    ],
)
def test_bad_options_are_named(url: str, more: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--") as error:
        ServerWriter(url, "m", **more)
    assert "pass" not in str(error.value).split("--")[0]


def test_a_missing_model_or_key_is_named(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset", str(dataset), "--output", str(tmp_path / "o"), "--generator", "server"]
    assert main(flags) == 2
    assert "needs --model" in capsys.readouterr().err
    assert main([*flags, "--model", "m", "--api_key_env", "NO_SUCH_KEY_HERE"]) == 2
    assert "NO_SUCH_KEY_HERE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "answer-empty"),
        ("<think>FINDINGS: a IMPRESSION: b</think>", "answer-empty"),
        ("FINDINGS: a.", "answer-sections"),
        ("FINDINGS: a.\nIMPRESSION:", "answer-sections"),
        ("a report", "answer-sections"),
        ("FINDINGS: a\u202eb.\nIMPRESSION: c", "answer-unprintable"),
    ],
)
def test_answers_without_a_report_are_refused(text: str, reason: str) -> None:
    with pytest.raises(RecordError) as error:
        parse_rewrite(text, Report("x", "y"))
    assert error.value.reason == reason


def test_report_is_extracted_from_a_chat_answer() -> None:
    text = "Sure!\n\n**FINDINGS:** The heart\nis large.\n\n## Impression: Cardiomegaly.\n```"
    found = parse_rewrite(text, Report("x", "y"))
    assert found == Report("The heart\nis large.", "Cardiomegaly.")
