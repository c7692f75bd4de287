"""Label versions: append-only, and MONAI Label's tags as views on them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import (
    ColumnElement,
    Row,
    ScalarSelect,
    Select,
    String,
    and_,
    bindparam,
    case,
    cast,
    delete,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.orm import aliased

from segqc.store import events, scans
from segqc.store.database import StoreError, Transaction, json_array
from segqc.store.records import (
    Actor,
    BundleRecord,
    JsonObject,
    LabelRecord,
    LabelSource,
    ScanRecord,
    TakenProposal,
)
from segqc.store.schema import (
    ActorRow,
    AttentionCheckRow,
    Bundle,
    LabelInfo,
    LabelVersion,
    LabelView,
    ProposalUse,
    PseudoLabelRow,
    Scan,
    Score,
    UtcDateTime,
)
from segqc.types import MaskSource

FINAL: Final = "final"
ORIGINAL: Final = "original"
RETURNED: Final = "returned"
READER: Final = "reader-"
PROPOSAL: Final = "proposal"
"""What SegQC-Net would change of the label that annotators go on from; it goes when that label does."""
LIKELY_ERRORS_TAG: Final = "likely-errors"
"""Of label maps of likely errors, which are no masks."""
PSEUDO: Final = "pseudo-label"
IGNORED: Final = "pseudo-label-ignored"
"""The voxels of a pseudo-label that are left out of the loss: 1, whatever the structures' values are."""
PSEUDO_TAGS: Final = (PSEUDO, IGNORED)
"""The tags of what rounds accept: nothing else is kept there for a network."""
ATTENTION_CHECK: Final = "attention-check"
"""Of masks with a planted error: the current label of no tag, and no file below ``labels/`` shows them."""
_SERVERS_TAGS: Final = (ORIGINAL, RETURNED, PROPOSAL, LIKELY_ERRORS_TAG, *PSEUDO_TAGS, ATTENTION_CHECK)
_IN_ONE_QUERY: Final = 500
NOT_BY_PEOPLE: Final[tuple[LabelSource, ...]] = ("network", "pseudo-label", "attention check")

IS_LABEL: Final[ColumnElement[bool]] = LabelVersion.source != "attention check"
"""In a query of versions: those that may be the current one of their tag."""


@dataclass(frozen=True, slots=True)
class NewLabel:
    """What is known of a label version before it is one.

    ``sha256`` and ``suffix`` are None for a removal. ``bundle`` is the number of the bundle whose network made it.
    ``submitted_sha256`` and ``submitted_suffix`` are those of the file that the label map was read from, if it is
    another. ``scan_sha256`` is the scan's content that the label map was made for; None where nobody knows.
    ``checked_slices`` are those that a person has looked at, ascending; None for all, and where no person made it.
    """

    scan: str
    tag: str
    source: LabelSource
    actor: Actor
    sha256: str | None = None
    suffix: str | None = None
    parent: int | None = None
    bundle: int | None = None
    info: JsonObject | None = None
    submitted_sha256: str | None = None
    submitted_suffix: str | None = None
    scan_sha256: str | None = None
    checked_slices: tuple[int, ...] | None = None


