"""What a user should know of scans that were taken in: headers that contradict themselves, and copies of one image."""

from __future__ import annotations

import itertools

from sqlalchemy import func, select

from segqc.store.database import Transaction
from segqc.store.schema import Patient, Scan


def listing(transaction: Transaction) -> list[str]:
    """A sentence for each remark on scans whose files are there, each with the files' names."""
    there = Scan.missing_since.is_(None)
    noted = select(Scan.file, Scan.remarks).where(there, Scan.remarks.is_not(None)).order_by(Scan.sort_key)
    message = [f"{file}: {remark}" for file, remarks in transaction.execute(noted) for remark in remarks or ()]
    copied = select(Scan.sha256).where(there).group_by(Scan.sha256).having(func.count() > 1)
    copies = (
        select(Scan.sha256, Scan.file, Patient.name)
        .join(Patient, Scan.patient_id == Patient.id)
        .where(there, Scan.sha256.in_(copied))
        .order_by(Scan.sha256, Scan.sort_key)
    )
    for _, group in itertools.groupby(transaction.execute(copies), key=lambda row: row[0]):
        rows = list(group)
        message.append(_of_copies([row[1] for row in rows], sorted({row[2] for row in rows})))
    return message


def _of_copies(files: list[str], patients: list[str]) -> str:
    message = f"{', '.join(files)}: hold the same image; "
    if len(patients) == 1:
        return f"{message}remove all but one"
    named = ", ".join(map(repr, patients))
    return (
        f"{message}as they count as different patients ({named}), networks may be validated on what they were trained "
        "on: remove all but one, or name their patient under [patients] in segqc.toml"
    )
