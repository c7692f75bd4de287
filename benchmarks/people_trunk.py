"""Would another beginning or another input make a better network for people's masks?

The product's begins at SegQC-Net, and sees the scan and the mask. Beside it stand networks that differ in one thing,
each trained as long, on the same masks: one that sees a soft output, too, of segmentation networks that have not seen
the patient; one that begins at a SegQC-Net which never saw a mask; one that begins at random weights; and the product's
own with another seed, which says what chance alone does.

They are compared by cross-validation within the labelled patients of `benchmarks/people.py`, and nobody else is looked
at: each member judges masks of the fold that it has not seen, all members together those of the patients that validate,
and what calibrates them is of other patients. What is trained in the work folder is not trained
again.

    python benchmarks/people_trunk.py run hippocampus --form "soft output" --data $SEGQC_DATA --work /tmp/people
    python benchmarks/people_trunk.py table
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
import torch
from people import RESULTS, SETS, KnownSet, arguments_of, keep, serve, serve_scan_only
from people_kinds import UNTOUCHED, Judged, judge
from pydantic import TypeAdapter
from torch import nn

from segqc.evaluation.report.document import Table
from segqc.evaluation.report.formats import to_markdown
from segqc.loop.dataset import Dataset
from segqc.networks.assessor import Assessor
from segqc.networks.bundle import FOLDS
from segqc.networks.card import ModelCard
from segqc.networks.plan import NetworkPlan
from segqc.networks.segmenter import Segmenter
from segqc.networks.unet import MaskSkip, MeanOfNetworks, StemUNet, Weights, build_network
from segqc.quality.estimation import LEVEL, ConfidenceInterval, patient_index, percentile_interval, with_resamples
from segqc.quality.metrics import Values
from segqc.training import LineProgress, Progress, TrainingSettings
from segqc.training.assessor_calibration import calibrated_for_people
from segqc.training.assessor_network import Beginning, assessor_job, fit_assessor, mask_examples
from segqc.training.cases import Case, label_values, read_case
from segqc.training.crossfit import MaskSet
from segqc.training.engine import fit
from segqc.training.people import people_sets, train_people
from segqc.types import BoolArray, FloatArray, Structure

Form: TypeAlias = Literal["product", "another seed", "soft output", "scan only", "random"]
FORMS: Final[tuple[Form, ...]] = get_args(Form)
IMPLANTED: Final = "implanted"
MASKS: Final = 12
"""Masks of a scan that are judged, beside the right one."""
CALIBRATING: Final = 8
"""The first of these calibrate the estimates of other patients' masks."""
GROUPS: Final = 5
"""Of patients: those of one are judged by what the others have calibrated."""
ANOTHER_SEED: Final = 1000
DRAWS: Final = 2000
progress = LineProgress()


@dataclass(frozen=True, slots=True)
class Member:
    """How the training of a member went."""

    epochs: int
    best_epoch: int
    validation_loss: float


@dataclass(frozen=True, slots=True)
class Result:
    """What the networks of a form say of masks of the labelled patients; ``trust`` is the mask skip's, by member."""

    set: str
    seed: int
    form: Form
    members: tuple[Member, ...]
    trust: tuple[tuple[float, ...], ...]
    judged: tuple[Judged, ...]


RESULT: TypeAdapter[Result] = TypeAdapter(Result)


# --- soft outputs as an input -----------------------------------------------------------------------------------------