def add(transaction: Transaction, label: NewLabel) -> tuple[LabelRecord, bool]:
    """Add a version and say whether it is new.

    The same content from the same actor, once more under the same tag and with no more slices checked, is the version
    that is there: a client that missed the answer may send it again. A pseudo-label is a version for each time that a
    mask was accepted, a proposal one for each label that it was made of.

    Raises:
        UnknownScan: if there is no such scan.
        ScanReplaced: if it has another content than the one that the label was made for.
    """
    scan = scans.expect(transaction, label.scan, label.scan_sha256)
    last = current(transaction, label.scan, label.tag)
    is_same = last is not None and _identity(last) == _identity(label)
    if last is not None and is_same and label.source != "pseudo-label":
        return last, False
    number = transaction.insert(
        LabelVersion,
        scan_id=scan.id,
        tag=label.tag,
        source=label.source,
        sha256=label.sha256,
        suffix=label.suffix,
        parent_id=label.parent,
        bundle_id=label.bundle,
        actor_id=events.actor_id(transaction, label.actor),
        made_at=transaction.now,
        submitted_sha256=label.submitted_sha256,
        submitted_suffix=label.submitted_suffix,
        checked_slices=None if label.checked_slices is None else list(label.checked_slices),
    )
    if label.info:
        transaction.insert(LabelInfo, label_version_id=number, info=label.info)
    if label.source != "attention check":  # whoever is to find the error may read the events
        verb = "label removed" if label.source == "removal" else "label saved"
        detail: JsonObject = {"tag": label.tag, "version": number, "source": label.source}
        events.record(transaction, label.actor, verb, "scan", scan.id, detail)
    _tell_scan(transaction, scan, label)
    kept = LabelRecord(
        id=number,
        scan=label.scan,
        tag=label.tag,
        source=label.source,
        sha256=label.sha256,
        suffix=label.suffix,
        parent=label.parent,
        bundle=_bundle(transaction.get_one(Bundle, label.bundle)) if label.bundle is not None else None,
        actor=label.actor,
        made_at=transaction.now,
        submitted_sha256=label.submitted_sha256,
        submitted_suffix=label.submitted_suffix,
        checked_slices=label.checked_slices,
    )
    return kept, True


def _identity(label: NewLabel | LabelRecord) -> tuple[object, ...]:
    bundle = label.bundle.id if isinstance(label.bundle, BundleRecord) else label.bundle
    made_of = (label.parent, bundle) if label.tag == PROPOSAL else None
    return label.sha256, label.actor, label.source, label.checked_slices, made_of


def is_worked_on(tag: str) -> bool:
    """Whether annotators go on from labels under a tag."""
    return tag in (FINAL, ORIGINAL, RETURNED) or tag.startswith(READER)


def is_servers_own(tag: str) -> bool:
    """Whether clients submit nothing under a tag: networks, rounds, reviews or the server's numbering fill it.

    An annotator's reading is numbered when it is submitted as the final label.
    """
    return tag in _SERVERS_TAGS or tag.startswith(READER)


def checked_slices(label: LabelRecord) -> tuple[int, ...] | None:
    """The slices of a label that a person has looked at; None for all, none of a mask that an annotator starts from."""
    if label.tag == ORIGINAL or label.source in NOT_BY_PEOPLE:
        return ()
    return label.checked_slices


def mask_source(transaction: Transaction, label: LabelRecord) -> MaskSource:
    """Who made a label map; of a restored version, who made the one that it holds again.

    What was imported is people's, but for masks that wait to be corrected: those are of other networks.
    """
    while label.source == "restored" and label.parent is not None:
        label = get(transaction, label.parent)
    return "network" if _is_by_network(label) else "person"


def made_of_network(transaction: Transaction, label: LabelRecord) -> LabelRecord | None:
    """The last network's version among those that a label map was made of; None where there is none."""
    return made_of_networks(transaction, [label]).get(label.id)


def made_of_networks(transaction: Transaction, labels: Iterable[LabelRecord]) -> dict[int, LabelRecord]:
    """The last network's version among those that each label map was made of, by its number, where there is one."""
    found: dict[int, LabelRecord] = {}
    parents = {label.id: label.parent for label in labels if label.parent is not None}
    while parents:
        records = get_all(transaction, sorted(set(parents.values())))
        ancestors = {number: records[parent] for number, parent in parents.items()}
        found |= {number: record for number, record in ancestors.items() if _is_by_network(record)}
        parents = {n: r.parent for n, r in ancestors.items() if n not in found and r.parent is not None}
    return found


def _is_by_network(label: LabelRecord) -> bool:
    return label.source in NOT_BY_PEOPLE or (label.source == "import" and label.tag == ORIGINAL)


