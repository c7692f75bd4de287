"""Bundles: whole or not there at all, one serves, and whatever happens to their files has one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, func, select, text
from sqlalchemy.exc import IntegrityError, OperationalError
from typer.testing import CliRunner

from segqc.cli import main
from segqc.loop import publishing
from segqc.loop.publishing import Bundles
from segqc.networks import bundle as bundle_files
from segqc.networks.bundle import FOLDS, NETWORKS, NetworkBundle, StructuresDiffer, bundle_folders, model_name
from segqc.networks.card import CARDS, NetworkName
from segqc.networks.model import ModelError
from segqc.networks.segmenter import Segmenter
from segqc.networks.unet import build_network
from segqc.quality.report_card import AT_RANDOM
from segqc.settings import ModelsSettings, Settings
from segqc.store import bundles, events, jobs, maintenance
from segqc.store.bundles import NewBundle
from segqc.store.database import Database, StoreError, StoreUnavailable
from segqc.store.events import FOLDER, SERVER
from segqc.store.records import Begun
from segqc.store.restore import restore
from segqc.store.schema import Bundle
from segqc.store.store import Store
from segqc.types import MaskDice, Structure
from tests.report_kit import good_card, worthless_card
from tests.server_kit import STRUCTURES, save_models
from tests.store_kit import ANNA, BERT, Clock, fork, serve_pair


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[NetworkName, Path]:
    """Model files of both networks."""
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "studies").mkdir()
    return tmp_path / "studies"


@pytest.fixture
def store(folder: Path, url: str | None, clock: Clock) -> Iterator[Store]:
    opened = Store.open(folder, url, clock=clock)
    yield opened
    opened.close()


@pytest.fixture
def shelf(store: Store) -> Bundles:
    """The bundles of a new folder."""
    return Bundles(store, Settings())


def serving(shelf: Bundles) -> int | None:
    """The number of the bundle that serves; there is never more than one."""
    with shelf.store.read() as transaction:
        assert (transaction.scalar(select(func.count()).where(Bundle.serving)) or 0) <= 1
        return bundles.serving_number(transaction)


def told(shelf: Bundles, number: int) -> list[tuple[str, str]]:
    with shelf.store.read() as transaction:
        return [(event.verb, event.actor.name) for event in events.history(transaction, "bundle", number)]


def problems(shelf: Bundles) -> dict[int, str | None]:
    return {status.number: status.problem for status in shelf.listing()}


# ------------------------------------------------------------------------------------------------------------ publish


def test_a_bundle_holds_both_networks_their_cards_and_the_hashes_of_all(
    shelf: Bundles, files: dict[NetworkName, Path]
) -> None:
    assert shelf.serving() is None
    assert shelf.publish(files, ANNA, "a test") == 1
    bundle = shelf.serving()
    assert bundle is not None
    names = {f"{network}.{end}" for network in NETWORKS for end in ("pt", "json")} | {"manifest.json"}
    assert {path.name for path in bundle.folder.iterdir()} == names
    for network in NETWORKS:
        path = bundle.path(network)
        assert path is not None
        assert path.read_bytes() == files[network].read_bytes()
        card = CARDS.validate_json((bundle.folder / f"{network}.json").read_bytes())
        model = bundle.segmenter() if network == "segmentation" else bundle.assessor()
        assert card == model.card
        assert bundle.manifest.networks[network].version == model.version
    assert (bundle.manifest.parent, bundle.manifest.made_by, bundle.manifest.reason) == (None, "anna", "a test")
    with shelf.store.read() as transaction:
        published = bundles.serving(transaction)
    assert published is not None
    assert published.bundle.segmenter_version == bundle.segmenter().version
    assert published.bundle.assessor_version == bundle.assessor().version
    assert (published.manifest_sha256, published.actor) == (bundle.sha256, ANNA)
    assert told(shelf, 1) == [("published", "anna"), ("served", "anna")]


@pytest.fixture
def with_folds(files: dict[NetworkName, Path], tmp_path: Path) -> dict[NetworkName, Path]:
    """Model files, and those of two fold networks beside SegQC-Net's."""
    copies: dict[NetworkName, Path] = {n: Path(shutil.copy(path, tmp_path / path.name)) for n, path in files.items()}
    first = Segmenter.load(files["segmentation"])
    card = replace(first.card, seen=("scan_0",))
    others = [Segmenter(replace(card, seen=(f"scan_{i}",)), build_network(card.plan, seed=i)) for i in (1, 2)]
    Segmenter.save_members(others, tmp_path / FOLDS)
    return copies


def test_the_networks_of_the_folds_come_with_their_segqc_and_go_with_it(
    shelf: Bundles, with_folds: dict[NetworkName, Path], files: dict[NetworkName, Path]
) -> None:
    shelf.publish(with_folds, ANNA, "both")
    first = shelf.serving()
    assert first is not None and first.folds_path() == first.folder / FOLDS
    members = first.fold_networks()
    assert [member.card.members for member in members] == [1, 1]
    assert members[0].structures == first.assessor().structures
    weights = [next(iter(member.network.state_dict().values())) for member in members]
    assert not weights[0].equal(weights[1])
    assert [member.card.seen for member in members] == [("scan_1",), ("scan_2",)], "each knows whom it has seen"
    entry = first.manifest.networks["segqc"]
    assert entry.folds_sha256 == hashlib.sha256((first.folder / FOLDS).read_bytes()).hexdigest()
    assert first.folds_version() == entry.folds_sha256[:12]
    assert first.size() > sum(path.stat().st_size for path in files.values())
    shelf.publish({"segmentation": files["segmentation"]}, ANNA, "another segmenter")
    second = shelf.serving()
    assert second is not None and second.number == 2 and second.folds_version() == first.folds_version()
    shelf.publish({"segqc": files["segqc"]}, ANNA, "a SegQC-Net without")
    third = shelf.serving()
    assert third is not None and (third.folds_path(), third.folds_version()) == (None, None)
    assert not (third.folder / FOLDS).exists()
    with pytest.raises(ModelError, match=r"holds no networks of the folds.*segqc train segqc"):
        third.fold_networks()


