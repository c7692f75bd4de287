"""Labels of people beside those that count, which the network that judges people's masks learns from."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from segqc.loop.agreement import find_labels
from segqc.loop.dataset import Dataset, DatasetError
from segqc.loop.readers import whole_readings
from segqc.store import labels
from segqc.store.labels import FINAL
from segqc.training.cases import Case, CaseError, EarlierLabel, label_values, read_case
from segqc.volumes import read_labels


def with_other_labels(dataset: Dataset, cases: Sequence[Case]) -> list[Case]:
    """Cases of a folder with the readings of their scans, and with those people's labels that were final before.

    What was checked in part only is none of these, nor is a consensus, which nobody has drawn.
    """
    readings, earlier = whole_readings(dataset), dict[str, dict[Path, EarlierLabel]]()
    wanted = {case.id for case in cases}
    with dataset.store.read() as transaction:
        found = labels.earlier_of_all(transaction, FINAL)
        drawn = [
            record
            for scan, records in found.items()
            for record in records
            if scan in wanted and record.source in ("annotator", "import") and record.checked_slices is None
        ]
        networks = labels.made_of_networks(transaction, drawn)
    for record in drawn:
        file, network = dataset.store.label_file(record), networks.get(record.id)
        made_of = None if network is None else dataset.store.label_file(network)
        earlier.setdefault(record.scan, {})[file] = EarlierLabel(file, made_of)
    return [
        replace(
            case,
            observers=readings.get(case.id, ()),
            earlier=tuple(e for file, e in earlier.get(case.id, {}).items() if file != case.labels),
        )
        for case in cases
    ]


def with_observers(dataset: Dataset, cases: Sequence[Case], observers: Path) -> list[Case]:
    """Cases with another observer's label files, too.

    Args:
        dataset: the folder that they are of.
        cases: the cases.
        observers: the folder of these files, named as the scans.

    Raises:
        DatasetError: if there is none of these scans.
        VolumeError: if one is no label map on its scan's grid with the structures' values.
    """
    values, found = label_values(dataset.structures), []
    for case in cases:
        if (path := find_labels(observers, case.id)) is None:
            found.append(case)
            continue
        with contextlib.suppress(CaseError):  # the training names what is wrong with the case itself
            scan, _ = read_case(case, values)
            read_labels(path, scan=scan, values=values, limits=case.limits)  # now, and not after hours of training
        found.append(replace(case, observers=(*case.observers, path)))
    if all(case.observers == before.observers for case, before in zip(found, cases, strict=True)):
        raise DatasetError(f"{observers}: no label file is named as a labelled scan")
    return found