def _tell_scan(transaction: Transaction, scan: ScanRecord, label: NewLabel) -> None:
    """A final label takes the scan out of the queue, its removal puts it back; another mask is not assessed yet."""
    if label.tag == FINAL and label.sha256 is not None and scan.state != "submitted":
        scans.set_state(transaction, scan, "submitted", label.actor)  # also an approved one: to be reviewed again
    elif label.tag == FINAL and label.sha256 is None and scan.state in ("submitted", "approved"):
        scans.set_state(transaction, scan, "unlabelled", label.actor)
    elif label.tag in (ORIGINAL, RETURNED):
        scans.rank(transaction, scan.id, None, None)
        transaction.execute(_FORGET_SCORES, {"scan": scan.id})
    if label.tag == FINAL and label.sha256 is not None:
        end_pseudo_label(transaction, scan.id, "the scan has a final label")
    elif label.tag.startswith(READER) and label.sha256 is not None:
        end_pseudo_label(transaction, scan.id, "a person has read the scan")
    elif label.tag == PSEUDO:
        end_pseudo_label(transaction, scan.id, "its file was edited or removed")


def end_pseudo_label(transaction: Transaction, scan_id: int, reason: str) -> bool:
    """End the pseudo-label that a scan has, by the scan's number; returns whether it had one."""
    return bool(
        transaction.change(_END_PSEUDO, {"scan": scan_id, "ended_at": transaction.now, "ended_because": reason})
    )


def current(transaction: Transaction, scan: str, tag: str) -> LabelRecord | None:
    """The current label of a scan under a tag; None where there is none or it was removed."""
    row = transaction.rows(_CURRENT, {"scan": scan, "tag": tag}).first()
    return None if row is None or row.sha256 is None else _record(row)


def start_of(transaction: Transaction, scan: str) -> LabelRecord | None:
    """The label that an annotator starts from: what was sent back into the queue, else the network's mask."""
    latest = tags(transaction, scan, only=(RETURNED, ORIGINAL))
    return latest.get(RETURNED) or latest.get(ORIGINAL)


def starts(transaction: Transaction) -> dict[str, int]:
    """The version that an annotator starts from, of every scan that has one; see `start_of`."""
    query = (
        select(Scan.name, LabelVersion.id)
        .join(Scan, LabelVersion.scan_id == Scan.id)
        .where(LabelVersion.id.in_(current_versions((ORIGINAL, RETURNED))))
        .order_by(LabelVersion.tag == RETURNED)  # the last one counts
    )
    return {scan: version for scan, version in transaction.execute(query)}


def current_versions(only: Collection[str]) -> Select[int]:
    """A query for the current versions of all scans under some tags."""
    last = select(func.max(LabelVersion.id)).where(LabelVersion.tag.in_(only))
    last = last.group_by(LabelVersion.scan_id, LabelVersion.tag)
    return select(LabelVersion.id).where(LabelVersion.id.in_(last), LabelVersion.sha256.is_not(None))


def get(transaction: Transaction, version: int) -> LabelRecord:
    """A version by its number.

    Raises:
        StoreError: if there is none.
    """
    row = transaction.rows(_VERSION, {"version": version}).first()
    if row is None:
        raise StoreError(f"there is no label version {version}")
    return _record(row)


def get_all(transaction: Transaction, versions: Sequence[int]) -> dict[int, LabelRecord]:
    """Versions by their numbers; there is none of a number that no version has."""
    found: dict[int, LabelRecord] = {}
    for start in range(0, len(versions), _IN_ONE_QUERY):
        query = _records().where(LabelVersion.id.in_(versions[start : start + _IN_ONE_QUERY]))
        found |= {record.id: record for record in map(_record, transaction.rows(query))}
    return found


def readings(transaction: Transaction, scan: str) -> list[LabelRecord]:
    """The current readings of a scan (tags ``reader-1``, ``reader-2``, ...), in the order of their numbers.

    Raises:
        UnknownScan: if there is no such scan.
    """
    scans.number_of(transaction, scan)
    found = [record for tag, record in tags(transaction, scan).items() if _reader_number(tag) is not None]
    return sorted(found, key=lambda record: _reader_number(record.tag) or 0)