def test_damaged_networks_of_the_folds_are_found_and_the_others_serve(
    shelf: Bundles, with_folds: dict[NetworkName, Path]
) -> None:
    shelf.publish(with_folds, ANNA, "both")
    path = shelf.folder / "1" / FOLDS
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{FOLDS}: is damaged" in str(problems(shelf)[1])
    bundle = shelf.serving()
    assert bundle is not None and bundle.assessor().version == bundle.manifest.networks["segqc"].version
    with pytest.raises(ModelError, match="is damaged"):
        bundle.fold_networks()
    path.unlink()
    assert f"{FOLDS}: is missing" in str(problems(shelf)[1])


def test_networks_of_the_folds_that_know_other_structures_are_refused(
    shelf: Bundles, with_folds: dict[NetworkName, Path], tmp_path: Path
) -> None:
    other = save_models(tmp_path / "other", (Structure("heart", (1,)),))
    Segmenter.save_members([Segmenter.load(other["segmentation"])] * 2, tmp_path / FOLDS)
    with pytest.raises(StructuresDiffer, match=f"{FOLDS}: these networks know other structures"):
        shelf.publish(with_folds, ANNA, "a test")
    assert shelf.serving() is None


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_is_published_with_the_other_one_of_the_bundle_before(
    shelf: Bundles, files: dict[NetworkName, Path], network: NetworkName
) -> None:
    other: NetworkName = "segqc" if network == "segmentation" else "segmentation"
    shelf.publish({network: files[network]}, ANNA, "first")
    alone = shelf.serving()
    assert alone is not None
    assert (alone.holds(network), alone.holds(other)) == (True, False)
    with pytest.raises(ModelError, match=f"holds no network '{other}'; train it first"):
        alone.assessor() if other == "segqc" else alone.segmenter()
    assert shelf.publish({other: files[other]}, BERT, "second") == 2
    both = shelf.serving()
    assert both is not None
    both.verify_all()
    assert set(both.manifest.networks) == set(NETWORKS)
    assert (both.manifest.parent, both.manifest.networks[network]) == (1, alone.manifest.networks[network])
    assert problems(shelf) == {1: None, 2: None}, "the one before stays whole"


def test_what_cannot_be_loaded_is_not_published(shelf: Bundles, files: dict[NetworkName, Path], tmp_path: Path) -> None:
    shelf.publish(files, ANNA, "a test")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for network, path in (
        ("segmentation", tmp_path / "junk.pt"),
        ("segqc", files["segmentation"]),
        ("segqc", tmp_path / "missing.pt"),
    ):
        with pytest.raises(ModelError, match=path.name):
            shelf.publish({network: path}, ANNA, "a test")  # type: ignore[dict-item]
    assert problems(shelf) == {1: None}


def test_a_block_that_fails_publishes_nothing(shelf: Bundles, files: dict[NetworkName, Path]) -> None:
    shelf.publish(files, ANNA, "a test")
    with pytest.raises(RuntimeError), shelf.publishing(files, ANNA, "another") as publication:
        assert (publication.number, publication.parent) == (2, 1)
        raise RuntimeError
    assert (serving(shelf), list(bundle_folders(shelf.folder))) == (1, [1])
    assert told(shelf, 2) == []


def test_trainings_that_end_at_the_same_time_do_not_lose_each_others_network(
    folder: Path, url: str | None, files: dict[NetworkName, Path]
) -> None:
    before = Bundles(Store.open(folder, url), Settings())
    barrier, failures = threading.Barrier(4), list[BaseException]()

    def publish(network: NetworkName) -> None:
        try:
            own = Bundles(Store.open(folder, url), Settings())
            barrier.wait()
            own.publish({network: files[network]}, ANNA, network)
            own.store.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=publish, args=(network,)) for network in NETWORKS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert serving(before) == 4
    assert problems(before) == dict.fromkeys(range(1, 5))
    bundle = before.serving()
    assert bundle is not None
    assert set(bundle.manifest.networks) == set(NETWORKS)
    parents = [b.published.parent for b in before.listing() if b.published is not None]
    assert parents == [None, 1, 2, 3]
    before.store.close()


def test_two_bundles_never_serve(store: Store) -> None:
    with store.write() as transaction:
        serve_pair(transaction, "seg", None)
        serve_pair(transaction, None, "qc")
        assert bundles.serving_number(transaction) == 2
    with pytest.raises(IntegrityError), store.write() as transaction:
        transaction.execute(text("UPDATE bundle SET serving = true"))
    with pytest.raises(IntegrityError), store.write() as transaction:
        bundles.add(transaction, NewBundle(id=3, manifest_sha256="0" * 64, reason="no network"), SERVER)
    with pytest.raises(StoreError, match="there is no bundle 7"), store.write() as transaction:
        bundles.serve(transaction, 7, SERVER)


# -------------------------------------------------------------------------------------------------------------- kills


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_the_commit(patch: pytest.MonkeyPatch) -> None:
    """Die when all is written, and the transaction is not committed."""
    write: Callable[[Database], AbstractContextManager[Any]] = Database.write

    def written(self: Database) -> AbstractContextManager[Any]:
        patch.setattr("sqlalchemy.Connection.commit", _die)
        return write(self)

    patch.setattr(Database, "write", written)


KILLS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "while model files are linked": lambda patch: patch.setattr(bundle_files, "_link", _die),
    "while the manifest is written": lambda patch: patch.setattr(bundle_files, "_write", _die),
    "before the folder has its name": lambda patch: patch.setattr(Path, "rename", _die),
    "before the row": lambda patch: patch.setattr(bundles, "add", _die),
    "before it serves": lambda patch: patch.setattr(bundles, "serve", _die),
    "at the commit": _at_the_commit,
    "before old files go": lambda patch: patch.setattr(Bundles, "prune", _die),
    "while old files go": lambda patch: patch.setattr(publishing, "set_aside", lambda f: (
        bundle_files.set_aside(f), _die())),
}  # fmt: skip


