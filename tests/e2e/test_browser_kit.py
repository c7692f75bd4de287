"""The browser of the tests notices what it is there for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from tests.browser_kit import watched

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.server

PAGES = {
    "/good": "<p>nothing wrong</p><img src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>",
    "/outside": "<img src='http://fonts.example/picture.png'>",
    "/policy": "<script>document.title = 'refused'</script>",
    "/error": "<script src='/throws.js'></script>",
    "/rejection": "<script src='/rejects.js'></script>",
    "/failure": "<img src='/broken'>",
    "/throws.js": "throw new Error('uncaught')",
    "/rejects.js": "Promise.reject(new Error('uncaught'))",
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        content = PAGES.get(self.path, "").encode()
        self.send_response(500 if self.path == "/broken" else 200)
        self.send_header("Content-Type", "text/javascript" if self.path.endswith(".js") else "text/html")
        self.send_header("Content-Length", str(len(content)))
        if self.path == "/policy":
            self.send_header("Content-Security-Policy", "default-src 'self'")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def visit(browser: Browser, address: str) -> None:
    with watched(browser) as (context, _):
        page = context.new_page()
        page.goto(address)
        page.wait_for_load_state("networkidle")


def test_a_page_without_fault_passes(browser: Browser, site: str) -> None:
    visit(browser, f"{site}/good")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("outside", "asked of other hosts.*fonts.example"),
        ("policy", "Content Security Policy"),
        ("error", "uncaught"),
        ("rejection", "uncaught"),
        ("failure", "500 for GET"),
    ],
)
def test_a_faulty_page_fails_the_test(browser: Browser, site: str, path: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        visit(browser, f"{site}/{path}")


def test_hosts_that_may_be_asked_are_cut_off(browser: Browser, site: str) -> None:
    with watched(browser, cut_off=["fonts.example"]) as (context, log):
        context.new_page().goto(f"{site}/outside")
        assert log.outside == ["http://fonts.example/picture.png"]