def reader_tag(transaction: Transaction, scan: str, actor: Actor) -> str:
    """The tag of an annotator's reading of a scan: the one it has, else the next number."""
    taken = {record.tag: record.actor for record in readings(transaction, scan)}
    own = next((tag for tag, reader in taken.items() if reader == actor), None)
    return own or f"{READER}{max((_reader_number(tag) or 0 for tag in taken), default=0) + 1}"


def _reader_number(tag: str) -> int | None:
    number = tag.removeprefix(READER)
    return int(number) if tag.startswith(READER) and number.isdecimal() else None


def newest(transaction: Transaction) -> int:
    """The number of the newest label version of all scans; 0 without one."""
    return transaction.scalar(select(func.max(LabelVersion.id))) or 0


def history(transaction: Transaction, scan: str) -> list[LabelRecord]:
    """All versions of a scan's labels, oldest first; a mask with a planted error once its annotator has submitted.

    Raises:
        UnknownScan: if there is no such scan.
    """
    scans.number_of(transaction, scan)
    answered = select(AttentionCheckRow.label_version_id).where(AttentionCheckRow.found.is_not(None))
    query = _records().where(Scan.name == scan, or_(IS_LABEL, LabelVersion.id.in_(answered)))
    return [_record(row) for row in transaction.rows(query.order_by(LabelVersion.id))]


def tags(transaction: Transaction, scan: str, *, only: Collection[str] | None = None) -> dict[str, LabelRecord]:
    """The current label of each tag that a scan has, or of some tags."""
    if only is None:
        rows = transaction.rows(_TAGS, {"scan": scan})
    else:
        rows = transaction.rows(_SOME_TAGS, {"scan": scan, "tags": list(only)})
    return {record.tag: record for record in map(_record, rows)}


def readings_of_all(transaction: Transaction) -> dict[str, list[LabelRecord]]:
    """The current readings of every scan that has some, in the order of their numbers."""
    numbers = {tag: number for tag in all_tags(transaction) if (number := _reader_number(tag)) is not None}
    found: dict[str, list[LabelRecord]] = {}
    for tag in sorted(numbers, key=numbers.__getitem__):
        for scan, record in current_of_all(transaction, tag).items():
            found.setdefault(scan, []).append(record)
    return found


def read_scans(transaction: Transaction) -> set[str]:
    """The scans with a current reading by any annotator, where several label each scan."""
    return set(readings_of_all(transaction))


def ever_labelled(transaction: Transaction, tags_: Collection[str]) -> set[str]:
    """The scans that have or had a label under one of some tags."""
    query = select(Scan.name).join(LabelVersion, LabelVersion.scan_id == Scan.id)
    return set(transaction.scalars(query.where(LabelVersion.tag.in_(tags_)).distinct()))


def all_tags(transaction: Transaction) -> list[str]:
    """Every tag that any scan has or had a label under."""
    return list(transaction.scalars(select(LabelVersion.tag).where(IS_LABEL).distinct().order_by(LabelVersion.tag)))


def current_of_all(transaction: Transaction, tag: str) -> dict[str, LabelRecord]:
    """The current label of every scan that has one under a tag."""
    query = _records().where(IS_LABEL, LabelVersion.tag == tag, LabelVersion.sha256.is_not(None), ~_newer().exists())
    return {record.scan: record for record in map(_record, transaction.rows(query))}


def earlier_of_all(transaction: Transaction, tag: str) -> dict[str, list[LabelRecord]]:
    """The labels that later ones took the place of under a tag, oldest first, of every scan that has some."""
    query = _records().where(IS_LABEL, LabelVersion.tag == tag, LabelVersion.sha256.is_not(None), _newer().exists())
    found: dict[str, list[LabelRecord]] = {}
    for record in map(_record, transaction.rows(query.order_by(LabelVersion.id))):
        found.setdefault(record.scan, []).append(record)
    return found


def _newer() -> Select[int]:
    """In a query of versions: the later ones of the same tag."""
    later = aliased(LabelVersion)
    return select(later.id).where(
        later.scan_id == LabelVersion.scan_id, later.tag == LabelVersion.tag, later.id > LabelVersion.id
    )