@pytest.mark.parametrize("kill", list(KILLS))
def test_a_kill_at_any_step_leaves_one_whole_bundle_that_serves(
    folder: Path, files: dict[NetworkName, Path], kill: str
) -> None:
    settings = Settings(models=ModelsSettings(keep=1))
    first = Bundles(Store.open(folder), settings)
    for _ in range(2):
        first.publish(files, ANNA, "a test")
    first.store.close()
    child = fork()
    if child == 0:
        try:
            own = Bundles(Store.open(folder), settings)
            with pytest.MonkeyPatch.context() as patch:
                KILLS[kill](patch)
                own.publish(files, BERT, "killed")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    after = Bundles(Store.open(folder), settings)
    committed = "files go" in kill
    assert serving(after) == (3 if committed else 2)
    bundle = after.serving()
    assert bundle is not None
    bundle.verify_all()
    last = max(bundle_folders(after.folder))
    assert after.publish(files, ANNA, "the next") == last + 1
    after.prune()
    assert not [path for path in after.folder.iterdir() if path.name.startswith(".")]
    assert len(bundle_folders(after.folder)) == 2
    assert all(status.problem is None or status.is_removed for status in after.listing())
    assert [finding for finding in after.findings() if finding.is_damage] == []
    after.store.close()


# ------------------------------------------------------------------------------------------------- damage and adoption


def _rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Write a file anew: others may be linked to the old one."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(change(content))


def _flip(content: bytes) -> bytes:
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


DAMAGE: dict[str, Callable[[Path], object]] = {
    "model": lambda folder: _rewrite(folder / "segqc.pt", _flip),
    "model cut short": lambda folder: _rewrite(folder / "segqc.pt", lambda content: content[:-1]),
    "model gone": lambda folder: (folder / "segqc.pt").unlink(),
    "card": lambda folder: _rewrite(folder / "segqc.json", _flip),
    "card gone": lambda folder: (folder / "segqc.json").unlink(),
    "manifest": lambda folder: _rewrite(folder / "manifest.json", lambda content: content[:-5]),
    "manifest of a later format": lambda folder: _rewrite(
        folder / "manifest.json", lambda content: content.replace(b'"format": 1', b'"format": 2')
    ),
    "manifest with more": lambda folder: _rewrite(
        folder / "manifest.json", lambda content: content.replace(b"{", b'{"more": 1,', 1)
    ),
    "manifest of another one": lambda folder: _rewrite(
        folder / "manifest.json", lambda content: content.replace(b"a test", b"b test")
    ),
    "manifest gone": lambda folder: (folder / "manifest.json").unlink(),
    "all gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_bundle_is_one_sentence_with_a_remedy_and_the_remedy_works(
    shelf: Bundles, files: dict[NetworkName, Path], damage: str
) -> None:
    shelf.publish(files, ANNA, "a test")
    shelf.publish(files, ANNA, "a test")
    DAMAGE[damage](shelf.folder / "2")
    own = Bundles(shelf.store, Settings())  # one that has loaded nothing
    with pytest.raises(
        ModelError, match=r"models/2.*; let an intact bundle serve \(segqc models serve FOLDER BUNDLE\)"
    ):
        bundle = own.serving()
        assert bundle is not None
        bundle.assessor()
    assert [path for path, problem in problems(own).items() if problem] == [2]
    assert [finding.is_damage for finding in own.findings()] == [True]
    assert own.serve(1, BERT)
    bundle = own.serving()
    assert bundle is not None
    assert bundle.assessor().version
    with pytest.raises(ModelError, match="models/2"):
        own.serve(2, BERT)
    assert serving(own) == 1


def copied(folder: Path, target: Path) -> Path:
    """A folder with the bundles of another one, and no database."""
    shutil.copytree(folder / "segqc" / "models", target / "segqc" / "models")
    return target


def test_a_folder_with_a_new_store_adopts_its_newest_intact_bundle(
    folder: Path, files: dict[NetworkName, Path], tmp_path: Path
) -> None:
    first = Bundles(Store.open(folder), Settings())
    for _ in range(3):
        first.publish(files, ANNA, "a test")
    first.store.close()
    target = copied(folder, tmp_path / "copy")
    DAMAGE["model"](target / "segqc" / "models" / "3")
    stores = [Store.open(target) for _ in range(2)]
    for store in stores:  # the second one finds it done
        bundle = Bundles(store, Settings()).serving()
        assert bundle is not None
        assert bundle.number == 2
        bundle.segmenter()
    shelf = Bundles(stores[0], Settings())
    assert told(shelf, 2) == [("published", "folder"), ("served", "folder")]
    published = {s.number: s.published for s in shelf.listing()}
    assert published[1] is not None, "the others can serve again"
    assert published[1].reason == "a test, by anna"
    assert published[1].actor == FOLDER
    assert shelf.publish(files, ANNA, "a test") == 4, "numbers are never given twice"


@pytest.mark.parametrize("network", NETWORKS)
def test_the_first_publication_with_a_new_store_carries_the_other_network_over(
    folder: Path, files: dict[NetworkName, Path], tmp_path: Path, network: NetworkName
) -> None:
    first = Bundles(Store.open(folder), Settings())
    first.publish(files, ANNA, "a test")
    first.store.close()
    shelf = Bundles(Store.open(copied(folder, tmp_path / "copy")), Settings())
    assert shelf.publish({network: files[network]}, ANNA, f"training of {network}") == 2
    serving = shelf.serving()
    assert serving is not None
    assert set(serving.manifest.networks) == set(NETWORKS)
    assert serving.manifest.parent == 1


