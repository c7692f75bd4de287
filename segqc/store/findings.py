"""Files of the folder that were not taken in, each with a sentence that says why; gone when they pass, or are gone."""

from __future__ import annotations

import functools
import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import delete, select

from segqc.store.database import Transaction
from segqc.store.records import FindingKind, FindingRecord
from segqc.store.schema import FindingRow
from segqc.text import nfc
from segqc.volumes import VolumeError

logger = logging.getLogger(__name__)

_IN_ONE_QUERY = 500


@dataclass(frozen=True, slots=True)
class Finding:
    """Why a file is not taken in.

    Attributes:
        file: its path relative to the folder.
        kind: what it would be.
        sentence: what is wrong with it, and what to do.
        signature: of the file that was looked at.
        scan: the name of the scan that a label would be of, in any Unicode form.
    """

    file: str
    kind: FindingKind
    sentence: str
    signature: str
    scan: str | None = None


def sentence_about(path: Path, file: str, error: Exception) -> str:
    """What is wrong with a file, by the name that the user knows."""
    if isinstance(error, MemoryError):
        return f"{file}: needs more memory to be read than there is; make it smaller"
    if isinstance(error, OSError):
        return f"{file}: cannot be read ({error.strerror or error})"
    if not isinstance(error, VolumeError):
        logger.error("%s", file, exc_info=error)
        return f"{file}: cannot be read ({type(error).__name__}: {error})"
    messages = str(error).replace(str(path), file)
    return messages if file in messages else f"{file}: {messages}"


def listing(transaction: Transaction) -> list[FindingRecord]:
    """All files that were not taken in, in the order of their names."""
    rows = transaction.scalars(select(FindingRow).order_by(FindingRow.file))
    return [FindingRecord(file=row.file, kind=row.kind, sentence=row.sentence, found_at=row.found_at) for row in rows]


def noted(transaction: Transaction, checks: str) -> dict[str, Finding]:
    """All that was found, by file; what was found by other checks than the present ones is left out."""
    rows = transaction.scalars(select(FindingRow).where(FindingRow.checks == checks))
    return {row.file: Finding(row.file, row.kind, row.sentence, row.signature, row.scan) for row in rows}


def is_still(noted: Mapping[str, Finding], file: str, signature: str) -> bool:
    """Whether the file is the one that was found to be unusable."""
    return signature != "" and file in noted and noted[file].signature == signature


def files(transaction: Transaction) -> set[str]:
    """All files that something was found of, by whatever checks."""
    return set(transaction.scalars(select(FindingRow.file)))


def record(transaction: Transaction, found: Iterable[Finding], checks: str) -> None:
    """Note why files are not taken in, in place of what was noted of them before."""
    for finding in found:
        before = transaction.get(FindingRow, finding.file)
        if before is not None and (before.checks, before.sentence) == (checks, finding.sentence):
            before.signature = finding.signature  # a file just written had none yet
            continue
        transaction.merge(
            FindingRow(
                file=finding.file,
                kind=finding.kind,
                scan=nfc(finding.scan) if finding.scan is not None else None,
                sentence=finding.sentence,
                signature=finding.signature,
                checks=checks,
                found_at=transaction.now,
            )
        )
        tell(finding.sentence)


@functools.lru_cache(maxsize=10_000)  # a server looks every few seconds
def tell(sentence: str) -> None:
    """Log a finding, once in a process."""
    logger.warning("not accepted: %s", sentence)


def clear(transaction: Transaction, files: Collection[str]) -> None:
    """Forget what was found of files: they passed, or are gone."""
    wanted = sorted(files)
    for start in range(0, len(wanted), _IN_ONE_QUERY):
        transaction.execute(delete(FindingRow).where(FindingRow.file.in_(wanted[start : start + _IN_ONE_QUERY])))


def clear_labels_of(transaction: Transaction, scans: Collection[str]) -> None:
    """Forget what was found of scans' labels, as the scans are others now: they will be looked at again."""
    wanted = sorted(map(nfc, scans))
    for start in range(0, len(wanted), _IN_ONE_QUERY):
        part = wanted[start : start + _IN_ONE_QUERY]
        transaction.execute(delete(FindingRow).where(FindingRow.scan.in_(part)))
