"""The certificate of a data set: its bound against exact ones, in simulated folders, in the store, and as a command."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, hypergeom
from typer.testing import CliRunner

from segqc.cli import main
from segqc.loop.certificate import Wanted, certify_all, certify_groups, certify_states
from segqc.loop.dataset import Dataset
from segqc.loop.errors import DatasetError
from segqc.loop.submission import submit_label
from segqc.quality.certificate import AuditedMask, Certificate, certificate_sentence, certify
from segqc.store import corrections, dataset_labels, labels, leases, orders, scans
from segqc.store.dataset_labels import DatasetLabels
from segqc.store.labels import FINAL, NewLabel
from segqc.store.leases import LeaseRules
from segqc.store.records import Actor, Change, LeaseRecord, StructureChange
from segqc.store.store import Store
from segqc.types import Metrics
from tests.server_kit import assess, draw_case, make_dataset
from tests.store_kit import ANNA, BERT, Clock, answer_lease, bundle, label_map, make_scans, save_mask, sync_scans
from tests.test_annotation_commands import run
from tests.test_pseudo_label_store import accept

DAY = dt.datetime(2026, 1, 5, tzinfo=dt.UTC)
WAITING = AuditedMask(made_at=DAY, is_judged=True)


def at(minute: float) -> dt.datetime:
    return DAY + dt.timedelta(minutes=minute)


def only_audits(waiting: int, good: int, bad: int) -> list[AuditedMask]:
    """Masks of which so many were audited, one after another, the bad ones first."""
    answers = [False] * bad + [True] * good
    drawn = [
        AuditedMask(made_at=DAY, left_at=at(i + 1), drawn_at=at(i + 1), is_good=answer)
        for i, answer in enumerate(answers)
    ]
    return [WAITING] * waiting + drawn


# -------------------------------------------------------------------------------------------------------- the bound


@pytest.mark.parametrize(("audits", "bad"), [(59, 0), (20, 0), (20, 1), (60, 4), (5, 5)])
def test_of_very_many_masks_the_share_is_that_of_clopper_and_pearson(audits: int, bad: int) -> None:
    waiting = 200_000
    found = certify(waiting + audits, audits, only_audits(waiting, audits - bad, bad), share=0.9)
    high = binomtest(bad, audits, alternative="less").proportion_ci(0.95, method="exact").high
    assert (found.audits, found.bad, found.judged, found.corrected) == (audits, bad, waiting, audits)
    assert found.bad_left / waiting == pytest.approx(high, abs=1e-3)


@pytest.mark.parametrize(
    ("total", "audits", "bad"), [(100, 30, 0), (60, 45, 0), (60, 30, 2), (40, 20, 5), (212, 59, 1)]
)
def test_where_only_audits_happen_it_is_hardly_more_than_the_hypergeometric_one(
    total: int, audits: int, bad: int
) -> None:
    found = certify(total, audits, only_audits(total - audits, audits - bad, bad), share=0.9)
    exact = max(k for k in range(bad, total + 1) if hypergeom.cdf(bad, total, k, audits) > 0.05) - bad
    assert exact <= found.bad_left <= exact + 2


def test_once_all_are_corrected_all_are_good() -> None:
    found = certify(30, 30, only_audits(0, 20, 10), share=0.9)
    assert (found.bad_left, found.at_least, found.missing) == (0, 1.0, 0)


@dataclass
class Folder:
    """Masks that wait, good or bad; what leaves is corrected."""

    good: list[bool]
    rng: np.random.Generator
    masks: dict[int, AuditedMask] = field(default_factory=dict)
    minute: int = 0

    def __post_init__(self) -> None:
        self.masks = {i: WAITING for i in range(len(self.good))}

    def waiting(self) -> list[int]:
        return [i for i, mask in self.masks.items() if mask.left_at is None]

    def take(self, mask: int, *, as_audit: bool) -> None:
        self.minute += 1
        left = replace(self.masks[mask], left_at=at(self.minute), is_good=self.good[mask], is_judged=False)
        self.masks[mask] = replace(left, drawn_at=at(self.minute)) if as_audit else left

    def come(self, good: list[bool]) -> None:
        self.minute += 1
        for is_good in good:
            self.masks[len(self.good)] = replace(WAITING, made_at=at(self.minute))
            self.good.append(is_good)

    def bad_left(self) -> int:
        return sum(not self.good[i] for i in self.waiting())

    def certificate(self) -> Certificate:
        left = len(self.masks) - len(self.waiting())
        return certify(len(self.masks), left, list(self.masks.values()), share=0.9)


Strategy = Callable[[Folder], int | None]


def random_scan(folder: Folder) -> int | None:
    return int(folder.rng.choice(folder.waiting()))


def worst_first(folder: Folder) -> int | None:
    return min(folder.waiting(), key=lambda i: folder.good[i] + folder.rng.normal(0, 0.5))


def best_first(folder: Folder) -> int | None:
    return max(folder.waiting(), key=lambda i: folder.good[i])


def spiteful(folder: Folder) -> int | None:
    """Hides what audits show: as soon as one was bad, only good masks are corrected, and before that only bad ones."""
    seen_bad = any(m.drawn_at is not None and m.is_good is False for m in folder.masks.values())
    return best_first(folder) if seen_bad else min(folder.waiting(), key=lambda i: folder.good[i])


def none(folder: Folder) -> int | None:
    return None


@pytest.mark.parametrize("strategy", [none, random_scan, worst_first, best_first, spiteful])
@pytest.mark.parametrize(("bad_share", "newcomers"), [(0.1, 10), (0.3, 0)])
def test_the_bound_holds_in_19_of_20_folders_whatever_is_corrected_meanwhile(
    strategy: Strategy, bad_share: float, newcomers: int
) -> None:
    folders, missed = 150, 0
    for seed in range(folders):
        rng = np.random.default_rng((seed, 7))
        folder = Folder((rng.random(50) >= bad_share).tolist(), rng)
        for step in range(32):
            if step == 16:
                folder.come([False] * newcomers)  # bad ones that no audit before could see
            is_audit = rng.random() < 0.4
            chosen = random_scan(folder) if is_audit else strategy(folder)
            if chosen is not None:
                folder.take(chosen, as_audit=is_audit)
        found = folder.certificate()
        missed += folder.bad_left() > found.bad_left
    assert missed <= 0.05 * folders + 3 * np.sqrt(0.05 * 0.95 * folders)


def test_masks_that_came_later_are_not_vouched_for_by_audits_before() -> None:
    masks = only_audits(60, 40, 0)
    before = certify(100, 40, masks, share=0.9)
    later = certify(110, 40, [*masks, *[replace(WAITING, made_at=at(100))] * 10], share=0.9)
    assert later.bad_left == before.bad_left + 10


def test_bad_masks_that_were_corrected_since_are_none_of_those_that_are_left() -> None:
    masks = only_audits(60, 20, 0)
    corrected = [AuditedMask(made_at=DAY, left_at=at(50), is_good=False)] * 5
    found = certify(85, 25, [*masks, *corrected], share=0.9)
    as_good = certify(85, 25, [*masks, *[replace(mask, is_good=True) for mask in corrected]], share=0.9)
    assert found.bad_left == as_good.bad_left - 5


def test_an_audit_that_nobody_answered_counts_as_bad() -> None:
    masks = only_audits(60, 20, 0)
    unanswered = AuditedMask(made_at=DAY, left_at=at(50), drawn_at=at(50))
    found = certify(81, 20, [*masks, unanswered], share=0.9)
    known = certify(81, 20, [*masks, replace(unanswered, is_good=False)], share=0.9)
    assert (found.audits, found.bad, found.judged, found.unknown) == (21, 1, 60, 1)
    assert known.bad_left <= found.bad_left, "a bad one that was found is none of those that are left"


# ---------------------------------------------------------------------------------------------- how many are missing


def test_as_many_audits_as_are_missing_are_enough_and_one_fewer_is_not() -> None:
    for waiting, good, bad, share in ((200, 0, 0, 0.9), (150, 30, 1, 0.9), (150, 30, 1, 0.95), (60, 5, 2, 0.99)):
        missing = certify(waiting + good + bad, good + bad, only_audits(waiting, good, bad), share=share).missing
        assert missing is not None
        for further, is_enough in ((missing, True), (missing - 1, False)):
            audits = good + bad + further
            masks = only_audits(waiting - further, good + further, bad)
            found = certify(waiting + good + bad, audits, masks, share=share)
            assert found.at_least is not None
            assert (found.at_least >= share) == is_enough


def test_labels_that_nothing_speaks_for_count_as_bad_and_no_audit_helps() -> None:
    found = certify(100, 20, [WAITING] * 60, share=0.9)
    assert (found.unknown, found.bad_left, found.at_least, found.missing) == (20, 60, 0.2, None)
    assert certify(100, 20, [WAITING] * 60, share=0.8).missing == 58, "nearly all"
    assert certificate_sentence(found, 0.8, 0.9) == (
        "At least 20% of the 100 labels have a Dice of 0.8 or more (one-sided 95% bound; no audits). No number of "
        "further audits would allow to say that at least 90% do: nothing speaks for 20 of the labels."
    )


def test_the_sentences() -> None:
    few = certify(100, 20, only_audits(80, 19, 1), share=0.9)
    assert certificate_sentence(few, 0.8, 0.9).startswith("At least ")
    assert " audits, 1 of them bad). " in certificate_sentence(few, 0.8, 0.9)
    assert f". {few.missing} more audits without a bad one would allow" in certificate_sentence(few, 0.8, 0.9)
    enough = certify(159, 59, only_audits(100, 59, 0), share=0.9)
    assert certificate_sentence(enough, 0.8, 0.9) == (
        "At least 96.2% of the 159 labels have a Dice of 0.8 or more (one-sided 95% bound; 59 audits)."
    )
    in_part = [AuditedMask(made_at=DAY, left_at=at(1), is_judged=True)] * 20  # no audit can draw them any more
    hopeless = certificate_sentence(certify(30, 10, in_part, share=0.9), 0.8, 0.9)
    assert hopeless.endswith("that at least 90% do; people have to correct more of the labels wholly.")
    assert certificate_sentence(certify(0, 0, [], share=0.9), 0.8, 0.9) == "There are no labels to say anything of."


# -------------------------------------------------------------------------------------------------------- the store

AUDITS = LeaseRules(audit_share=1, validation_share=0, repeat_seconds=0, lease_minutes=60)
OTHERS = replace(AUDITS, audit_share=0)
COUNT = 12
WANTED = Wanted(0.8, 0.9)


@pytest.fixture
def store(url: str | None, clock: Clock, tmp_path: Path) -> Iterator[Store]:
    """Scans with masks of one network."""
    make_scans(tmp_path / "s", COUNT)
    opened = Store.open(tmp_path / "s", url, clock=clock)
    sync_scans(opened)
    for i in range(COUNT):
        save_mask(opened, tmp_path, f"scan_{i}", i + 1)
    clock.pass_(minutes=5)
    yield opened
    opened.close()


def hand_out(store: Store, clock: Clock, rules: LeaseRules = AUDITS, actor: Actor = ANNA) -> LeaseRecord:
    clock.pass_(minutes=1)
    with store.write() as transaction:
        lease = leases.acquire(transaction, actor, "uniform-random", orders.uniform, rules)
    assert lease is not None
    return lease


def answer(
    store: Store,
    clock: Clock,
    lease: LeaseRecord,
    dice: float | None,
    *,
    opened: tuple[int, ...] | None = None,
    simulated: bool = False,
    tag: str = FINAL,
) -> None:
    """A correction that shows a true Dice of the mask that was handed out."""
    clock.pass_(minutes=1)
    label = NewLabel(lease.scan, tag, "annotator", lease.actor)
    end = store.save_label(label, label_map(store.dataset.parent / "incoming.nii.gz", 30))
    parts = tuple(
        StructureChange(name=name, metrics=Metrics(value, None, None, None), voxels_changed=0, slices=())
        for name, value in (("liver", dice), ("spleen", 1.0))
    )
    change = Change(through_plane_axis=2, voxels_changed=2, slices_changed=1, structures=parts, opened_slices=opened)
    with store.write() as transaction:
        answered = answer_lease(transaction, lease.scan, lease.actor)
        assert lease.label_version is not None
        start = labels.get(transaction, lease.label_version)
        corrections.add(transaction, start, end, change, lease.actor, lease=answered, simulated=simulated)


def found(store: Store, *, simulated: bool = False) -> DatasetLabels:
    with store.read() as transaction:
        return dataset_labels.listing(transaction, simulated=simulated)


def states(store: Store, *, simulated: bool = False) -> dict[str, int]:
    counts = Counter(str(label.state) for label in found(store, simulated=simulated).labels)
    return dict(counts)


def said(store: Store, *, simulated: bool = False) -> Certificate:
    return certify_all(found(store, simulated=simulated), WANTED).said


def numbers(certificate: Certificate) -> tuple[int, int, int, int, int]:
    return (
        certificate.labels,
        certificate.corrected,
        certificate.judged,
        certificate.audits,
        certificate.bad,
    )


def test_audits_count_and_other_corrections_only_as_corrected(store: Store, clock: Clock) -> None:
    assert numbers(said(store)) == (COUNT, 0, COUNT, 0, 0)
    answer(store, clock, hand_out(store, clock), 0.8)  # at the threshold it is good
    answer(store, clock, hand_out(store, clock), 0.79)
    answer(store, clock, hand_out(store, clock, OTHERS), 0.1)
    answer(store, clock, hand_out(store, clock, replace(OTHERS, validation_share=1)), 0.1)
    assert numbers(said(store)) == (COUNT, 4, COUNT - 4, 2, 1)
    assert found(store).segmenter == "seg1"


def test_a_mask_is_as_good_as_its_worst_structure_and_without_one_it_is_right(store: Store, clock: Clock) -> None:
    answer(store, clock, hand_out(store, clock), None)
    assert [label.mask.true_dice for label in found(store).labels if label.mask and label.mask.left_at] == [1.0]
    assert said(store).bad == 0


@pytest.mark.parametrize("end", ["skipped", "expired", "in part", "excluded", "rejected"])
def test_an_audit_that_nobody_answers_wholly_counts_as_bad_until_somebody_does(
    store: Store, clock: Clock, end: str
) -> None:
    lease = hand_out(store, clock)
    assert numbers(said(store)) == (COUNT, 0, COUNT, 0, 0), "it may be answered yet"
    if end == "skipped":
        with store.write() as transaction:
            leases.skip(transaction, lease.scan, ANNA, "difficult")
    elif end == "expired":
        clock.pass_(hours=2)
    elif end == "in part":
        answer(store, clock, lease, 0.9, opened=(1,))
    elif end == "excluded":
        store.review(lease.scan, "excluded", ANNA, "blurred")
    else:
        answer(store, clock, lease, 0.9)
        clock.pass_(minutes=1)
        store.review(lease.scan, "rejected", BERT, "not good")
    is_there = end != "excluded"
    assert numbers(said(store)) == (COUNT - (not is_there), 0, COUNT - 1, 1, 1)
    assert certify_all(found(store), WANTED).unanswered == ((lease.scan,) if is_there else ())
    if end in ("skipped", "expired"):
        answer(store, clock, lease, 0.9)
        assert numbers(said(store)) == (COUNT, 1, COUNT - 1, 1, 0)


def test_what_the_strategy_chose_and_somebody_put_aside_is_vouched_for_by_no_audit(store: Store, clock: Clock) -> None:
    lease = hand_out(store, clock, OTHERS)
    with store.write() as transaction:
        leases.skip(transaction, lease.scan, ANNA, "difficult")
    assert numbers(said(store)) == (COUNT, 0, COUNT - 1, 0, 0)
    assert said(store).unknown == 1


def test_a_label_that_was_corrected_in_part_is_judged_by_its_mask(store: Store, clock: Clock) -> None:
    lease = hand_out(store, clock, OTHERS)
    answer(store, clock, lease, 0.9, opened=(1,))
    assert states(store) == {"network mask": COUNT - 1, "partly corrected": 1}
    before = said(store)
    assert numbers(before) == (COUNT, 0, COUNT, 0, 0)
    answer(store, clock, hand_out(store, clock), 0.9)
    # nobody can draw it any more: it may be bad, whatever the audits say
    later = said(store)
    assert numbers(later) == (COUNT, 1, COUNT - 1, 1, 0)
    (by_state,) = [c for c in certify_states(found(store), WANTED) if c.group == "partly corrected"]
    assert by_state.said.bad_left == 1


def test_audits_of_older_masks_do_not_speak_for_those_of_the_next_network(
    store: Store, clock: Clock, tmp_path: Path
) -> None:
    answer(store, clock, hand_out(store, clock), 0.9)
    waiting = [label.scan for label in found(store).labels if label.state == "network mask"]
    for scan in waiting[:-1]:
        save_mask(store, tmp_path, scan, 20, "seg2")
    clock.pass_(minutes=1)
    assert found(store).segmenter == "seg2"
    assert numbers(said(store)) == (COUNT, 1, COUNT - 2, 0, 0)
    assert states(store) == {"network mask": COUNT - 2, "other mask": 1, "corrected": 1}
    # another bundle with the same network: its masks are the same
    bundle(store, "seg2", "qc2")
    answer(store, clock, hand_out(store, clock), 0.9)
    assert said(store).audits <= 1
    assert said(store).audits == sum(label.state == "other mask" for label in found(store).labels)


def test_a_scan_without_a_mask_and_a_label_from_the_folder(store: Store, clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "s" / "scan_new.nii.gz").touch()
    label_map(tmp_path / "s" / "labels" / "final" / "scan_3.nii.gz", 9)
    clock.pass_(minutes=1)
    sync_scans(store)
    assert states(store) == {"network mask": COUNT - 1, "no mask": 1, "corrected": 1}
    assert (said(store).unknown, said(store).corrected) == (1, 1)


def test_masks_that_no_network_of_the_folder_made_can_be_audited(url: str | None, clock: Clock, tmp_path: Path) -> None:
    make_scans(tmp_path / "s", 4)
    for i in range(4):
        label_map(tmp_path / "s" / "labels" / "original" / f"scan_{i}.nii.gz", i + 1)
    store = Store.open(tmp_path / "s", url, clock=clock)
    sync_scans(store)
    answer(store, clock, hand_out(store, clock), 0.9)
    assert (found(store).segmenter, numbers(said(store))) == (None, (4, 1, 3, 1, 0))
    store.close()


def test_simulated_corrections_count_only_where_they_are_asked_for(store: Store, clock: Clock) -> None:
    answer(store, clock, hand_out(store, clock), 0.9, simulated=True)
    answer(store, clock, hand_out(store, clock), 0.9)
    assert numbers(said(store)) == (COUNT, 1, COUNT - 2, 1, 0)
    assert states(store)["simulated"] == 1
    assert numbers(said(store, simulated=True)) == (COUNT, 2, COUNT - 2, 1, 0)


def test_readings_of_several_annotators_are_one_audit_with_the_worst_of_them(store: Store, clock: Clock) -> None:
    several = replace(AUDITS, readers=2)
    first = hand_out(store, clock, several)
    answer(store, clock, first, 0.9, tag="reader-1")
    assert numbers(said(store)) == (COUNT, 1, COUNT - 1, 1, 0)
    while (second := hand_out(store, clock, several, BERT)).scan != first.scan:
        with store.write() as transaction:
            leases.release(transaction, second.scan, BERT)
    others = said(store).audits - 1  # what Bert had and gave back
    answer(store, clock, second, 0.7, tag="reader-2")
    assert numbers(said(store)) == (COUNT, 1, COUNT - 1 - others, 1 + others, 1 + others)


def test_pseudo_labels_are_judged_by_their_own_audits_too(store: Store, clock: Clock, tmp_path: Path) -> None:
    with store.read() as transaction:
        chosen = [scan.name for scan in scans.listing(transaction) if scan.split == "train"][:4]
    for scan in chosen:
        accept(store, tmp_path, scan, is_audited=scan in chosen[:2])
    for _ in range(2):
        lease = hand_out(store, clock, OTHERS)
        assert lease.draw == "pseudo-audit"
        answer(store, clock, lease, 0.9)
    while (audit := hand_out(store, clock, AUDITS, BERT)).scan not in chosen:
        answer(store, clock, audit, 0.5)
    answer(store, clock, audit, 0.7)
    by_state = {c.group: c.said for c in certify_states(found(store), WANTED)}
    accepted = by_state["pseudo-label"]
    assert (accepted.labels, accepted.judged, accepted.audits, accepted.bad) == (1, 1, 3, 1)
    assert by_state["corrected"].at_least == 1.0
    assert (by_state["corrected"].labels, by_state["corrected"].audits) == (by_state["corrected"].corrected, 0)
    masks = by_state.get("network mask")
    assert said(store).audits == 1 + (masks.audits if masks is not None else COUNT - len(chosen))


def test_groups_by_the_name_of_patient_or_scan(store: Store, clock: Clock) -> None:
    for _ in range(4):
        answer(store, clock, hand_out(store, clock), 0.9)
    groups = {c.group: c for c in certify_groups(found(store), WANTED, r"scan_(\d)$")}
    assert sorted(groups) == ["", *"0123456789"]
    assert [groups[name].said.labels for name in ("", "3")] == [COUNT - 10, 1]
    assert sum(c.said.audits for c in groups.values()) == said(store).audits == 4
    with pytest.raises(DatasetError, match=r"the groups' pattern '\(' is no regular expression"):
        certify_groups(found(store), WANTED, "(")
    with pytest.raises(DatasetError, match="'sacn' finds nothing in the name of any patient or scan"):
        certify_groups(found(store), WANTED, "sacn")


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "s", scans=8, finals=0)
    dataset = Dataset(folder)
    for i in range(8):
        assess(dataset, f"scan_{i}", 0.5 + i / 20, mask=draw_case(i)[1])
    for _ in range(3):
        with dataset.store.write() as transaction:
            lease = leases.acquire(transaction, ANNA, "segqc", orders.uniform, AUDITS)
        assert lease is not None
        submit_label(dataset, lease.scan, draw_case(int(lease.scan.removeprefix("scan_")))[1], FINAL, ANNA)
    with dataset.store.write() as transaction:
        last = leases.acquire(transaction, ANNA, "segqc", orders.uniform, AUDITS)
        assert last is not None
        leases.skip(transaction, last.scan, ANNA, "difficult")
    told = json.loads(run("certify", folder, "--json", "--share", 0.5))
    assert told["sentence"].startswith("At least 37.5% of the 8 labels have a Dice of 0.8 or more (one-sided 95% bound")
    assert (told["segmenter"], told["unanswered"]) == ("seg", [last.scan])
    (row,) = told["certificates"]
    assert (row["group"], row["labels"], row["patients"], row["corrected"], row["unknown"]) == ("all", 8, 8, 3, 1)
    assert (row["audits"], row["bad"], row["at least"]) == (4, 1, 0.375)
    shown = run("certify", folder, "--by-state")
    assert f"{folder}: At least 37.5% of the 8 labels" in shown
    assert f"Drawn or put aside, and not corrected: {last.scan}." in shown
    assert "network mask" in shown
    done = CliRunner().invoke(main.app, ["certify", str(folder), "--groups", r"scan_([01])", "--csv"])
    groups = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [row["group"] for row in groups] == ["all", "", "0", "1"]
