"""What a client searches for: the query parameters of QIDO-RS (DICOM PS3.18, 8.3.4)."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeAlias

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.multival import MultiValue

from segqc.errors import SegqcError
from segqc.server.dicomweb.series import Attributes
from segqc.server.errors import RequestError

logger = logging.getLogger(__name__)

Found: TypeAlias = tuple[Attributes, Callable[[], Attributes]]
"""What is known of a thing without reading its file, and what tells all that is known."""

_NUMBER: Final = re.compile(r"[0-9A-Fa-f]{8}")
_COUNT: Final = re.compile(r"[0-9]{1,9}")
_WILDCARD_VRS: Final = frozenset({"AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT"})
_MEDIA: Final = frozenset({"accept", "charset"})  # no part of the search: see `media`


@dataclass(frozen=True, slots=True)
class Query:
    """A search.

    Attributes:
        wanted: keywords, and the values or patterns that they must match.
        include: keywords of what is told beside the usual.
        include_all: whether all that is known is told.
        limit: the most results; None for all.
        offset: how many of the first ones are left out.
        fuzzy: whether names that sound alike were asked for, which is not done here.
    """

    wanted: tuple[tuple[str, str], ...] = ()
    include: frozenset[str] = frozenset()
    include_all: bool = False
    limit: int | None = None
    offset: int = 0
    fuzzy: bool = False

    @classmethod
    def parse(cls, parameters: Iterable[tuple[str, str]]) -> Query:
        """Read the parameters of an address.

        Raises:
            RequestError: 400 that names the parameter that cannot be used.
        """
        wanted: list[tuple[str, str]] = []
        include: set[str] = set()
        counts: dict[str, int] = {}
        fuzzy = False
        for name, value in parameters:
            if name in ("limit", "offset"):
                if not _COUNT.fullmatch(value):
                    raise RequestError(400, f"{name} is a whole number from 0 on, not {value[:80]!r}.")
                counts[name] = int(value)
            elif name == "fuzzymatching":
                if value.lower() not in ("true", "false"):
                    raise RequestError(400, f"fuzzymatching is true or false, not {value[:80]!r}.")
                fuzzy = value.lower() == "true"
            elif name == "includefield":
                include |= {field if field == "all" else keyword_of(field) for field in value.split(",") if field}
            elif name not in _MEDIA:
                wanted.append((keyword_of(name), value))
        return cls(
            tuple(wanted), frozenset(include), "all" in include, counts.get("limit"), counts.get("offset", 0), fuzzy
        )

    def select(self, things: Iterable[Found]) -> Iterator[Attributes]:
        """All that is known of each thing that is found. No files are read of those before and after the page."""
        stop = None if self.limit is None else self.offset + self.limit
        for describe in islice(self._matching(things), self.offset, stop):
            if (found := _described(describe)) is not None:
                yield found

    def _matching(self, things: Iterable[Found]) -> Iterator[Callable[[], Attributes]]:
        for known, describe in things:
            later = [(keyword, value) for keyword, value in self.wanted if keyword not in known]
            if not all(_matches(keyword, known[keyword], v) for keyword, v in self.wanted if keyword in known):
                continue
            if later:
                found = _described(describe)
                if found is None or not all(_matches(keyword, found.get(keyword), v) for keyword, v in later):
                    continue
            yield describe

    def pick(self, attributes: Attributes, usual: Collection[str]) -> Attributes:
        """What is told of a thing: the usual, and what was asked for as far as it is known."""
        if self.include_all:
            return attributes
        return {keyword: v for keyword, v in attributes.items() if keyword in usual or keyword in self.include}


def _described(describe: Callable[[], Attributes]) -> Attributes | None:
    """What is known of a thing; None where its file is gone meanwhile, as the next look at the folder will find."""
    try:
        return describe()
    except SegqcError as error:
        logger.warning("left out of a search: %s", error)
        return None


def keyword_of(name: str) -> str:
    """The keyword of an attribute that is named by keyword or number; for one inside of sequences, the name itself.

    Raises:
        RequestError: 400 if DICOM knows none of this name.
    """
    return ".".join(_one_keyword(part, name) for part in name.split("."))


def _one_keyword(part: str, name: str) -> str:
    if _NUMBER.fullmatch(part):
        return keyword_for_tag(int(part, 16)) or part.upper()
    if tag_for_keyword(part) is None:
        raise RequestError(400, f"{name[:80]!r} is neither a DICOM keyword nor a number of eight hexadecimal digits.")
    return part


def _matches(keyword: str, value: Any, wanted: str) -> bool:
    """Whether a value is what is wanted (DICOM PS3.4, C.2.2.2); a value that is not known matches no wish."""
    if wanted in ("", "*"):
        return True
    tag = tag_for_keyword(keyword)
    vr = dictionary_VR(tag) if tag is not None else "UN"
    options = re.split(r"[,\\]", wanted) if vr == "UI" else [wanted]
    values = value if isinstance(value, list | MultiValue) else [] if value is None else [value]
    return any(_is_like(str(v), option.strip(), vr) for v in values for option in options)


def _is_like(value: str, wanted: str, vr: str) -> bool:
    if vr == "PN":
        value, wanted = value.lower(), wanted.lower()
    if vr in _WILDCARD_VRS:
        return fnmatch.fnmatchcase(value, wanted.replace("[", "[[]"))  # brackets stand for themselves in DICOM
    return value == wanted
