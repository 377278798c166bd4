from __future__ import annotations

from pathlib import Path

import pytest

from exoflow_hpc.settings import Settings, storage_directory


def test_the_environment_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXOFLOW_MAX_RANK_LOSSES", "7")
    monkeypatch.setenv("EXOFLOW_PROGRESS_INTERVAL", "1.5")
    assert Settings.from_environment(Settings(max_rank_losses=1)) == Settings(max_rank_losses=7, progress_interval=1.5)


@pytest.mark.parametrize(("text", "message"), [("many", "EXOFLOW_MAX_RANK_LOSSES='many'"), ("-1", "0 or more")])
def test_a_value_that_makes_no_sense_is_named(monkeypatch: pytest.MonkeyPatch, text: str, message: str) -> None:
    monkeypatch.setenv("EXOFLOW_MAX_RANK_LOSSES", text)
    with pytest.raises(ValueError, match=message):
        Settings.from_environment()


@pytest.mark.parametrize("text", ["-0.5", "nan", "inf"])
def test_seconds_have_to_be_some(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("EXOFLOW_RETRY_BACKOFF", text)
    with pytest.raises(ValueError, match="retry_backoff.*0 or more, and finite"):
        Settings.from_environment()


def test_where_the_storage_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EXOFLOW_STORAGE", raising=False)
    assert storage_directory() == tmp_path / ".exoflow"
    monkeypatch.setenv("EXOFLOW_STORAGE", "elsewhere")
    assert storage_directory() == tmp_path / "elsewhere"
    assert storage_directory("/x") == Path("/x")
    assert list(tmp_path.iterdir()) == []
