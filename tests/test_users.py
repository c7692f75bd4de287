"""Who may sign in: the store's part, on SQLite and on PostgreSQL, and the command."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError
from typer.testing import CliRunner

from segqc.cli.main import app
from segqc.io.archive import export_archive
from segqc.store import events, users
from segqc.store.database import StoreError
from segqc.store.records import Actor, SignInRecord, UserRecord
from segqc.store.schema import UserRow
from segqc.store.store import Store
from segqc.store.users import UnknownUser
from tests.store_kit import Clock

ROOT = Actor(kind="person", name="root", identified_by="command")
HOUR = dt.timedelta(hours=1)


@pytest.fixture
def store(tmp_path: Path, url: str | None, clock: Clock) -> Iterator[Store]:
    opened = Store.open(tmp_path, url, clock=clock)
    yield opened
    opened.close()


def add(store: Store, name: str = "anna", password_hash: str | None = "a hash") -> UserRecord:
    with store.write() as transaction:
        return users.add(transaction, name, "annotator", password_hash, ROOT)


def begin(store: Store, user: UserRecord, secret: str) -> SignInRecord:
    with store.write() as transaction:
        return users.begin(transaction, user, "token", secret, "signed-in", HOUR, "10.0.0.1")


def current(store: Store, secret: str) -> SignInRecord | None:
    with store.read() as transaction:
        return users.current(transaction, secret)


def told(store: Store, user: UserRecord) -> list[tuple[str, str]]:
    with store.read() as transaction:
        return [(event.actor.name, event.verb) for event in events.history(transaction, "user", user.id)]


def test_a_user_is_known_by_the_name_whatever_its_case(store: Store) -> None:
    user = add(store, "Änna")
    with store.read() as transaction:
        assert users.get(transaction, "a\u0308NNA") == user
        assert users.find(transaction, "änna") == (user, "a hash")
        assert users.find(transaction, "anna") is None
        assert users.find(transaction, " \u00e4nna ") == (user, "a hash"), "as it is typed"
    for other in ("Änna", "ÄNNA"):
        with pytest.raises(StoreError, match="already"):
            add(store, other)


@pytest.mark.parametrize("name", ["", " ", " anna", "anna ", "an\nna", "an\0na", "\udcff", "a" * 201])
def test_what_is_no_name_is_refused(store: Store, name: str) -> None:
    with pytest.raises(StoreError, match="no name of a user"):
        add(store, name)
    with store.read() as transaction:
        assert users.find(transaction, name) is None


def test_two_processes_cannot_add_the_same_user(store: Store) -> None:
    add(store)
    with pytest.raises(IntegrityError), store.write() as transaction:
        transaction.add(
            UserRow(name="Anna", key="anna", role="annotator", is_role_provided=False, added_at=transaction.now)
        )


def test_a_sign_in_counts_until_it_expires(store: Store, clock: Clock) -> None:
    user = add(store)
    begin(store, user, "s1")
    clock.pass_(minutes=59)
    found = current(store, "s1")
    assert found is not None
    assert (found.user.name, found.user.last_sign_in_at) == ("anna", found.made_at)
    assert current(store, "s2") is None
    clock.pass_(minutes=1)
    assert current(store, "s1") is None
    with store.read() as transaction:
        assert users.open_sign_ins(transaction) == {}


def test_expired_sign_ins_do_not_pile_up(store: Store, clock: Clock) -> None:
    user = add(store)
    begin(store, user, "s1")
    clock.pass_(hours=2)
    begin(store, user, "s1")  # the same secret would be refused while it is there


def test_a_role_counts_at_once_for_sessions_that_are_open(store: Store) -> None:
    user = add(store)
    begin(store, user, "s1")
    with store.write() as transaction:
        users.set_role(transaction, "Anna", "operator", ROOT)
    found = current(store, "s1")
    assert found is not None
    assert found.user.role == "operator"


@pytest.mark.parametrize("how", ["signed out", "all ended", "password", "removed"])
def test_sign_ins_can_be_ended(store: Store, how: str) -> None:
    user, other = add(store), add(store, "bert")
    begin(store, user, "s1")
    begin(store, other, "s2")
    with store.write() as transaction:
        if how == "signed out":
            users.end(transaction, "s1")
        elif how == "all ended":
            assert users.end_all(transaction, "anna", ROOT) == 1
        elif how == "password":
            users.set_password(transaction, "anna", "another", ROOT)
        else:
            users.remove(transaction, "anna", ROOT)
    assert current(store, "s1") is None
    assert current(store, "s2") is not None


def test_the_history_tells_who_did_what_to_users(store: Store) -> None:
    user = add(store)
    begin(store, user, "s1")
    with store.write() as transaction:
        users.end(transaction, "s1")
        users.end(transaction, "s1")
        users.set_role(transaction, "anna", "reviewer", ROOT)
        users.set_role(transaction, "anna", "reviewer", ROOT)
        users.set_password(transaction, "anna", "another", ROOT)
        users.remove(transaction, "anna", ROOT)
    assert told(store, user) == [
        ("root", "added"), ("anna", "signed in"), ("anna", "signed out"), ("root", "role set"),
        ("root", "password set"), ("root", "removed"),
    ]  # fmt: skip
    with store.read() as transaction:
        assert [(name, e.verb) for name, e in users.history(transaction)] == [
            ("anna", verb) for _, verb in told(store, user)
        ]
    again = add(store)
    assert again.id != user.id, "the history would take the two for one"


def test_a_user_who_is_gone_cannot_sign_in(store: Store) -> None:
    user = add(store)
    with store.write() as transaction:
        users.remove(transaction, "anna", ROOT)
    for work in (
        lambda t: users.begin(t, user, "token", "s", "signed-in", HOUR, ""),
        lambda t: users.get(t, "anna"),
        lambda t: users.set_role(t, "anna", "operator", ROOT),
        lambda t: users.remove(t, "anna", ROOT),
    ):
        with pytest.raises(UnknownUser, match="there is no user 'anna'"), store.write() as transaction:
            work(transaction)


# ------------------------------------------------------------------------------------------------- an OpenID provider's


def provided(store: Store, name: str, subject: str, role: str | None = "annotator") -> UserRecord:
    with store.write() as transaction:
        return users.provided(transaction, name, subject, role, ROOT)  # type: ignore[arg-type]


def test_a_providers_user_stays_the_same_under_another_name(store: Store) -> None:
    first = provided(store, "carla", "https://sso 1")
    later = provided(store, "carla-married", "https://sso 1", "reviewer")
    assert (later.id, later.name, later.role) == (first.id, "carla", "reviewer")


def test_a_provider_cannot_take_anothers_name(store: Store) -> None:
    add(store)
    provided(store, "carla", "https://sso 1")
    for name in ("Anna", "carla"):
        with pytest.raises(StoreError, match="another user's"):
            provided(store, name, "https://sso 2")


def test_a_user_added_without_a_password_is_the_providers(store: Store) -> None:
    user = add(store, "carla", None)
    assert provided(store, "Carla", "https://sso 1", None).role == "annotator"
    with store.read() as transaction:
        assert users.get(transaction, "carla").id == user.id
    with pytest.raises(StoreError, match="nobody has said"):
        provided(store, "dora", "https://sso 2", None)
    with pytest.raises(StoreError, match="is changed there"), store.write() as transaction:
        users.set_password(transaction, "carla", "x", ROOT)


def test_a_role_of_the_provider_ends_with_it_and_an_operators_does_not(store: Store) -> None:
    provided(store, "carla", "https://sso 1")
    with pytest.raises(StoreError, match="does not say any more what 'carla' may do"):
        provided(store, "carla", "https://sso 1", None)
    with store.write() as transaction:
        users.set_role(transaction, "carla", "reviewer", ROOT)
    assert provided(store, "carla", "https://sso 1", None).role == "reviewer"
    assert provided(store, "carla", "https://sso 1", "annotator").role == "annotator"


# --------------------------------------------------------------------------------------------------------- the command


def run(*arguments: object, password: str = "") -> tuple[int, str]:
    done = CliRunner().invoke(app, ["users", *map(str, arguments)], input=password)
    return done.exit_code, str(done.exception) if done.exception is not None and done.exit_code else done.output


def test_the_first_user_is_an_operator_and_later_ones_annotate(tmp_path: Path) -> None:
    pytest.importorskip("argon2", reason="argon2-cffi is not installed (the extra 'server')")
    assert run("add", tmp_path, "anna", password="correct horse battery\n") == (
        0, f"{tmp_path}: anna may sign in as operator\n"
    )  # fmt: skip
    assert run("add", tmp_path, "bert", "--elsewhere")[1].endswith("bert may sign in as annotator\n")
    assert run("role", tmp_path, "bert", "reviewer") == (0, f"{tmp_path}: bert is reviewer\n")
    listed = json.loads(run("list", tmp_path, "--json")[1])["users"]
    assert [(u["name"], u["role"], u["signs in by"], u["open"]) for u in listed] == [
        ("anna", "operator", "password", 0), ("bert", "reviewer", "elsewhere", 0)
    ]  # fmt: skip
    with Store.open(tmp_path).read() as transaction:
        found = users.find(transaction, "anna")
    assert found is not None
    assert str(found[1]).startswith("$argon2id$")
    assert run("password", tmp_path, "anna", password="another good password\n")[0] == 0
    assert run("sign-out", tmp_path, "anna")[0] == 0
    assert run("remove", tmp_path, "bert")[0] == 0
    listed = json.loads(run("history", tmp_path, "--json")[1])["events"]
    assert [(e["user"], e["what"], e["detail"]) for e in listed] == [
        ("anna", "added", "role operator"), ("bert", "added", "role annotator"),
        ("bert", "role set", "before annotator, role reviewer"), ("anna", "password set", ""), ("bert", "removed", ""),
    ]  # fmt: skip
    assert "there is no user 'bert'" in run("remove", tmp_path, "bert")[1]


@pytest.mark.parametrize(
    ("password", "why"),
    [("", "12 to 200 characters"), ("short\n", "this one has 5"), ("a" * 201 + "\n", "this one has 201"),
     ("aaaaaaaaaaaaab\n", "easily guessed"), ("Anna-The-First\n", "easily guessed")],
)  # fmt: skip
def test_a_weak_password_is_refused(tmp_path: Path, password: str, why: str) -> None:
    pytest.importorskip("argon2", reason="argon2-cffi is not installed (the extra 'server')")
    code, message = run("add", tmp_path, "anna-the-first", password=password)
    assert code == 1
    assert why in message
    assert json.loads(run("list", tmp_path, "--json")[1])["users"] == []


def test_an_archive_holds_no_users(store: Store, tmp_path: Path) -> None:
    begin(store, add(store), "s1")
    rows = export_archive(store, tmp_path / "archive")
    assert not {"user_account", "sign_in"} & rows.keys()
    assert not [p for p in (tmp_path / "archive").rglob("*") if p.is_file() and b"a hash" in p.read_bytes()]