def counts(transaction: Transaction) -> dict[str, int]:
    """How many scans have a current label under each tag."""
    query = select(LabelView.tag, func.count()).group_by(LabelView.tag)
    return {tag: count for tag, count in transaction.execute(query)}


def note_view(transaction: Transaction, version: LabelRecord, file: str, size: int, modified_ns: int) -> None:
    """Remember how the file that shows a version was left."""
    scan_id, shown = transaction.rows(_SHOWN, {"scan": version.scan, "tag": version.tag}).one()
    left = {"label_version_id": version.id, "file": file, "size": size, "modified_ns": modified_ns}
    if shown is None:
        transaction.insert(LabelView, scan_id=scan_id, tag=version.tag, **left)
    else:
        own = LabelView.scan_id == scan_id, LabelView.tag == version.tag
        transaction.change(update(LabelView).where(*own).values(left))


def views_of(transaction: Transaction, scan_id: int) -> list[tuple[str, ViewState]]:
    """The files below ``labels/`` that show a scan's labels, as they were left."""
    rows = transaction.execute(
        select(LabelView.file, LabelView.size, LabelView.modified_ns, LabelView.label_version_id).where(
            LabelView.scan_id == scan_id
        )
    ).all()
    return [(row.file, ViewState(row.size, row.modified_ns, row.label_version_id)) for row in rows]


def forget_views(transaction: Transaction, scan_id: int) -> list[tuple[str, ViewState]]:
    """Remember that nothing is shown of a scan; returns what was."""
    shown = views_of(transaction, scan_id)
    transaction.execute(delete(LabelView).where(LabelView.scan_id == scan_id))
    return shown


def forget_view(transaction: Transaction, scan: str, tag: str) -> None:
    """Remember that a tag shows nothing of a scan."""
    scan_id = scans.number_of(transaction, scan)
    transaction.execute(delete(LabelView).where(LabelView.scan_id == scan_id, LabelView.tag == tag))


@dataclass(frozen=True, slots=True)
class ViewState:
    """A file below ``labels/`` as the store left it, and the version that it shows."""

    size: int
    modified_ns: int
    version: int


def view_of(transaction: Transaction, scan: str, tag: str) -> tuple[str, ViewState] | None:
    """The file below ``labels/`` that shows a scan's label under a tag, as it was left."""
    row = transaction.rows(_VIEW_OF, {"scan": scan, "tag": tag}).first()
    return None if row is None else (row.file, ViewState(row.size, row.modified_ns, row.label_version_id))


def view_marks(transaction: Transaction, tag: str) -> set[str]:
    """The files below a tag as they were left, each as one text; see `view_mark`."""
    text = LabelView.file + "/" + cast(LabelView.size, String) + "/" + cast(LabelView.modified_ns, String)
    return set(transaction.scalar(select(json_array(text)).where(LabelView.tag == tag)) or [])


def view_mark(file: str, size: int, modified_ns: int) -> str:
    """A file of `view_marks`."""
    return f"{file}/{size}/{modified_ns}"


def views(transaction: Transaction, tag: str) -> dict[str, ViewState]:
    """The files below a tag as they were left, by file."""
    rows = transaction.execute(
        select(LabelView.file, LabelView.size, LabelView.modified_ns, LabelView.label_version_id).where(
            LabelView.tag == tag
        )
    )
    return {file: ViewState(size, modified, version) for file, size, modified, version in rows}


def known_content(transaction: Transaction, sha256: str) -> bool:
    """Whether any version has this content, or was read from it."""
    for address in (LabelVersion.sha256, LabelVersion.submitted_sha256):
        if transaction.scalar(select(LabelVersion.id).where(address == sha256).limit(1)) is not None:
            return True
    return False


def has_content(transaction: Transaction, scan: str, tag: str, sha256: str) -> bool:
    """Whether some version of a scan's label under a tag has this content."""
    query = select(LabelVersion.id).join(Scan, Scan.id == LabelVersion.scan_id)
    query = query.where(Scan.name == scan, LabelVersion.tag == tag, LabelVersion.sha256 == sha256)
    return transaction.scalar(query.limit(1)) is not None


