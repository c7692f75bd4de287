"""What browsers get of OHIF: its files and ours, and how a newer one is installed."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

pytest.importorskip("monailabel", reason="MONAI Label is not installed (the extra 'server')")

from fastapi.testclient import TestClient
from filelock import FileLock

from segqc.server import app as server_app
from segqc.server.monailabel.stock import STATIC
from segqc.server.ohif import install, viewer
from segqc.server.ohif.adapt import BELOW, INSIDE
from segqc.server.ohif.files import Asset, assets
from segqc.server.ohif.install import InstallError, install_viewer
from segqc.server.ohif.viewer import bundled_viewer, find_viewer
from tests.server_kit import CONFIG, make_dataset, serving

SCRIPT = next(path.name for path in (STATIC / "ohif").glob("app.bundle.*.js"))
ELSEWHERE = "https://ohif.example.org"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    config = f'{CONFIG}\n[server]\nallowed_origins = ["{ELSEWHERE}"]\n'
    folder = make_dataset(tmp_path_factory.mktemp("ohif") / "studies", scans=1, finals=0, config=config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_app, "find_viewer", bundled_viewer)
        with serving(folder) as made:
            made.base_url = "http://127.0.0.1"  # type: ignore[assignment]
            yield made


# --------------------------------------------------------------------------------------------------------------- routes


@pytest.mark.parametrize(
    ("name", "media_type", "kept"),
    [
        ("", "text/html; charset=utf-8", False),
        ("index.html", "text/html; charset=utf-8", False),
        ("app-config.js", "text/javascript; charset=utf-8", False),
        ("extension/index.js", "text/javascript; charset=utf-8", False),
        ("app.bundle.css", "text/css; charset=utf-8", False),
        (SCRIPT, "text/javascript; charset=utf-8", True),
        ("031089e563a18ada8441.wasm", "application/wasm", True),
        ("manifest.json", "application/json", False),
        ("ohif-logo.svg", "image/svg+xml", False),
        ("assets/favicon-16x16.png", "image/png", False),
    ],
)
def test_files_have_their_types_and_are_kept_where_their_names_change_with_them(
    client: TestClient, name: str, media_type: str, kept: bool
) -> None:
    answer = client.get(f"/ohif/{name}")
    assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
    assert ("immutable" in answer.headers["cache-control"]) == kept
    assert ("no-cache" in answer.headers["cache-control"]) != kept
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = client.get(f"/ohif/{name}", headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = client.head(f"/ohif/{name}")
    assert head.status_code == 200 and head.headers["etag"] == answer.headers["etag"]


def test_files_are_the_packages_own_compressed_for_those_who_take_it(client: TestClient) -> None:
    content = (STATIC / "ohif" / SCRIPT).read_bytes()
    plain = client.get(f"/ohif/{SCRIPT}", headers={"accept-encoding": "identity"})
    assert plain.content == content and "content-encoding" not in plain.headers
    packed = client.get(f"/ohif/{SCRIPT}", headers={"accept-encoding": "gzip"})
    assert packed.content == content and packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < len(content) / 4
    picture = client.get("/ohif/assets/favicon-16x16.png", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in picture.headers


@pytest.mark.parametrize("path", ["/ohif", "/ohif/", "/ohif/segqc?StudyInstanceUIDs=2.25.1", "/ohif/segqc/dicomweb",
                                  "/ohif/viewer", "//ohif//segqc"])  # fmt: skip
def test_ohifs_own_addresses_get_its_page(client: TestClient, path: str) -> None:
    answer = client.get(f"http://127.0.0.1{path}")
    assert answer.status_code == 200
    assert f'src="/ohif/{SCRIPT}"' in answer.text


@pytest.mark.parametrize(
    "path",
    ["nothing.js", "assets/nothing.png", "extension/nothing.js", "../serve.py", "%2e%2e/%2e%2e/__init__.py",
     "..%2f..%2f__init__.py", "extension/..%2ffiles.py", "extension/%2e%2e/routes.py", "%2fetc%2fpasswd.txt"],
)  # fmt: skip
def test_what_is_no_file_of_the_viewer_is_not_there(client: TestClient, path: str) -> None:
    answer = client.get(f"/ohif/{path}")
    assert answer.status_code == 404
    assert list(answer.json()) == ["detail"]


def test_nothing_in_its_page_and_styles_names_another_host(client: TestClient) -> None:
    page = client.get("/ohif/").text
    assert not re.search(r"""(href|src)=["']?(https?:)?//""", page)
    assert "@import url(http" in (STATIC / "ohif" / "app.bundle.css").read_text()
    styles = client.get("/ohif/app.bundle.css").text
    assert not re.search(r"(@import|url\()\s*(url\()?[\"']?(https?:)?//", styles)
    assert len(styles) > 200_000