def test_a_commit_that_fails_leaves_nothing(
    folder: Path, files: dict[NetworkName, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Bundles(Store.open(folder), Settings())
    shelf.publish(files, ANNA, "a test")
    before = sorted(shelf.folder.rglob("*"))

    def full(_: Connection) -> None:
        raise OperationalError("COMMIT", {}, Exception("database or disk is full"))

    with monkeypatch.context() as patch, pytest.raises(StoreUnavailable, match="disk is full"):
        patch.setattr(Connection, "commit", full)
        shelf.publish(files, ANNA, "another")
    assert sorted(shelf.folder.rglob("*")) == before
    assert shelf.publish(files, ANNA, "the next") == 2


OTHER_STRUCTURES = (STRUCTURES[0], Structure("kidney", (3,)))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_of_other_structures_is_refused_as_one_of_a_pair_and_goes_alone_after_a_training(
    shelf: Bundles,
    files: dict[NetworkName, Path],
    tmp_path: Path,
    network: NetworkName,
    caplog: pytest.LogCaptureFixture,
) -> None:
    other: NetworkName = "segqc" if network == "segmentation" else "segmentation"
    foreign = save_models(tmp_path / "foreign", OTHER_STRUCTURES)
    shelf.publish(files, ANNA, "a test")
    for tried in ({network: foreign[network]}, {network: foreign[network], other: files[other]}):
        refused = pytest.raises(StructuresDiffer, match=r"kidney \[3\], liver \[1\].*segqc round")
        with refused as caught, shelf.publishing(tried, ANNA, "upload", only_as_pair=True):
            pass
        assert caught.value.status == 409
        assert bundle_folders(shelf.folder).keys() == {serving(shelf)} == {1}
    assert shelf.publish({network: foreign[network]}, ANNA, f"training of {network}") == 2
    bundle = shelf.serving()
    assert bundle is not None
    assert (bundle.holds(network), bundle.holds(other)) == (True, False)
    assert f"without {other}" in caplog.text
    assert shelf.publish({other: foreign[other]}, ANNA, f"training of {other}") == 3
    bundle = shelf.serving()
    assert bundle is not None
    assert bundle.segmenter().structures == OTHER_STRUCTURES


def test_the_order_of_the_structures_makes_no_other_pair(
    shelf: Bundles, files: dict[NetworkName, Path], tmp_path: Path
) -> None:
    turned = save_models(tmp_path / "turned", STRUCTURES[::-1])
    shelf.publish(files, ANNA, "a test")
    shelf.publish({"segqc": turned["segqc"]}, ANNA, "a test")
    bundle = shelf.serving()
    assert bundle is not None
    assert bundle.manifest.networks.keys() == set(NETWORKS)
    bundle.verify_all()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made, chdir(path.parent):
        made.bind(path.name)


def _huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 10**12)


PLACED: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a pipe": _pipe,
    "a socket": _socket,
    "a terabyte": _huge,
    "a dead link": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "zeros without end": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize(
    ("file", "placed"),
    [(file, placed) for file in ("manifest.json", "segqc.json") for placed in PLACED]
    + [("segqc.pt", placed) for placed in PLACED if placed != "a terabyte"],  # a model may be of any size
)
def test_whatever_lies_in_the_place_of_a_file_is_damage_with_its_remedy(
    folder: Path, two_bundles: Path, files: dict[NetworkName, Path], file: str, placed: str
) -> None:
    shutil.copytree(two_bundles / "segqc", folder / "segqc", copy_function=os.link)
    path = folder / "segqc" / "models" / "2" / file
    path.unlink()
    PLACED[placed](path)
    shelf = Bundles(Store.open(folder), Settings())
    bundle = shelf.serving()
    assert bundle is not None
    assert bundle.number == 1, "the newest intact one is adopted"
    told = problems(shelf)
    assert told[1] is None
    assert str(path) in str(told[2])
    assert "train" in str(told[2]) or "let SegQC read" in str(told[2])
    assert ("not a model file" in str(told[2])) <= (file == "segqc.pt")
    with pytest.raises(ModelError, match=re.escape(str(path))):
        shelf.serve(2, BERT)
    assert shelf.publish(files, ANNA, "a test") == 3
    shelf.store.close()


NASTY = st.sampled_from([
    None, True, 0, -1, 1, 2, 3, 2**31, 2**63, 10**30, -(10**18), 10**18, 1.5, 1e308, "", "x" * 10_000, "a\0b",
    "\x1b[2J", "\u202e", "segqc", [], {}, [[]], {"segqc": {}}, {"": ""}, "0001-01-01T00:00:00Z",
    "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00", "1970-01-01T00:00:00Z", "2020-01-01",
    "2020-01-01T00:00:00", "2020-01-01T00:00:00+00:00",
])  # fmt: skip
FIELDS = st.sampled_from(
    ["format", "number", "made_at", "made_by", "reason", "parent", "networks", "networks.segqc", "networks.other",
     "networks.segqc.version", "networks.segqc.model_sha256", "networks.segmentation.card_sha256", "more"]
)  # fmt: skip


@pytest.fixture(scope="module")
def two_bundles(tmp_path_factory: pytest.TempPathFactory, files: dict[NetworkName, Path]) -> Path:
    """A folder with bundles 1 and 2, and no database."""
    folder = tmp_path_factory.mktemp("bundles") / "studies"
    folder.mkdir()
    shelf = Bundles(Store.open(folder), Settings())
    for _ in range(2):
        shelf.publish(files, ANNA, "a test")
    shelf.store.close()
    for path in (folder / "segqc").glob("store.sqlite*"):
        path.unlink()
    return folder


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(FIELDS, NASTY, min_size=1, max_size=3), cut=st.one_of(st.none(), st.binary(max_size=20)))
@example(changes={"made_at": "0001-01-01T00:00:00+14:00"}, cut=None)
@example(changes={"made_by": "a\0b"}, cut=None)
@example(changes={"parent": 9}, cut=None)
@example(changes={}, cut=b"[" * 20)
def test_no_manifest_stops_a_server_or_a_command(
    two_bundles: Path, changes: dict[str, object], cut: bytes | None
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(two_bundles / "segqc", folder / "segqc", copy_function=os.link)
        manifest = folder / "segqc" / "models" / "2" / "manifest.json"
        body = json.loads(manifest.read_bytes())
        for field, value in changes.items():
            *above, last = field.split(".")
            inner = body
            for part in above:
                inner = inner.get(part) if isinstance(inner, dict) else None
            if isinstance(inner, dict):
                inner[last] = value
        manifest.unlink()
        manifest.write_bytes(json.dumps(body).encode() if cut is None else cut)
        shelf = Bundles(Store.open(folder), Settings())
        bundle = shelf.serving()
        assert bundle is not None
        assert bundle.number in (1, 2)
        assert (problems(shelf)[2] is None) == (bundle.number == 2)
        if bundle.number == 1:
            with pytest.raises(ModelError, match="2"):
                shelf.serve(2, BERT)
        shelf.findings()
        shelf.store.close()
        listed = CliRunner().invoke(main.app, ["models", "list", str(folder)])
        assert listed.exit_code == 0, listed.output


def test_folders_of_other_names_are_no_bundles(shelf: Bundles, files: dict[NetworkName, Path]) -> None:
    shelf.publish(files, ANNA, "a test")
    names = ["0", "01", "-1", "1e3", "1000000000", "99999999999999999999", "\u0663", "2 ", "x", ".hidden", "\udcff"]
    for name in names:
        shutil.copytree(shelf.folder / "1", shelf.folder / name)
    assert problems(shelf) == {1: None}
    assert shelf.findings() == []
    assert shelf.publish(files, ANNA, "a test") == 2
    assert shelf.prune() == []
    assert {path.name for path in shelf.folder.iterdir()} == {*names, "1", "2"}


def test_after_the_last_number_the_folder_that_has_it_is_named(shelf: Bundles, files: dict[NetworkName, Path]) -> None:
    stray = shelf.folder / str(bundle_files.LAST_NUMBER)
    stray.mkdir(parents=True)
    with pytest.raises(ModelError, match=f"{stray}: no bundle can have a larger number; rename"):
        shelf.publish(files, ANNA, "a test")
    assert [path.name for path in shelf.folder.iterdir()] == [stray.name]
    stray.rename(stray.with_name("stray"))
    assert shelf.publish(files, ANNA, "a test") == 1
    for number in (2, 2**31, 10**30):
        with pytest.raises(StoreError, match=f"there is no bundle {number}"):
            shelf.serve(number, BERT)


@pytest.mark.parametrize("name", [".bundle-3", ".bundle-2-removed", "3"])
@pytest.mark.parametrize("kind", ["file", "dead link", "link to a folder"])
def test_what_lies_where_a_bundle_belongs_hinders_no_publication(
    folder: Path, files: dict[NetworkName, Path], tmp_path: Path, name: str, kind: str
) -> None:
    shelf = Bundles(Store.open(folder), Settings(models=ModelsSettings(keep=0)))
    for reason in ("first", "second"):
        shelf.publish(files, ANNA, reason)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    if kind == "file":
        (shelf.folder / name).touch()
    else:
        (shelf.folder / name).symlink_to(elsewhere if kind == "link to a folder" else tmp_path / "nowhere")
    number = shelf.publish(files, ANNA, "a test")
    assert number == (4 if name == "3" else 3)
    serving = shelf.serving()
    assert serving is not None
    serving.verify_all()
    assert not [path for path in shelf.folder.iterdir() if path.name.startswith(".bundle-")]
    assert (elsewhere / "kept").exists()


def test_a_folder_with_damaged_bundles_only_says_so(
    folder: Path, files: dict[NetworkName, Path], tmp_path: Path
) -> None:
    first = Bundles(Store.open(folder), Settings())
    first.publish(files, ANNA, "a test")
    first.store.close()
    target = copied(folder, tmp_path / "copy")
    DAMAGE["manifest"](target / "segqc" / "models" / "1")
    shelf = Bundles(Store.open(target), Settings())
    with pytest.raises(ModelError, match="models/1"):
        shelf.serving()
    assert shelf.publish(files, ANNA, "a test") == 2
    assert shelf.serving() is not None


def test_model_files_that_somebody_puts_there_become_the_first_bundle(
    shelf: Bundles, files: dict[NetworkName, Path]
) -> None:
    shelf.folder.mkdir(parents=True)
    loose = {network: shelf.folder / model_name(network) for network in NETWORKS}
    loose["segmentation"].write_bytes(b"junk")
    with pytest.raises(ModelError, match=r"models/segmentation\.pt: not a readable SegQC model file"):
        shelf.serving()
    for network, path in loose.items():
        shutil.copyfile(files[network], path)
    bundle = shelf.serving()
    assert bundle is not None
    assert (bundle.number, set(bundle.manifest.networks)) == (1, set(NETWORKS))
    assert told(shelf, 1) == [("published", "folder"), ("served", "folder")]
    assert [path.name for path in shelf.folder.iterdir()] == ["1"]
    loose["segqc"].write_bytes(b"junk")
    assert shelf.serving() is bundle, "what lies there beside a bundle is nobody's"


# --------------------------------------------------------------------------------------------------- serve and remove


def test_a_bundle_that_served_serves_again_and_everybody_sees_it(
    shelf: Bundles, files: dict[NetworkName, Path], folder: Path, url: str | None
) -> None:
    other = Bundles(Store.open(folder, url), Settings())
    shelf.publish(files, ANNA, "a test")
    shelf.publish({"segqc": files["segqc"]}, ANNA, "a test")
    second = other.serving()
    assert second is not None
    assert other.serving() is second, "loaded once"
    with shelf.store.write() as transaction:
        for job in jobs.open_jobs(transaction, "scoring"):
            jobs.stop(transaction, job.id, SERVER)
    assert shelf.serve(1, BERT)
    assert not shelf.serve(1, BERT), "it serves already"
    first = other.serving()
    assert first is not None
    assert first.number == 1
    by_hand = [("chosen", "bert"), ("served", "bert"), ("chosen", "bert")]
    assert told(shelf, 1) == [("published", "anna"), ("served", "anna"), *by_hand]
    with shelf.store.read() as transaction:
        assert len(jobs.open_jobs(transaction, "scoring")) == 1, "the scans that wait are scored by it"
    assert shelf.publish({"segqc": files["segqc"]}, ANNA, "a test") == 3
    third = other.serving()
    assert third is not None
    assert third.manifest.parent == 1, "on top of the one that served"
    other.store.close()


@pytest.mark.parametrize("kind", ["train", "round"])
def test_the_pool_is_scored_by_what_serves_whatever_becomes_of_the_jobs_that_wait(
    shelf: Bundles, files: dict[NetworkName, Path], kind: str
) -> None:
    with shelf.store.write() as transaction:
        waiting = jobs.enqueue(transaction, kind, {}, ANNA)
    shelf.publish({"segmentation": files["segmentation"]}, ANNA, "half a pair")
    with shelf.store.read() as transaction:
        assert not jobs.open_jobs(transaction, "scoring"), "without SegQC-Net there is nothing to score by"
    shelf.publish({"segqc": files["segqc"]}, ANNA, "the other half")
    shelf.publish(files, ANNA, "both again")
    with shelf.store.write() as transaction:
        jobs.stop(transaction, waiting.id, ANNA)
    with shelf.store.read() as transaction:
        (scoring,) = jobs.listing(transaction, "scoring")
    assert (scoring.state, scoring.request, scoring.actor) == ("queued", {"method": "segqc"}, SERVER)


@pytest.mark.parametrize(("keep", "kept"), [(0, [6]), (2, [4, 5, 6]), (5, [1, 2, 3, 4, 5, 6])])
def test_the_files_of_old_bundles_go_and_their_rows_stay(
    store: Store, files: dict[NetworkName, Path], keep: int, kept: list[int]
) -> None:
    shelf = Bundles(store, Settings(models=ModelsSettings(keep=keep)))
    for _ in range(6):
        shelf.publish({"segqc": files["segqc"]}, ANNA, "a test")
    assert list(bundle_folders(shelf.folder)) == kept
    listed = shelf.listing()
    assert [status.number for status in listed if status.published is not None] == [1, 2, 3, 4, 5, 6]
    assert [status.number for status in listed if not status.is_removed] == kept
    assert shelf.findings() == [], "what was removed by the rule is no damage"
    bundle = shelf.serving()
    assert bundle is not None
    bundle.verify_all()
    if 1 not in kept:
        assert told(shelf, 1)[-1] == ("files removed", "server")
        with pytest.raises(ModelError, match="the files of bundle 1 are gone"):
            shelf.serve(1, ANNA)


def test_no_bundle_goes_that_serves_or_that_a_running_job_may_need(
    store: Store, files: dict[NetworkName, Path], clock: Clock
) -> None:
    shelf = Bundles(store, Settings(models=ModelsSettings(keep=0)))
    shelf.publish(files, ANNA, "a test")
    clock.pass_(minutes=1)
    with store.write() as transaction:
        job = jobs.enqueue(transaction, "batch_infer", {"model": "segmentation"}, ANNA)
        assert jobs.claim(transaction, "w1", ["batch_infer"]) is not None
    for _ in range(2):
        clock.pass_(minutes=1)
        shelf.publish(files, ANNA, "a test")
    assert list(bundle_folders(shelf.folder)) == [1, 2, 3]
    with store.write() as transaction:
        jobs.finish(transaction, job.id, "w1", "done", {})
    clock.pass_(minutes=1)
    assert shelf.serve(1, ANNA)
    assert shelf.prune() == [2, 3]
    assert serving(shelf) == 1


# ----------------------------------------------------------------------------------------------------------- are held


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[NetworkName, Path]]:
    """Model files whose estimates are good, worthless, and checked on too few patients."""
    cards = {"good": good_card(), "worthless": worthless_card(), "few": worthless_card(patients=5)}
    return {
        name: save_models(tmp_path_factory.mktemp(name), report=card) for name, card in cards.items()
    }  # fmt: skip