class WithSoftOutput(nn.Module):
    """A plan's network with a mask skip, which sees a soft output for each mask, too."""

    def __init__(self, plan: NetworkPlan) -> None:
        super().__init__()
        self.masks = plan.out_channels
        self.unet = StemUNet(replace(plan, in_channels=plan.in_channels + self.masks, mask_skip=False))
        self.mask_skip = MaskSkip(self.masks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, L, a, b, c) of scan, masks and soft outputs (N, 1 + 2 L, a, b, c)."""
        return torch.as_tensor(self.unet(x) + self.mask_skip(x[:, 1 : 1 + self.masks]))


class OnItsOwn(nn.Module):
    """A `WithSoftOutput` that is shown scan and masks: the soft output is the mean of segmentation networks' own."""

    def __init__(self, network: WithSoftOutput, segmenters: Sequence[Segmenter], structures: Sequence[Structure]):
        super().__init__()
        self.network = network
        self.segmenters = nn.ModuleList(s.network for s in segmenters)
        self.classes = _classes(segmenters[0], structures)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, L, a, b, c) of scan and masks (N, 1 + L, a, b, c)."""
        soft = [_by_structure(segmenter(x[:, :1]), self.classes) for segmenter in self.segmenters]
        return torch.as_tensor(self.network(torch.cat([x, torch.stack(soft).mean(dim=0)], dim=1)))


def _classes(segmenter: Segmenter, structures: Sequence[Structure]) -> list[list[int]]:
    """The channels of a segmentation network that belong to each structure."""
    return [[1 + segmenter.values.index(value) for value in s.values] for s in structures]


def _by_structure(logits: torch.Tensor, classes: Sequence[Sequence[int]]) -> torch.Tensor:
    """The probability of each structure (N, L, a, b, c) by class logits (N, 1 + V, a, b, c)."""
    probabilities = logits.softmax(dim=1)
    return torch.stack([probabilities[:, list(of_structure)].sum(dim=1) for of_structure in classes], dim=1)


def _unseen(segmenters: Sequence[Segmenter], patients: Collection[str]) -> list[Segmenter]:
    """Those that have trained from no label of the patients."""
    found = [s for s in segmenters if not set(s.card.seen) & set(patients)]
    assert found, f"every network has seen one of {sorted(patients)}"
    return found


def soft_outputs(cases: Sequence[Case], folds: Sequence[Segmenter], path: Path) -> dict[str, FloatArray]:
    """The mean soft output (L, a, b, c) of each case, by the folds' networks that have not seen the patient.

    They are kept in a file: by another number of threads their last digits differ, and the training would be another.
    """
    if not path.is_file():
        found, classes = {}, _classes(folds[0], folds[0].structures)
        for case in cases:
            scan, _ = read_case(case, folds[0].values)
            logits = (torch.from_numpy(s.predict(scan).logits)[None] for s in _unseen(folds, [case.patient]))
            found[case.id] = torch.cat([_by_structure(z, classes) for z in logits]).mean(dim=0).numpy()
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **found)
    with np.load(path) as kept:
        return dict(kept)


def _begun_at(weights: Weights, plan: NetworkPlan) -> nn.Module:
    """A `WithSoftOutput` that says what the plan's network says at these weights, as it does not heed the soft yet."""
    network = WithSoftOutput(plan)
    for name, own in network.unet.state_dict().items():
        given = weights[name]
        if own.shape == given.shape:
            own.copy_(given)
        else:  # the first convolution
            own.zero_()[:, : given.shape[1]] = given
    return network


def fit_with_soft(
    soft: Mapping[str, FloatArray],
    folds_file: Path,
    name: str,
    plan: NetworkPlan,
    train: Sequence[MaskSet],
    validation: Sequence[MaskSet],
    structures: Sequence[Structure],
    settings: TrainingSettings,
    folder: Path,
    progress: Progress,
    *,
    unseen: Collection[str],
    begin_at: Beginning,
) -> Assessor:
    """Train a member that sees the soft output of each case; see `segqc.training.assessor_network.fit_assessor`."""
    values = label_values(structures)
    examples, validating = (
        [replace(example, soft=soft[example.case]) for example in mask_examples(sets, values, plan)]
        for sets in (train, validation)
    )
    job = assessor_job(name, plan, examples, validating, structures, settings)
    build, variant = partial(_begun_at, begin_at.weights), f"soft output, {begin_at.version}"
    network = fit(replace(job, build=build, variant=variant, bounded_by="people_epochs"), folder, progress).network
    assert isinstance(network, WithSoftOutput)
    trained = tuple(sorted({s.case.patient for s in train}))
    card = ModelCard(
        kind="segqc",
        plan=plan,
        structures=tuple(structures),
        values=values,
        seen=tuple(sorted({*trained, *(s.case.patient for s in validation)})),
        members_seen=(trained,),
    )
    return Assessor(card, OnItsOwn(network, _unseen(Segmenter.load_members(folds_file), unseen), structures))


class Remembering(nn.Module):
    """A network that computes each window once: all groups of patients but one calibrate on the same mask."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.answers: dict[bytes, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the network says of a batch."""
        key = hashlib.sha256(x.cpu().numpy().tobytes()).digest()
        if key not in self.answers:
            self.answers[key] = self.network(x)
        return self.answers[key]


# --- who judges -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Judges:
    """SegQC-Net with a network for people's masks: as each member of it judges alone, and as all do together."""

    alone: Assessor
    together: Assessor

    def of(self, patient: str) -> Assessor:
        """Who judges a labelled patient: those members that have not trained from the labels."""
        found = self.alone.unseen_by(patient)
        assert found is not None, f"every member has seen {patient}"
        return self.together if found is self.alone else found

    def calibrated(self, card: ModelCard) -> Judges:
        """With the calibration of a card of the network for people's masks."""
        return Judges(*(a.with_people(_people(a).with_card(card)) for a in (self.alone, self.together)))


def _people(assessor: Assessor) -> Assessor:
    assert assessor.people is not None, "it has a network for people's masks"
    return assessor.people


