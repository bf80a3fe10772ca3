"""Private files replace existing files completely or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpo_fast.folders import replace_private, write_private


def test_private_file_is_replaced_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("public")
    path.chmod(0o644)
    with pytest.raises(KeyError), replace_private(path) as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "public" and [*tmp_path.iterdir()] == [path]
    write_private(path, "whole ü")
    assert path.read_text(encoding="utf-8") == "whole ü"
    assert path.stat().st_mode & 0o777 == 0o600


def test_concurrent_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "cache.bin"
    with replace_private(path, binary=True) as slow:
        slow.write(b"slow, ")
        write_private(path, b"fast")
        slow.write(b"last")
    assert path.read_bytes() == b"slow, last" and [*tmp_path.iterdir()] == [path]
