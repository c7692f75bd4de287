from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from segqc.loop.dataset import Dataset
from segqc.selection import StrategyError, registry, score_of, scores, strategies
from segqc.store import leases
from segqc.store.leases import LeaseRules
from segqc.store.records import Actor
from tests.server_kit import make_dataset

PAGE = Path(__file__).parent.parent / "docs" / "strategies.md"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    strategies.cache_clear()
    yield
    strategies.cache_clear()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, code: str, entry: str) -> None:
    (folder / f"{module}.py").write_text(code)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.ENTRY_POINTS}]\n{entry}\n")
    monkeypatch.syspath_prepend(str(folder))


def test_the_pages_strategy_registers_and_hands_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, toml = re.findall(r"```(?:python|toml)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    install(tmp_path, monkeypatch, "newest_first", code, toml.splitlines()[1].replace('"', ""))
    dataset = Dataset(make_dataset(tmp_path / "studies", scans=3, finals=0))
    rules = LeaseRules(audit_share=0, validation_share=0)
    with dataset.store.write() as transaction:
        got = leases.acquire(
            transaction,
            Actor(kind="person", name="a", identified_by="client-id"),
            "newest",
            strategies()["newest"].order,
            rules,
        )
    assert got is not None and (got.scan, got.strategy) == ("scan_2", "newest")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("S = 1", "is no segqc.selection.Strategy"),
        ("raise RuntimeError('broken')", "cannot be loaded: broken"),
        ("from segqc.selection.tta import STRATEGY as S", "the name 'tta', which is in use"),
    ],
)
def test_a_bad_entry_point_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    name = f"bad_{abs(hash(code))}"
    install(tmp_path, monkeypatch, name, code, f"bad = {name}:S")
    with pytest.raises(StrategyError, match=message):
        strategies()


def test_every_score_has_a_strategy_and_an_unknown_one_is_told() -> None:
    assert set(scores()) <= set(strategies())
    with pytest.raises(StrategyError, match="there are segqc, tta, entropy"):
        score_of("sequential")
