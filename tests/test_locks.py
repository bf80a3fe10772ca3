"""Only one process at a time writes to a run's folder or an output file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cpo_fast import evaluate, export, train
from cpo_fast.counterfactual.__main__ import main as counterfactual
from cpo_fast.data.__main__ import main as data_main
from cpo_fast.errors import DataError, UsageError
from cpo_fast.experiments.study.__main__ import main as study
from cpo_fast.locks import LOCK, lock_file, lock_folder
from cpo_fast.phantom.__main__ import main as phantom
from tests.counterfactual.samples import REPORTS, write_open_i
from tests.samples import write_pairs

HOST = socket.gethostname()
HOLD = """
import sys
from cpo_fast.locks import lock_file, lock_folder
from pathlib import Path
with {"file": lock_file, "folder": lock_folder}[sys.argv[1]](Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def hold_lock(kind: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start another process that holds the lock of `path`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, kind, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    with process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def test_second_process_names_the_holder_and_locks_after_it(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    with hold_lock("folder", run) as first:
        for _ in range(2):  # a refused process does not release the lock
            with pytest.raises(UsageError) as refused, lock_folder(run):
                pass
        when = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d"
        message = (
            f"--output_dir {run} is being written by process {first.pid} on host {HOST}, "
            f"started {when}: wait for its end, stop it, or name another"
        )
        assert re.fullmatch(message, str(refused.value))
        assert (run / LOCK).stat().st_mode & 0o777 == 0o600
    assert not run.exists()  # the lock created it, and it is empty
    with lock_folder(run):
        (run / "kept").touch()
    assert [path.name for path in run.iterdir()] == ["kept"]


def test_killed_process_holds_no_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with hold_lock("folder", tmp_path) as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == first.pid
    with lock_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK).exists()
    assert capsys.readouterr() == ("", "")


def test_child_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A data worker can outlive a killed run by some seconds."""
    fork = f"""
import os, sys, time
from cpo_fast.locks import lock_folder
with lock_folder({str(tmp_path)!r}):
    if os.fork() == 0:
        time.sleep(60)
    print("held", flush=True)
    os.kill(os.getpid(), 9)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", fork], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.wait(timeout=600) == -signal.SIGKILL
        with lock_folder(tmp_path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        assert process.stdout is not None
        process.stdout.close()


def test_process_cannot_take_a_lock_twice(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        (tmp_path / "link").symlink_to(tmp_path)
        with (
            pytest.raises(UsageError, match=f"by process {os.getpid()} on"),
            lock_folder(tmp_path / "link"),
        ):
            pass
        with lock_folder(tmp_path / "sft"), lock_file(tmp_path / "out.jsonl"):
            assert (tmp_path / f".out.jsonl{LOCK}").is_file()
    with lock_folder(tmp_path):
        pass


def test_one_of_many_processes_holds_the_lock_at_a_time(tmp_path: Path) -> None:
    """Each process deletes the lock file at its end; another can already have opened it."""
    code = f"""
import os
from cpo_fast.errors import UsageError
from cpo_fast.locks import lock_folder
taken = 0
while taken < 100:
    try:
        with lock_folder({str(tmp_path)!r}):
            os.close(os.open({str(tmp_path / "alone")!r}, os.O_CREAT | os.O_EXCL))
            os.unlink({str(tmp_path / "alone")!r})
            taken += 1
    except UsageError:
        pass
"""
    many = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait(timeout=600) for process in many] == [0, 0, 0]
    assert not list(tmp_path.iterdir())


def write_lock(folder: Path, **holder: Any) -> None:
    named = {"pid": 1, "host": HOST, "started": "2026-01-01 00:00:00+00:00"} | holder
    (folder / LOCK).write_text(json.dumps(named))


def test_stale_lock_of_another_host_is_taken_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lock(tmp_path, pid=77, host="node7")
    with lock_folder(tmp_path):
        pass
    (note,) = capsys.readouterr().err.splitlines()
    assert "process 77 on host node7, started 2026-01-01 00:00:00+00:00" in note
    (tmp_path / LOCK).write_text('{"pid": 3')  # truncated
    with lock_folder(tmp_path):
        pass


def test_process_id_decides_without_file_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    for dead in (ended.pid, os.getpid()):  # a reused id
        write_lock(tmp_path, pid=dead)
        with lock_folder(tmp_path):
            pass
        assert not (tmp_path / LOCK).exists()
    for holder in ({"pid": os.getppid()}, {"pid": ended.pid, "host": "node7"}):
        write_lock(tmp_path, **holder)
        delete = re.escape(f"if it has ended, delete {tmp_path / LOCK}")
        with pytest.raises(UsageError, match=delete), lock_folder(tmp_path):
            pass


def test_unwritable_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for lock in (lock_folder, lock_file):
        with pytest.raises(UsageError, match=r"file/x.* cannot be written"), lock(
            tmp_path / "file" / "x"
        ):  # fmt: skip
            pass


COMMANDS: dict[str, tuple[str, Callable[[list[str]], int], list[str]]] = {
    "train": ("folder", train.main, ["--num_studies", "40", "--output_dir"]),
    "resume": (
        "folder",
        train.main,
        ["--num_studies", "40", "--resume_from_checkpoint", "auto", "--output_dir"],
    ),
    "evaluate": (
        "folder",
        evaluate.main,
        ["--model", "ADAPTER", "--dataset", "open-i", "--output_dir"],
    ),
    "study": ("folder", study, ["--output_dir"]),
    "check": ("folder", data_main, ["check", "--dataset", "PAIRS", "--output_dir"]),
    "data-export": (
        "file",
        data_main,
        ["export", "--dataset", "PAIRS", "--format", "trl", "--output"],
    ),
    "export": ("file", export.main, ["--merge", "ADAPTER", "--output_dir"]),
    "phantom": ("file", phantom, ["--num_studies", "4", "--output_dir"]),
    "counterfactual": ("file", counterfactual, ["--dataset", "REPORTS", "--output"]),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_writing_command_respects_the_lock(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, main, flags = COMMANDS[name]
    target = tmp_path / "target"
    pairs = write_pairs(tmp_path / "pairs.jsonl", 1)
    reports = write_open_i(tmp_path / "reports", REPORTS)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "../base"}')
    (tmp_path / "base").mkdir()
    named = {"PAIRS": str(pairs), "ADAPTER": str(adapter), "REPORTS": str(reports)}
    with hold_lock(kind, target) as first:
        assert main([*(named.get(word, word) for word in flags), str(target)]) == 2
    error = capsys.readouterr().err
    assert f"{target} is being written by process {first.pid} on host {HOST}" in error
    assert "Traceback" not in error and not target.exists()


def test_run_locks_its_folder_and_dry_run_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, locked = tmp_path / "run", []

    def prepare(args: Any, world: Any) -> None:
        locked.append((run / LOCK).exists())
        raise DataError("no data")

    monkeypatch.setattr(train, "prepare_run", prepare)
    assert train.main(["--output_dir", str(run)]) == 1
    assert locked == [True] and not run.exists()
    assert train.main(["--output_dir", str(run), "--dry_run"]) == 1
    with hold_lock("folder", run):
        assert train.main(["--output_dir", str(run), "--dry_run"]) == 1
    assert locked == [True, False, True]


def test_threads_share_no_lock(tmp_path: Path) -> None:
    refused: list[str] = []

    def take_lock() -> None:
        try:
            with lock_folder(tmp_path):
                pass
        except UsageError as error:
            refused.append(str(error))

    with lock_folder(tmp_path):
        thread = threading.Thread(target=take_lock)
        thread.start()
        thread.join()
        done = subprocess.run([sys.executable, "-c", HOLD, "folder", str(tmp_path)],
                              capture_output=True, text=True, check=False)  # fmt: skip
    assert len(refused) == 1 and done.returncode == 1
    assert f"is being written by process {os.getpid()}" in done.stderr


@pytest.mark.complete
@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_all_ranks_of_a_locked_run_stop(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl", 30, short=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", "-m", "cpo_fast.train", "--dataset", str(pairs),
               "--output_dir", str(tmp_path / "run"), "--stages", "sft",
               "--sft_max_steps", "1"]  # fmt: skip
    with hold_lock("folder", tmp_path / "run") as first:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    message = f"error: --output_dir {tmp_path / 'run'} is being written by process {first.pid} on"
    assert done.returncode != 0 and done.stderr.count(message) == 1
    assert "rank 1: python -m cpo_fast.train: error: rank 0 stopped" in done.stderr
    assert not (tmp_path / "run").exists()