def last_with_content(transaction: Transaction, scan: str, tag: str, sha256: str) -> LabelRecord | None:
    """The last version of a scan's label under a tag that has this content, or was read from it; None without one."""
    query = _records().where(IS_LABEL, Scan.name == scan, LabelVersion.tag == tag)
    query = query.where(or_(LabelVersion.sha256 == sha256, LabelVersion.submitted_sha256 == sha256))
    row = transaction.rows(query.order_by(LabelVersion.id.desc()).limit(1)).first()
    return None if row is None else _record(row)


def contents(transaction: Transaction) -> Iterator[tuple[str, str]]:
    """Address and suffix of all content that versions speak of, also of the files that they were read from."""
    for address, end in (
        (LabelVersion.sha256, LabelVersion.suffix),
        (LabelVersion.submitted_sha256, LabelVersion.submitted_suffix),
    ):
        query = select(address, end).where(address.is_not(None)).distinct()
        yield from ((sha256, suffix) for sha256, suffix in transaction.execute(query) if sha256 and suffix)


def info(transaction: Transaction, version: int) -> JsonObject:
    """What clients noted of a version."""
    row = transaction.get(LabelInfo, version)
    return {} if row is None else dict(row.info)


def note_proposal(transaction: Transaction, version: int, taken: TakenProposal) -> None:
    """Keep what was taken of a proposal for a version; what is noted already stays."""
    if transaction.get(ProposalUse, version) is None:
        transaction.add(
            ProposalUse(
                label_version_id=version,
                proposal_id=taken.proposal,
                boxes_offered=taken.boxes_offered,
                boxes_taken=taken.boxes_taken,
            )
        )


def taken_proposal(transaction: Transaction, version: int) -> TakenProposal | None:
    """What was taken of a proposal for a version; None where none was offered."""
    row = transaction.get(ProposalUse, version)
    if row is None:
        return None
    return TakenProposal(proposal=row.proposal_id, boxes_offered=row.boxes_offered, boxes_taken=row.boxes_taken)


def taken_proposals(transaction: Transaction) -> dict[int, TakenProposal]:
    """What was taken of proposals, by the number of the version that was submitted after one was offered."""
    return {
        row.label_version_id: TakenProposal(
            proposal=row.proposal_id, boxes_offered=row.boxes_offered, boxes_taken=row.boxes_taken
        )
        for row in transaction.scalars(select(ProposalUse).order_by(ProposalUse.label_version_id))
    }


def infos(transaction: Transaction, versions: Sequence[int] | None = None) -> dict[int, JsonObject]:
    """What clients noted of each version, or of some, that they noted something of."""
    every = select(LabelInfo)
    queries = [every]
    if versions is not None:
        parts = [versions[start : start + _IN_ONE_QUERY] for start in range(0, len(versions), _IN_ONE_QUERY)]
        queries = [every.where(LabelInfo.label_version_id.in_(part)) for part in parts]
    return {row.label_version_id: dict(row.info) for query in queries for row in transaction.scalars(query)}


def update_info(transaction: Transaction, version: int, more: JsonObject) -> None:
    """Add to what clients noted of a version."""
    transaction.merge(LabelInfo(label_version_id=version, info={**info(transaction, version), **more}))


def _bundle(row: Bundle) -> BundleRecord:
    return BundleRecord(id=row.id, segmenter_version=row.segmenter_version, assessor_version=row.assessor_version)


def _records() -> Select[*tuple[Any, ...]]:
    """The fields of a LabelRecord."""
    version = LabelVersion
    return (
        select(
            version.id, Scan.name.label("scan"), version.tag, version.source, version.sha256, version.suffix,
            version.parent_id, version.made_at, version.submitted_sha256, version.submitted_suffix,
            version.checked_slices,
            Bundle.id.label("bundle_id"), Bundle.segmenter_version, Bundle.assessor_version,
            ActorRow.kind, ActorRow.name.label("actor_name"), ActorRow.identified_by,
        )
        .join(Scan, version.scan_id == Scan.id)
        .join(ActorRow, version.actor_id == ActorRow.id)
        .outerjoin(Bundle, version.bundle_id == Bundle.id)
    )  # fmt: skip


