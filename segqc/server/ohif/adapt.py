"""What is changed of OHIF's own files: nothing is asked of other hosts, and they work below ``/ohif``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from segqc.server.ohif.files import Edit

_OUTSIDE_LINK: Final = re.compile(r"""<link\b[^>]*\bhref=["']?(?:https?:)?//[^>]*>""")
_OUTSIDE_IMPORT: Final = re.compile(r"""@import\s+(?:url\()?["']?(?:https?:)?//[^;]*;""")
_ROOT_IN_PAGE: Final = re.compile(r"""((?:\b(?:href|src|content)|PUBLIC_URL)\s*=\s*")/(?!/|ohif/)""")
_ROOT_IN_STYLE: Final = re.compile(r"url\(/(?!/|ohif/)")
_ROOT_IN_SCRIPT: Final = '__webpack_require__.p = "/"'


def inside_page(text: str) -> str:
    """A page without links to other hosts: OHIF's has fonts there.

    >>> inside_page('<link href="https://fonts.example/inter"><link href="/ohif/app.css">')
    '<link href="/ohif/app.css">'
    """
    return _OUTSIDE_LINK.sub("", text)


def inside_style(text: str) -> str:
    """A style sheet without imports from other hosts.

    >>> inside_style("@import url(https://fonts.example/inter);body{margin:0}")
    'body{margin:0}'
    """
    return _OUTSIDE_IMPORT.sub("", text)


def below_in_page(text: str) -> str:
    """A page that was made for the root of a host, below ``/ohif``.

    >>> below_in_page('<script>window.PUBLIC_URL="/"</script><script src="/app.js"></script>')
    '<script>window.PUBLIC_URL="/ohif/"</script><script src="/ohif/app.js"></script>'
    """
    return _ROOT_IN_PAGE.sub(r"\1/ohif/", inside_page(text))


def below_in_style(text: str) -> str:
    """A style sheet that was made for the root of a host, below ``/ohif``.

    >>> below_in_style("src:url(/inter.woff2)")
    'src:url(/ohif/inter.woff2)'
    """
    return _ROOT_IN_STYLE.sub("url(/ohif/", inside_style(text))


def below_in_script(text: str) -> str:
    """A script that was made for the root of a host, below ``/ohif``: where it finds its other parts."""
    return text.replace(_ROOT_IN_SCRIPT, '__webpack_require__.p = "/ohif/"')


INSIDE: Final[Mapping[str, Edit]] = {".html": inside_page, ".css": inside_style}
"""By the ends of names: for an OHIF that was made for ``/ohif``."""
BELOW: Final[Mapping[str, Edit]] = {
    ".html": below_in_page,
    ".css": below_in_style,
    ".js": below_in_script,
    ".json": lambda text: text.replace('"/assets/', '"/ohif/assets/'),
}
"""By the ends of names: for an OHIF that was made for the root of a host."""