def trained(known: KnownSet, name: str, seed: int, form: Form, data: Path, work: Path) -> tuple[Judges, list[Member]]:
    """Train the networks of a form, as far as it is not done yet."""
    dataset = serve(known, seed, data, work / f"{name}-{seed}")
    product, folds_file = _loaded(dataset), _segqc_file(dataset).with_name(FOLDS)
    cases, splits = dataset.cases(), dict(dataset.patient_splits())
    settings, folds = dataset.settings.training_settings("segqc"), Segmenter.load_members(folds_file)
    folder = work / f"{name}-{seed}-trunk" / form.replace(" ", "-")
    begin, fit_member = product, fit_assessor
    if form == "another seed":
        settings = replace(settings, seed=settings.seed + ANOTHER_SEED)
    elif form == "scan only":
        begin = _loaded(serve_scan_only(known, seed, data, work / f"{name}-{seed}"))
    elif form == "random":
        unlearned = [build_network(product.card.plan, seed=settings.seed + k) for k in range(product.card.members)]
        begin = Assessor(replace(product.card, people=None), MeanOfNetworks(unlearned))
    elif form == "soft output":
        soft = soft_outputs(cases, folds, folder / "soft.npz")
        fit_member = partial(fit_with_soft, soft, folds_file)
    people = train_people(begin, cases, splits, settings, folder, progress, fit_member=fit_member)
    assert people is not None, "enough scans are labelled"
    assert isinstance(people.network, MeanOfNetworks)
    members = list(people.network.members)
    of_all = [OnItsOwn(m.network, folds, people.structures) if isinstance(m, OnItsOwn) else m for m in members]
    alone, together = (MeanOfNetworks([Remembering(m) for m in networks]) for networks in (members, of_all))
    judges = Judges(*(product.with_people(Assessor(people.card, network)) for network in (alone, together)))
    return judges, [_member(folder / f"member-{k}") for k in range(people.card.members)]


def _segqc_file(dataset: Dataset) -> Path:
    path = dataset.model_path("segqc")
    assert path is not None
    return path


def _loaded(dataset: Dataset) -> Assessor:
    """The SegQC-Net that serves, computed by PyTorch in float32 whatever the form."""
    return Assessor.load(_segqc_file(dataset))