def test_a_bundle_of_worse_estimates_is_kept_and_does_not_serve_by_itself(
    shelf: Bundles, checked: dict[str, dict[NetworkName, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    assert shelf.publish(checked["good"], ANNA, "first") == 1
    with shelf.publishing(checked["worthless"], BERT, "a short training") as publication:
        assert (publication.number, publication.parent) == (2, 1)
        assert publication.held_because is not None
        assert "on 30 patients that both were checked on, its estimated Dice is off by" in publication.held_because
    assert serving(shelf) == 1
    assert told(shelf, 2) == [("published", "bert"), ("held", "bert")]
    (told_once,) = [m for m in caplog.messages if "bundle 2 is held" in m]
    assert publication.held_because in told_once and f"segqc models serve {shelf.store.dataset} 2" in told_once
    assert shelf.open(2).manifest.held_because == publication.held_because
    assert shelf.open(1).manifest.held_because is None
    held = [status.published.held_because for status in shelf.listing() if status.published is not None]
    assert held == [None, publication.held_because]
    assert problems(shelf) == {1: None, 2: None}
    assert shelf.serve(2, ANNA)
    assert serving(shelf) == 2
    with shelf.store.read() as transaction:
        assert bundles.get(transaction, 2).held_because is None, "somebody lets it serve"
        assert bundles.ranked_by(transaction) == AT_RANDOM
    assert told(shelf, 2)[-1] == ("served", "anna")


@pytest.mark.parametrize(
    "first, second", [("worthless", "good"), ("good", "few"), ("few", "worthless"), ("good", "good")]
)
def test_a_bundle_serves_where_its_estimates_are_not_known_to_be_worse(
    shelf: Bundles, checked: dict[str, dict[NetworkName, Path]], first: str, second: str
) -> None:
    shelf.publish(checked[first], ANNA, "first")
    shelf.publish(checked[second], ANNA, "second")
    assert serving(shelf) == 2


def with_masks(folder: Path, level: float, patients: int = 20) -> dict[NetworkName, Path]:
    """Model files of a segmentation network whose masks of the validation scans have a Dice around a level."""
    folder.mkdir()
    files = save_models(folder)
    segmenter = Segmenter.load(files["segmentation"])
    rng = np.random.default_rng(int(100 * level))
    dice = level + 0.1 * np.arange(patients) / 20 + 0.01 * rng.random(patients)
    masks = tuple(MaskDice(patient=f"p{i}", scan=f"s{i}", dice=float(d)) for i, d in enumerate(dice))
    Segmenter(replace(segmenter.card, validation=masks), segmenter.network).save(files["segmentation"])
    return files


@pytest.mark.parametrize(
    "level, patients, tolerated, number", [(0.6, 20, 0.0, 1), (0.6, 8, 0.0, 2), (0.6, 20, 0.3, 2), (0.8, 20, 0.0, 2)]
)
def test_a_bundle_of_worse_masks_is_kept_and_does_not_serve_by_itself(
    store: Store,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    level: float,
    patients: int,
    tolerated: float,
    number: int,
) -> None:
    shelf = Bundles(store, Settings(models=ModelsSettings(tolerated_fall=tolerated)))
    shelf.publish(with_masks(tmp_path / "first", 0.75), ANNA, "first")
    new = with_masks(tmp_path / "second", level, patients)
    with shelf.publishing({"segmentation": new["segmentation"]}, BERT, "a training") as publication:
        held = publication.held_because
    assert serving(shelf) == number
    told = "on 8 validation patients, too few to hold the new bundle for it; 'segqc models serve"
    assert (told in caplog.text) == (patients == 8)
    if number == 1:
        assert held is not None and "on 20 validation patients that both were checked on" in held
        assert "the mean Dice of its masks is lower by 0.1" in held
        with shelf.publishing(new, ANNA, "in any case", even_if_worse=True):
            pass
        assert serving(shelf) == 3, "an upload or --serve is somebody's wish"
    else:
        assert held is None


def begun_now(shelf: Bundles) -> Begun:
    with shelf.store.read() as transaction:
        return jobs.begun_now(transaction)


@pytest.mark.parametrize("wanted", [False, True], ids=["by itself", "even if worse"])
def test_what_is_let_serve_by_hand_while_networks_are_trained_serves_on(
    shelf: Bundles, files: dict[NetworkName, Path], clock: Clock, caplog: pytest.LogCaptureFixture, wanted: bool
) -> None:
    shelf.publish(files, SERVER, "first")
    shelf.publish(files, SERVER, "second")
    shelf.serve(1, BERT)  # before the work begins: what comes of it is newer
    first, second = begun_now(shelf), begun_now(shelf)
    with shelf.publishing(files, SERVER, "a round", even_if_worse=wanted, begun=first) as publication:
        assert publication.held_because is None
    assert serving(shelf) == 3
    clock.pass_(hours=-5)  # by no clock
    shelf.serve(1, ANNA)
    with shelf.publishing(files, SERVER, "a training", even_if_worse=wanted, begun=second) as publication:
        reason = "bundle 1 was chosen by hand while the networks of this one were trained"
        assert publication.held_because == reason
    assert serving(shelf) == 1
    assert told(shelf, 4) == [("published", "server"), ("held", "server")]
    assert f"{reason}; 'segqc models serve {shelf.store.dataset} 4' lets it serve" in caplog.text
    with shelf.publishing(files, SERVER, "the next round", begun=begun_now(shelf)):
        pass
    assert serving(shelf) == 5, "the choice is of before it"


def test_a_choice_that_a_later_training_has_replaced_holds_nothing(
    shelf: Bundles, files: dict[NetworkName, Path]
) -> None:
    shelf.publish(files, SERVER, "first")
    round_began = begun_now(shelf)
    shelf.serve(1, ANNA)  # it serves already: to say so is a choice, too
    with shelf.publishing(files, ANNA, "a training", begun=begun_now(shelf)):
        pass
    with shelf.publishing(files, SERVER, "a round", begun=round_began) as publication:
        assert publication.held_because is None
    assert serving(shelf) == 3


def test_a_bundle_knows_how_old_the_labels_of_both_networks_are(shelf: Bundles, files: dict[NetworkName, Path]) -> None:
    def newest(number: int) -> tuple[int | None, int | None]:
        with shelf.store.read() as transaction:
            return bundles.newest_labels(transaction, number)

    with shelf.publishing({"segmentation": files["segmentation"]}, SERVER, "training", begun=Begun(event=0, label=7)):
        pass
    with shelf.publishing({"segqc": files["segqc"]}, SERVER, "training", begun=Begun(event=0, label=9)):
        pass
    shelf.publish({"segqc": files["segqc"]}, ANNA, "the same networks with other intervals")
    assert [newest(number) for number in (1, 2, 3)] == [(7, None), (7, 9), (7, 9)]


def test_worse_estimates_serve_where_they_are_wanted_or_carried_over(
    shelf: Bundles, checked: dict[str, dict[NetworkName, Path]]
) -> None:
    shelf.publish(checked["good"], ANNA, "first")
    with shelf.publishing({"segqc": checked["worthless"]["segqc"]}, ANNA, "wanted", even_if_worse=True) as publication:
        assert publication.held_because is None
    assert serving(shelf) == 2
    shelf.publish({"segmentation": checked["good"]["segmentation"]}, ANNA, "training of segmentation")
    assert serving(shelf) == 3
    bundle = shelf.serving()
    assert bundle is not None
    assert bundle.manifest.report == bundle.assessor().card.report == worthless_card()


def test_a_damaged_bundle_does_not_serve_on(shelf: Bundles, checked: dict[str, dict[NetworkName, Path]]) -> None:
    shelf.publish(checked["good"], ANNA, "first")
    manifest = shelf.folder / "1" / "manifest.json"
    manifest.chmod(0o644)
    manifest.write_text("junk")
    shelf.publish(checked["worthless"], ANNA, "second")
    assert serving(shelf) == 2


def adopted(shelf: Bundles) -> int | None:
    bundle = shelf.serving()
    return None if bundle is None else bundle.number


def test_a_folder_with_a_new_store_adopts_no_held_bundle(
    folder: Path, checked: dict[str, dict[NetworkName, Path]], tmp_path: Path
) -> None:
    first = Bundles(Store.open(folder), Settings())
    first.publish(checked["good"], ANNA, "first")
    first.publish(checked["worthless"], ANNA, "a short training")
    first.store.close()
    shelf = Bundles(Store.open(copied(folder, tmp_path / "copy")), Settings())
    assert adopted(shelf) == 1
    assert told(shelf, 2) == [("published", "folder"), ("held", "folder")]
    (_, held) = [status.published for status in shelf.listing()]
    assert held is not None and held.held_because == shelf.open(2).manifest.held_because is not None
    DAMAGE["model"](first.folder / "1")
    alone = Bundles(Store.open(copied(folder, tmp_path / "damaged")), Settings())
    assert adopted(alone) == 2, "worse estimates are better than no networks"


def test_a_held_bundle_that_somebody_let_serve_is_adopted_where_a_later_one_shows_it(
    folder: Path, checked: dict[str, dict[NetworkName, Path]], tmp_path: Path
) -> None:
    first = Bundles(Store.open(folder), Settings())
    first.publish(checked["good"], ANNA, "first")
    first.publish(checked["worthless"], ANNA, "a short training")
    first.serve(2, ANNA)
    first.publish(checked["good"], ANNA, "third")
    first.store.close()
    target = copied(folder, tmp_path / "copy")
    DAMAGE["model"](target / "segqc" / "models" / "3")
    assert adopted(Bundles(Store.open(target), Settings())) == 2


def test_what_is_held_does_not_serve_at_the_same_time(
    shelf: Bundles, checked: dict[str, dict[NetworkName, Path]]
) -> None:
    shelf.publish(checked["good"], ANNA, "first")
    with pytest.raises(IntegrityError), shelf.store.write() as transaction:
        bundles.hold(transaction, 1, "worse", ANNA)


def test_the_commands_show_what_is_held_and_why(folder: Path, checked: dict[str, dict[NetworkName, Path]]) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(main.app, ["models", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    shelf = Bundles(Store.open(folder), Settings())
    for name in ("good", "worthless"):
        shelf.publish(checked[name], ANNA, name)
    good, held = json.loads(run("list", str(folder), "--json"))["bundles"]
    assert (good["serving"], held["serving"]) == (True, False)
    assert good["held because"] is None and "is off by" in held["held because"]
    assert (good["checked patients"], held["checked patients"]) == (30, 30)
    shown = run("show", str(folder), "2")
    assert "bundle 2 does not serve: held, on 30 patients" in shown
    assert "Do not rely on the estimated Dice" in shown and "Ordered at random" in shown
    assert "missed" in shown and "ARVD constant" in shown
    body = json.loads(run("show", str(folder), "1", "--json"))
    assert (body["serving"], body["report_card"]["estimate"]) == (True, "better than the constant")
    run("serve", str(folder), "2")
    assert "bundle 2 serves" in run("show", str(folder), "2")
    assert run("show", str(folder)) == run("show", str(folder), "2"), "the one that serves"
    shelf.store.close()


# ------------------------------------------------------------------------------------------------ commands and backups


def test_the_commands_list_bundles_and_let_one_serve(folder: Path, files: dict[NetworkName, Path]) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(main.app, ["models", *arguments])
        assert result.exit_code == code, result.output
        return result.output if code == 0 else str(result.exception)

    (folder / "segqc.toml").touch()
    assert json.loads(run("list", str(folder), "--json")) == {"bundles": []}
    assert "No network was trained here yet" in run("list", str(folder))
    shelf = Bundles(Store.open(folder), Settings())
    shelf.publish({"segmentation": files["segmentation"]}, ANNA, "training of segmentation")
    shelf.publish({"segqc": files["segqc"]}, BERT, "training of segqc")
    DAMAGE["card"](shelf.folder / "2")
    first, second = json.loads(run("list", str(folder), "--json"))["bundles"]
    assert {key: first[key] for key in ("bundle", "segqc", "by", "reason", "serving", "files")} == {
        "bundle": 1, "segqc": None, "by": "anna", "reason": "training of segmentation", "serving": False,
        "files": "intact",
    }  # fmt: skip
    for bundle in (first, second):
        unknown = ("checked patients", "MAE/constant", "Spearman", "held because")
        assert [bundle[column] for column in unknown] == [None] * 4, "untrained networks were never checked"
    assert first["segmentation"] == second["segmentation"]
    assert (second["by"], second["serving"]) == ("bert", True)
    assert "segqc.json: is damaged" in second["files"]
    served = run("serve", str(folder), "1")
    assert "bundle 1 serves" in served
    assert "holds no network segqc: masks get no estimates" in served
    assert f"segqc train segqc {folder}" in served
    assert "bundle 1 serves already" in run("serve", str(folder), "1")
    assert serving(shelf) == 1
    assert "is damaged" in run("serve", str(folder), "2", code=1)
    assert "there is no bundle 9" in run("serve", str(folder), "9", code=1)
    columns = "bundle,made,segmentation,segqc,by,reason,serving,checked patients,MAE/constant,Spearman,held because"
    assert run("list", str(folder), "--csv").startswith(f"{columns},MB,files\n1,")
    shelf.store.close()


def test_a_bundle_whose_process_died_before_its_row_can_serve(
    folder: Path, files: dict[NetworkName, Path], tmp_path: Path
) -> None:
    shelf = Bundles(Store.open(folder), Settings())
    shelf.publish(files, ANNA, "a test")
    other = Bundles(Store.open(copied(folder, tmp_path / "copy")), Settings())
    other.publish(files, ANNA, "a test")
    shutil.copytree(other.folder / "2", shelf.folder / "2")
    (shelf.folder / ".bundle-3").mkdir()
    assert [(finding.is_damage, finding.what) for finding in shelf.findings()] == [
        (False, f"{shelf.folder / '2'}: the store does not know this bundle"),
        (False, f"{shelf.folder / '.bundle-3'}: left over from a process that died while it published or removed a "
                "bundle"),
    ]  # fmt: skip
    assert serving(shelf) == 1
    shelf.sweep()
    assert shelf.serve(2, BERT)
    assert shelf.findings() == []
    for own in (shelf, other):
        own.store.close()


@pytest.mark.parametrize("there", ["nothing", "the same bundle", "another bundle of its number"])
def test_a_backup_brings_the_bundle_back_that_served(
    folder: Path, files: dict[NetworkName, Path], tmp_path: Path, there: str
) -> None:
    shelf = Bundles(Store.open(folder), Settings())
    for _ in range(2):
        shelf.publish(files, ANNA, "a test")
    maintenance.backup(shelf.store, tmp_path / "backup")
    assert [path.name for path in (tmp_path / "backup" / "segqc" / "models").iterdir()] == ["2"]
    shelf.publish(files, ANNA, "a test")
    shelf.store.close()
    target = folder
    if there != "the same bundle":
        target = tmp_path / "new"
        target.mkdir()
    if there == "another bundle of its number":
        others = Bundles(Store.open(target), Settings())
        for _ in range(2):
            others.publish(files, BERT, "another")
        others.store.close()
    done = restore(tmp_path / "backup", target, settings_file="segqc.toml")
    restored = Bundles(Store.open(target), Settings())
    bundle = restored.serving()
    assert bundle is not None
    assert (bundle.number, bundle.manifest.made_by) == (2, "anna")
    bundle.verify_all()
    if there == "another bundle of its number":
        assert done.aside is not None
        aside = NetworkBundle.open(done.aside / "segqc" / "models" / "2")
        assert aside.manifest.made_by == "bert", "set aside, not lost"
    assert restored.publish(files, ANNA, "a test") == (4 if there == "the same bundle" else 3)
    restored.store.close()