def test_its_page_may_load_from_this_server_only(client: TestClient) -> None:
    answer = client.get("/ohif/")
    rules = dict(rule.strip().split(" ", 1) for rule in answer.headers["content-security-policy"].split(";"))
    assert rules["default-src"] == "'self'" and rules["object-src"] == "'none'"
    assert "'unsafe-inline'" not in rules["script-src"] and "'unsafe-eval'" not in rules["script-src"]
    for script in re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in rules["script-src"]
    assert not any("http" in sources or "*" in sources for sources in rules.values())


def test_without_any_ohif_its_address_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_app, "find_viewer", lambda: None)
    with serving(make_dataset(tmp_path / "studies", scans=1, finals=0)) as without:
        answer = without.get("/ohif/", headers={"host": "127.0.0.1"})
    assert answer.status_code == 404
    assert "carries no OHIF" in answer.json()["detail"]


# -------------------------------------------------------------------------------------------------------- other origins


def test_pages_of_a_named_origin_read_answers_and_refusals(client: TestClient) -> None:
    for path, status in (("/ohif/extension/index.js", 200), ("/dicomweb/studies", 200), ("/dicomweb/studies/1.2", 404)):
        answer = client.get(path, headers={"origin": ELSEWHERE})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == ELSEWHERE
        assert answer.headers["access-control-allow-credentials"] == "true"
    refused = client.get("/info/", headers={"origin": ELSEWHERE, "host": "evil.example"})
    assert refused.status_code == 421
    asked = {"origin": ELSEWHERE, "access-control-request-method": "POST",
             "access-control-request-headers": "content-type"}  # fmt: skip
    preflight = client.options("/segqc/leases", headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == ELSEWHERE


@pytest.mark.parametrize("origin", ["https://evil.example", "http://ohif.example.org", f"{ELSEWHERE}:8443", "null"])
def test_pages_of_other_origins_get_nothing(client: TestClient, origin: str) -> None:
    answer = client.get("/ohif/extension/index.js", headers={"origin": origin})
    assert answer.status_code == 403
    assert "server.allowed_origins" in answer.json()["detail"]
    asked = {"origin": origin, "access-control-request-method": "POST"}
    preflight = client.options("/segqc/leases", headers=asked)
    assert preflight.status_code >= 400
    assert all("access-control-allow-origin" not in refused.headers for refused in (answer, preflight))


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_file_that_changes_is_sent_as_it_is_now(tmp_path: Path) -> None:
    path = tmp_path / "index.js"
    path.write_text("old")
    asset = assets(tmp_path)["index.js"]
    tag = asset.tag
    assert gzip.decompress(asset.packed() or b"") == b"old"
    path.write_text("newer")
    assert asset.tag != tag
    assert asset.content() == gzip.decompress(asset.packed() or b"") == b"newer"


def test_a_file_that_lies_there_compressed_is_sent_as_it_lies_there_or_unpacked(tmp_path: Path) -> None:
    (tmp_path / "index.js.gz").write_bytes(gzip.compress(b"content"))
    asset = assets(tmp_path)["index.js"]
    assert asset.content() == b"content"
    assert asset.packed() == (tmp_path / "index.js.gz").read_bytes()
    assert asset.media_type == "text/javascript"


@pytest.mark.parametrize(
    ("name", "hashed"),
    [("app.bundle.0f6159c501addfe9.js", True), ("5130ccb17e3f3f5b.wasm", True), ("031089e563a18ada8441.wasm", True),
     ("app.bundle.css", False), ("1602.css", False), ("extension/index.js", False), ("deadbeef.js", False)],
)  # fmt: skip
def test_hashed_names_are_known(name: str, hashed: bool) -> None:
    assert Asset(name, Path(name)).is_hashed == hashed


# -------------------------------------------------------------------------------------------------------------- install

PACKAGE = {
    "package/LICENSE": b"The MIT License",
    "package/package.json": b"{}",
    "package/dist/index.html": b'<script>window.PUBLIC_URL="/"</script><link href="/app.bundle.css" rel="stylesheet">',
    "package/dist/app.bundle.0123456789abcdef.js": b'__webpack_require__.p = "/";',
    "package/dist/app.bundle.css": b"@font-face{src:url(/0123456789abcdef.woff2)}",
    "package/dist/0123456789abcdef.woff2": b"font",
    "package/dist/manifest.json": b'{"src": "/assets/a.png"}',
    "package/dist/app-config.js": b"window.config = {}",
    "package/dist/app.bundle.0123456789abcdef.js.map": b"{}",
    "package/dist/ort/ort.wasm": b"model",
    "package/dist/../../escaped.js": b"escaped",
}


def archive(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as made:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that an npm of the test's own delivers."""
    delivered = tmp_path / "delivered.tgz"
    delivered.write_bytes(archive(PACKAGE))
    digest = base64.b64encode(hashlib.sha512(delivered.read_bytes()).digest()).decode()
    monkeypatch.setattr(install, "_SHA512", digest)
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$1 $2" = "pack @ohif/app@{install.VERSION}" ] && cp {delivered} "$4/app.tgz"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return delivered


def test_what_npm_delivers_is_installed_below_our_address_without_what_is_not_used(npm: Path, tmp_path: Path) -> None:
    folder = install_viewer(tmp_path / "share" / "ohif")
    found = {name: asset.content() for name, asset in assets(folder).items()}
    assert set(found) == {"LICENSE", "index.html", "app.bundle.0123456789abcdef.js", "app.bundle.css", "manifest.json",
                          "0123456789abcdef.woff2"}  # fmt: skip
    assert b'PUBLIC_URL="/ohif/"' in found["index.html"] and b'href="/ohif/app.bundle.css"' in found["index.html"]
    assert found["app.bundle.0123456789abcdef.js"] == b'__webpack_require__.p = "/ohif/";'
    assert b"url(/ohif/0123456789abcdef.woff2)" in found["app.bundle.css"]
    assert found["manifest.json"] == b'{"src": "/ohif/assets/a.png"}'
    assert not list(tmp_path.rglob("escaped.js*"))
    assert [path.name for path in folder.parent.iterdir() if path != folder] == [".ohif.lock"]
    npm.unlink()
    assert install_viewer(folder) == folder  # it is there: nothing is asked for


def test_another_content_than_the_published_one_is_refused(npm: Path, tmp_path: Path) -> None:
    npm.write_bytes(archive({**PACKAGE, "package/dist/app.bundle.css": b"other"}))
    with pytest.raises(InstallError, match="got something else than what was published; nothing was installed"):
        install_viewer(tmp_path / "share" / "ohif")
    assert [path.name for path in (tmp_path / "share").iterdir()] == [".ohif.lock"]


def test_what_one_that_was_killed_left_is_not_used_and_goes(
    npm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "share" / "ohif"
    half = target.parent / ".ohif-left" / "new"
    half.mkdir(parents=True)
    (half / "index.html.gz").write_bytes(gzip.compress(b"half"))
    monkeypatch.setattr(viewer, "viewer_folder", lambda: target)
    assert viewer.installed_viewer() is None
    found = find_viewer()
    assert found is not None and found.files["index.html"].path.parent == STATIC / "ohif"
    install_viewer(target)
    assert not half.exists()
    newer = find_viewer()
    assert newer is not None and newer.files["index.html"].path.parent == target


def test_an_npm_that_fails_says_why(npm: Path, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "npm"
    program.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\nexit 1\n")
    with pytest.raises(InstallError, match=r"npm could not get @ohif/app@.*: npm error code ENOTFOUND"):
        install_viewer(tmp_path / "share" / "ohif")


def test_without_npm_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.shutil, "which", lambda *_, **__: None)
    with pytest.raises(InstallError, match=r"npm is not installed.*segqc\[ohif\]"):
        install_viewer(tmp_path / "share" / "ohif")


def test_two_do_not_install_at_once(npm: Path, tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    with FileLock(tmp_path / "share" / ".ohif.lock"), pytest.raises(InstallError, match="is being installed already"):
        install_viewer(tmp_path / "share" / "ohif")


def test_texts_are_changed_by_the_ends_of_their_names() -> None:
    assert INSIDE.keys() <= BELOW.keys()
    page = '<link rel="preconnect" href="https://fonts.example" crossorigin/><link href="/ohif/app.css">'
    assert INSIDE[".html"](page) == '<link href="/ohif/app.css">'
    assert BELOW[".html"](page) == '<link href="/ohif/app.css">'