def _current_number(tag: str) -> ScalarSelect[int | None]:
    """In a query of scans: the number of the current version under a tag; NULL where there is none."""
    return (
        select(case((LabelVersion.sha256.is_not(None), LabelVersion.id)))
        .where(LabelVersion.scan_id == Scan.id, LabelVersion.tag == tag)
        .order_by(LabelVersion.id.desc())
        .limit(1)
        .correlate(Scan)
        .scalar_subquery()
    )


def _last_of_each_tag() -> Select[int | None]:
    return (
        select(func.max(LabelVersion.id))
        .join(Scan, Scan.id == LabelVersion.scan_id)
        .where(Scan.name == bindparam("scan"), IS_LABEL)
        .group_by(LabelVersion.tag)
    )


# built once: building a query takes longer than running it
_CURRENT: Final = (
    _records()
    .where(Scan.name == bindparam("scan"), LabelVersion.tag == bindparam("tag"), IS_LABEL)
    .order_by(LabelVersion.id.desc())
    .limit(1)
)
_SHOWN: Final = (
    select(Scan.id, LabelView.tag)
    .outerjoin(LabelView, and_(LabelView.scan_id == Scan.id, LabelView.tag == bindparam("tag")))
    .where(Scan.name == bindparam("scan"))
)
_VIEW_OF: Final = (
    select(LabelView.file, LabelView.size, LabelView.modified_ns, LabelView.label_version_id)
    .join(Scan, Scan.id == LabelView.scan_id)
    .where(Scan.name == bindparam("scan"), LabelView.tag == bindparam("tag"))
)
START_OF_SCAN: Final = func.coalesce(_current_number(RETURNED), _current_number(ORIGINAL))
"""In a query of scans: the number of the version that an annotator starts from; see `start_of`."""
FINAL_OF_SCAN: Final = _current_number(FINAL)
"""In a query of scans: the number of the current final label."""
_FORGET_SCORES: Final = delete(Score).where(Score.scan_id == bindparam("scan"), Score.bundle_id.is_not(None))
_END_PSEUDO: Final = (
    update(PseudoLabelRow)
    .where(
        PseudoLabelRow.ended_at.is_(None),
        PseudoLabelRow.label_version_id.in_(
            select(LabelVersion.id).where(LabelVersion.scan_id == bindparam("scan"), LabelVersion.tag == PSEUDO)
        ),
    )
    .values(ended_at=bindparam("ended_at", type_=UtcDateTime()), ended_because=bindparam("ended_because"))
)
_VERSION: Final = _records().where(LabelVersion.id == bindparam("version"))
_TAGS: Final = _records().where(LabelVersion.id.in_(_last_of_each_tag()), LabelVersion.sha256.is_not(None))
_SOME_TAGS: Final = _records().where(
    LabelVersion.id.in_(_last_of_each_tag().where(LabelVersion.tag.in_(bindparam("tags", expanding=True)))),
    LabelVersion.sha256.is_not(None),
)


def _record(row: Row[*tuple[Any, ...]]) -> LabelRecord:
    made_by = None
    if row.bundle_id is not None:
        made_by = BundleRecord(
            id=row.bundle_id, segmenter_version=row.segmenter_version, assessor_version=row.assessor_version
        )
    return LabelRecord(
        id=row.id,
        scan=row.scan,
        tag=row.tag,
        source=row.source,
        sha256=row.sha256,
        suffix=row.suffix,
        parent=row.parent_id,
        bundle=made_by,
        actor=Actor(kind=row.kind, name=row.actor_name, identified_by=row.identified_by),
        made_at=row.made_at,
        submitted_sha256=row.submitted_sha256,
        submitted_suffix=row.submitted_suffix,
        checked_slices=None if row.checked_slices is None else tuple(row.checked_slices),
    )