def _member(folder: Path) -> Member:
    curve = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    best = min(curve, key=lambda point: point["validation_loss"])
    return Member(len(curve), best["epoch"], best["validation_loss"])


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(name: str, seed: int, form: Form, data: Path, work: Path) -> Result:
    """Judge masks of the labelled patients by the networks of a form, cross-validated."""
    known = SETS[name]
    judges, members = trained(known, name, seed, form, data, work)
    people = _people(judges.together)
    cases = Dataset(work / f"{name}-{seed}").cases()
    sets = people_sets(cases, people.structures, seed + ANOTHER_SEED // 2, count=MASKS)  # others than those that train
    patients = sorted({case.patient for case in cases})
    order = np.random.default_rng(seed).permutation(len(patients))
    group_of = {patients[int(i)]: n % GROUPS for n, i in enumerate(order)}
    judged: list[Judged] = []
    for group in range(GROUPS):
        others = [
            (_people(judges.of(s.case.patient)), replace(s, masks=s.masks[:CALIBRATING], dice=s.dice[:CALIBRATING]))
            for s in sets
            if group_of[s.case.patient] != group
        ]
        calibrated = judges.calibrated(calibrated_for_people(people, others, progress).card)
        for mask_set in sets:
            if group_of[mask_set.case.patient] == group:
                judged += _of_case(calibrated.of(mask_set.case.patient), mask_set)
    skips = [m for m in people.network.modules() if isinstance(m, MaskSkip)]
    trust = tuple(tuple(round(float(t), 3) for t in skip.trust) for skip in skips)
    return Result(name, seed, form, tuple(members), trust, tuple(judged))


def _of_case(assessor: Assessor, mask_set: MaskSet) -> Iterator[Judged]:
    case = mask_set.case
    scan, labels = read_case(case, assessor.values)
    truth = np.asarray(labels.array, np.uint8)
    yield judge(assessor, scan, truth, truth, case.patient, UNTOUCHED)
    for mask in mask_set.masks:
        if (mask != truth).any():
            yield judge(assessor, scan, truth, mask, case.patient, IMPLANTED)


# --- tables -----------------------------------------------------------------------------------------------------------


class Numbers:
    """The numbers of a result, each in the set itself and then in every draw of its patients: (1 + draws,)."""

    def __init__(self, result: Result) -> None:
        self.judged = result.judged
        index, count = patient_index([m.patient for m in result.judged])
        self.copies = with_resamples(count, DRAWS, np.random.default_rng(0))[:, index].astype(float)
        self.is_wrong: BoolArray = np.array([m.group == IMPLANTED for m in result.judged])
        of = partial(_values, result.judged)
        self.true, self.said, self.evidence, self.covered = of("dice"), of("estimate"), of("evidence"), of("covered")

    def mean(self, values: Values, among: BoolArray) -> Values:
        """The mean of a number of the masks, (n,), among some of them, (n,)."""
        weights = self.copies * among
        return np.asarray(weights @ values / weights.sum(axis=1))

    @property
    def error(self) -> Values:
        """The error of the estimated Dice of masks with implanted errors."""
        return self.mean(np.abs(self.said - self.true), self.is_wrong)

    @property
    def error_of_right(self) -> Values:
        """That of right masks."""
        return self.mean(np.abs(self.said - self.true), ~self.is_wrong)

    @property
    def auroc(self) -> Values:
        """Of telling masks with an error from right ones by the largest evidence."""
        wrong, right = self.evidence[self.is_wrong][:, None], self.evidence[~self.is_wrong][None]
        wins = (wrong > right) + 0.5 * (wrong == right)
        of_wrong, of_right = self.copies[:, self.is_wrong], self.copies[:, ~self.is_wrong]
        won = ((of_wrong @ wins) * of_right).sum(axis=1)
        return np.asarray(won / (of_wrong.sum(axis=1) * of_right.sum(axis=1)))

    @property
    def pearson(self) -> float:
        """Of estimated and true Dice of masks with implanted errors."""
        return float(np.corrcoef(self.said[self.is_wrong], self.true[self.is_wrong])[0, 1])


def _values(judged: Sequence[Judged], name: str) -> Values:
    return np.array([getattr(mask, name) for mask in judged], np.float64)


def table(results: Sequence[Result]) -> Table:
    """The forms of one set and seed beside each other, and how much each differs from the product."""
    numbers = {result.form: Numbers(result) for result in results}
    product = numbers["product"]
    rows: list[list[str | int | float | None]] = []
    for result in results:
        own = numbers[result.form]
        assert [(m.patient, m.dice) for m in own.judged] == [(m.patient, m.dice) for m in product.judged]
        rows.append(
            [
                result.form,
                ", ".join(f"{m.best_epoch} of {m.epochs}" for m in result.members),
                int(own.is_wrong.sum()),
                float(own.error[0]),
                float(own.mean(own.said - own.true, own.is_wrong)[0]),
                own.pearson,
                float(own.auroc[0]),
                float(own.mean(own.said, ~own.is_wrong)[0]),
                float(own.mean(own.covered, own.is_wrong)[0]),
                *(
                    "" if own is product else _shown(getattr(own, what) - getattr(product, what))
                    for what in ("error", "auroc", "error_of_right")
                ),
            ]
        )
    patients = len({m.patient for m in product.judged})
    return Table(
        "trunk",
        f"Forms of the network for people's masks, cross-validated: {results[0].set}, seed {results[0].seed}, "
        f"{patients} labelled patients",
        ["form", "best epochs", "n", "MAE", "bias", "Pearson", "AUROC, evidence", "untouched said",
         "intervals that hold", "MAE less the product's", "AUROC less the product's",
         "error of untouched less the product's"],
        rows,
        note="n, MAE, bias, Pearson, intervals: of masks with implanted errors; beside them one untouched mask of each "
        f"scan. Differences with {LEVEL:.0%} intervals, a bootstrap over patients.",
    )  # fmt: skip


def _shown(drawn: Values) -> str:
    found: ConfidenceInterval = percentile_interval(drawn[0], drawn[1:], LEVEL)
    return f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"


def _forms(run: argparse.ArgumentParser) -> None:
    run.add_argument("--form", choices=FORMS, required=True)


def main() -> None:
    """Run one unit, or print the tables."""
    arguments = arguments_of(__doc__, pools=(), further=_forms)
    if arguments.command == "run":
        result = measure(arguments.set, arguments.seed, arguments.form, arguments.data, arguments.work)
        path = RESULTS / f"trunk-{result.set}-{result.seed}-{result.form.replace(' ', '-')}.json"
        keep(RESULT.dump_python(result, mode="json"), arguments.result or path)
        return
    of: dict[tuple[str, int], list[Result]] = {}
    for path in RESULTS.glob("trunk-*.json"):
        result = RESULT.validate_json(path.read_bytes())
        of.setdefault((result.set, result.seed), []).append(result)
    for _, results in sorted(of.items()):
        print(to_markdown(table(sorted(results, key=lambda result: FORMS.index(result.form)))), end="\n\n")


if __name__ == "__main__":
    main()
