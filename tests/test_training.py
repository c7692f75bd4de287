"""Trainings that resume exactly, folds that are kept, masks that leak nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from segqc.networks.assessor import Assessor
from segqc.networks.backends import choose_backend
from segqc.networks.device import DeviceMemoryError, device_of_choice, has_bfloat16
from segqc.networks.segmenter import Segmenter
from segqc.networks.unet import build_network
from segqc.progress import described
from segqc.quality.stacking import DICE_OF_SERVED
from segqc.settings import SettingsError, build
from segqc.split import PatientSplit, SplitConfig, split_patients
from segqc.training import NoProgress, TrainingSettings, engine
from segqc.training.assessor import train_assessor
from segqc.training.assessor_calibration import VALIDATION_MASKS
from segqc.training.cases import Case, TooFewCases, make_example, read_case
from segqc.training.corruptions import deformed, sampling_grid
from segqc.training.crossfit import (
    LeakError,
    MaskSet,
    crossfit_masks,
    early_epochs,
    early_networks,
    folds_of_cases,
    masks_of,
    sources_of_masks,
    stored_masks,
    stratified_weights,
    subsample,
    train_fold,
    train_mask_sources,
)
from segqc.training.engine import _Ahead
from segqc.training.patches import Patch, PatchDataset, cut
from segqc.training.segmentation import plan_for, train_segmentation
from segqc.types import Structure
from segqc.volumes import Volume, VolumeError, read_scan, write_labels, write_scan

STRUCTURES = (Structure("ball", (1,)),)
QUICK = TrainingSettings(
    epochs=3,
    fold_epochs=2,
    people_epochs=2,
    steps_per_epoch=2,
    folds=2,
    gammas=(),
    average_flips=False,
    patch=(16, 16, 4),
    ensemble=False,
    mixed_precision=False,  # networks so small are ready to answer before a faster backend is
)
ALONE = replace(QUICK, people_epochs=0)
"""Without the network for people's masks, which `tests.test_people` is about."""


def make_cases(folder: Path, count: int) -> list[Case]:
    """Bright balls in noise."""
    cases = []
    grid = np.stack(np.meshgrid(np.arange(16), np.arange(16), np.arange(4), indexing="ij"), axis=-1)
    for i in range(count):
        rng = np.random.default_rng(i)
        centre, radius = rng.uniform((6, 6, 1), (10, 10, 3)), rng.uniform(3, 5)
        truth = (((grid - centre) * (1, 1, 2)) ** 2).sum(axis=-1) < radius**2
        scan = (rng.normal(size=truth.shape) + 3 * truth).astype(np.float32)
        case = Case(f"c{i}", f"p{i}", folder / f"c{i}.nii.gz", folder / f"c{i}-labels.nii.gz")
        write_scan(Volume(scan, np.diag([1.0, 1.0, 2.0, 1.0])), case.scan)
        write_labels(Volume(truth.astype(np.uint8), np.diag([1.0, 1.0, 2.0, 1.0])), case.labels)
        cases.append(case)
    return cases


def placed(cases: Sequence[Case], share: float = 0.25) -> dict[str, PatientSplit]:
    return split_patients([c.patient for c in cases], split_config=SplitConfig(folds=2, validation_share=share))


class KilledError(Exception):
    """Stands for a killed process."""


class KillAt(NoProgress):
    """A progress that ends the training in the middle of a step, as a killed process would."""

    def __init__(self, step: int, work: str) -> None:
        self.at, self.work, self.seen = step, work, 0

    def step(self, done: int, total: int, task: str, detail: str = "", *, unit: str = "scans") -> None:
        message = described(task, detail)
        if message.startswith(self.work):
            self.seen += 1
            if self.seen == self.at:
                raise KilledError


class Recorded(NoProgress):
    """A progress that keeps its messages."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


class Held(torch.nn.Module):
    """A network of one weight."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(value.clone())


def test_a_killed_training_resumes_at_the_epoch_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 5)
    straight = train_segmentation(cases, STRUCTURES, placed(cases), QUICK, tmp_path / "a", NoProgress())
    with pytest.raises(KilledError):
        train_segmentation(cases, STRUCTURES, placed(cases), QUICK, tmp_path / "b", KillAt(4, "segmentation"))
    assert len(json.loads((tmp_path / "b" / "curve.json").read_text())) == 1
    steps = KillAt(-1, "segmentation")
    resumed = train_segmentation(cases, STRUCTURES, placed(cases), QUICK, tmp_path / "b", steps)
    assert steps.seen == 4, "one epoch of two steps was done, two were left"
    assert resumed.version == straight.version
    assert (tmp_path / "a" / "curve.json").read_text() == (tmp_path / "b" / "curve.json").read_text()


def test_other_data_or_settings_are_trained_anew(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 5)
    first = train_segmentation(cases, STRUCTURES, placed(cases), QUICK, tmp_path / "t", NoProgress())
    other = train_segmentation(cases, STRUCTURES, placed(cases), replace(QUICK, seed=1), tmp_path / "t", NoProgress())
    assert first.version != other.version


def test_early_networks_are_those_of_epochs_that_the_time_allowed(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 6)
    settings = replace(QUICK, fold_epochs=12, max_minutes=1e-6)  # two epochs; 1, 2 and 6 are wanted
    plan = plan_for(cases, settings, in_channels=1, out_channels=2)
    made = crossfit_masks(cases, STRUCTURES, placed(cases), plan, settings, tmp_path / "t", NoProgress())
    group = sources_of_masks(1, settings)
    assert {len(mask_set.masks) for mask_set in made.sets} == {len(group) + 2}


def test_early_networks_of_a_kept_training_are_found_again(tmp_path: Path) -> None:
    cases, settings = make_cases(tmp_path, 6), replace(QUICK, fold_epochs=4)
    plan = plan_for(cases, settings, in_channels=1, out_channels=2)
    common = cases, STRUCTURES, placed(cases), plan, settings, tmp_path / "t", NoProgress()
    folds = [train_fold(fold, *common) for fold in folds_of_cases(cases, placed(cases))]
    Segmenter.save_members([networks[0] for networks in folds], tmp_path / "folds.pt")
    for (last, *early), loaded in zip(folds, Segmenter.load_members(tmp_path / "folds.pt"), strict=True):
        assert loaded.version == last.version and loaded.card.seen == last.card.seen
        assert [n.version for n in early_networks(loaded, tmp_path / "t")] == [n.version for n in early] and early
    assert not early_networks(folds[0][0], tmp_path / "gone")
    other = Segmenter(folds[0][0].card, build_network(plan, seed=9))
    assert not early_networks(other, tmp_path / "t"), "another network's"


@pytest.mark.skipif(not has_bfloat16(device_of_choice()), reason="no instructions for bfloat16 here")
def test_mixed_precision_learns_alike_and_answers_in_float32(tmp_path: Path) -> None:
    cases, longer = make_cases(tmp_path, 5), replace(QUICK, epochs=8, steps_per_epoch=4)
    curves = {}
    for mixed in (True, False):
        settings, folder = replace(longer, mixed_precision=mixed), tmp_path / str(mixed)
        segmenter = train_segmentation(cases, STRUCTURES, placed(cases), settings, folder, NoProgress())
        assert {w.dtype for w in segmenter.network.state_dict().values() if w.is_floating_point()} == {torch.float32}
        patch = torch.zeros(1, 1, *segmenter.card.plan.patch)
        assert segmenter.run(patch).dtype == torch.float32
        curves[mixed] = [point["train_loss"] for point in json.loads((folder / "curve.json").read_text())]
    assert curves[True] != curves[False]
    np.testing.assert_allclose(curves[True], curves[False], rtol=0.05)
    assert curves[True][-1] < 0.8 * curves[True][0]


def test_a_device_without_instructions_for_it_trains_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    cases = make_cases(tmp_path, 5)
    versions = {
        train_segmentation(cases, STRUCTURES, placed(cases), settings, tmp_path / str(i), NoProgress()).version
        for i, settings in enumerate((replace(QUICK, mixed_precision=True), QUICK))
    }
    assert len(versions) == 1


def test_batches_made_ahead_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases, loader = make_cases(tmp_path, 5), engine._loader
    settings = replace(ALONE, mask_deformation=2.0, empty_mask_share=0.3)
    straight = train_assessor(cases, STRUCTURES, placed(cases), settings, tmp_path / "a", NoProgress())
    monkeypatch.setattr(engine, "_loader", lambda training, patches: _Ahead(loader(training, patches)))
    with pytest.raises(KilledError):
        train_assessor(cases, STRUCTURES, placed(cases), settings, tmp_path / "b", KillAt(4, "SegQC-Net: epoch"))
    ahead = train_assessor(cases, STRUCTURES, placed(cases), settings, tmp_path / "b", NoProgress())
    assert ahead.version == straight.version


def test_a_fault_in_a_batch_made_ahead_is_raised() -> None:
    def batches() -> Iterator[Patch]:
        yield {}
        raise VolumeError("a damaged scan")

    found = iter(_Ahead(batches()))
    assert next(found) == {}
    with pytest.raises(VolumeError, match="a damaged scan"):
        next(found)


def test_a_gpu_that_is_too_small_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    cases = make_cases(tmp_path, 5)
    segmenter = train_segmentation(cases, STRUCTURES, placed(cases), QUICK, tmp_path / "t", NoProgress())
    monkeypatch.setattr("segqc.networks.unet.StemUNet.forward", full)
    with pytest.raises(DeviceMemoryError, match=r"does not hold patches of 16 x 16 x 4 voxels.*smaller batch"):
        train_segmentation(cases, STRUCTURES, placed(cases), QUICK, tmp_path / "u", NoProgress())
    with pytest.raises(DeviceMemoryError, match="CUDA_VISIBLE_DEVICES"):
        segmenter.predict(read_scan(cases[0].scan))


def test_validating_patches_together_gives_the_loss_of_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases, losses = make_cases(tmp_path, 8), []
    patient_splits = placed(cases, share=0.5)
    assert sum(p.split == "validation" for p in patient_splits.values()) > 2
    for batch_size in (1, 2, 100):
        monkeypatch.setattr(engine, "window_batch_size", lambda _patch, n=batch_size: n)
        folder = tmp_path / str(batch_size)
        train_segmentation(cases, STRUCTURES, patient_splits, QUICK, folder, NoProgress())
        losses.append([point["validation_loss"] for point in json.loads((folder / "curve.json").read_text())])
    np.testing.assert_allclose(losses, [losses[0]] * 3, rtol=1e-4)


def test_training_ends_when_validation_gets_no_better(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 5)
    said = Recorded()
    settings = replace(QUICK, epochs=60, patience=3, learning_rate=0.1)
    train_segmentation(cases, STRUCTURES, placed(cases), settings, tmp_path / "t", said)
    losses = [point["validation_loss"] for point in json.loads((tmp_path / "t" / "curve.json").read_text())]
    assert len(losses) < 60
    best = int(np.argmin(losses)) + 1
    assert best == len(losses) - 3
    assert said.messages[-1] == f"segmentation: {len(losses)} epochs, the best was epoch {best}."


def test_a_training_that_still_improves_says_so(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 5)
    said = Recorded()
    train_segmentation(cases, STRUCTURES, placed(cases), replace(QUICK, epochs=3), tmp_path / "t", said)
    assert said.messages[-1] == (
        "segmentation: 3 epochs, and it was still improving at the end: it may become better with larger 'epochs'."
    )
    none_validate = dict.fromkeys((c.patient for c in cases), PatientSplit(0, "train"))
    train_segmentation(cases, STRUCTURES, none_validate, QUICK, tmp_path / "u", said)
    assert said.messages[-1].endswith("as no patient validates it, nothing says whether more of them would help.")


def test_without_masks_of_unseen_patients_estimates_are_the_map_s_own(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 4)
    none_validate = {c.patient: PatientSplit(i % 2, "train") for i, c in enumerate(cases)}
    trained = train_assessor(cases, STRUCTURES, none_validate, ALONE, tmp_path / "t", NoProgress())
    scan, truth = read_case(cases[0], (1,))
    (quality,) = trained.assess(scan, truth, scan_id="c0").assessment.structures
    assert quality.estimated.dice == quality.raw.metrics.dice
    assert quality.intervals.dice is None


def test_a_bound_on_time_shortens_all_parts_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = make_cases(tmp_path, 5)
    ticks = itertools.count(step=60.0)
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    seen: list[int] = []
    finish = engine._Training.finish_epoch

    def note(training: engine._Training, epoch: int, train_loss: float, validation_loss: float | None) -> None:
        seen.append(training.scan_only_epochs)
        finish(training, epoch, train_loss, validation_loss)

    monkeypatch.setattr(engine._Training, "finish_epoch", note)
    settings = replace(
        QUICK, epochs=40, people_epochs=40, patience=40, max_minutes=4.0, scan_only_share=0.5, ensemble=False
    )
    said = Recorded()
    train_assessor(cases, STRUCTURES, placed(cases), settings, tmp_path / "t", said)
    curve = json.loads((tmp_path / "t" / "curve.json").read_text())
    assert len(curve) == 4, "an epoch takes a minute"
    assert seen[-8:] == [2, 2, 2, 2, 0, 0, 0, 0], "the last four are of the network for people's masks"
    told = [text for text in said.messages if text.startswith("SegQC-Net: ")]
    assert told[-1].startswith("SegQC-Net: 4 epochs")


def test_the_average_of_the_weights_is_what_is_kept(tmp_path: Path) -> None:
    """Against the mean of the weights after each step, as PyTorch's own moving average has it."""
    weights = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(400)]
    average = AveragedModel(Held(weights[0]), multi_avg_fn=engine._moving_average)
    expected = weights[0].clone()
    for step, value in enumerate(weights):
        average.update_parameters(Held(value))
        if step:
            decay = min(0.99, step / (20 + step))
            expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(average.module.weight.data, expected)


def test_too_few_cases_are_named(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 3)
    with pytest.raises(TooFewCases, match="at least 4 patients, found 3"):
        train_segmentation(cases, STRUCTURES, placed(cases), QUICK, tmp_path / "t", NoProgress())


def test_patients_are_spread_over_folds_and_roles_however_they_come() -> None:
    names = [f"p{i}" for i in range(40)]
    split_config = SplitConfig(folds=3, validation_share=0.2, seed=5)
    first = split_patients(names[:12], split_config=split_config)
    both = {**first, **split_patients(names[12:], already=12, split_config=split_config)}
    assert sum(p.split == "validation" for p in both.values()) == 8
    counts = [sum(p.fold == k for p in both.values()) for k in range(3)]
    assert max(counts) - min(counts) <= 1
    assert split_patients(names[:12], split_config=split_config) == first


def test_a_network_never_makes_a_training_mask_of_what_it_has_seen(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 4)
    plan = plan_for(cases, QUICK, in_channels=1, out_channels=2)
    sources = train_mask_sources("m", cases[:3], STRUCTURES, plan, QUICK, tmp_path / "m", NoProgress())
    masks = masks_of(sources, cases[3], QUICK)
    # the whole group and the median of the trained network, one mask of each early one
    assert len(masks.masks) == 5 + len(sources) - 1 == len(masks.dice)
    assert sources_of_masks(len(sources), QUICK) == (0,) * 5 + tuple(range(1, len(sources)))
    plain = sources[0].predict(read_scan(cases[3].scan))
    assert masks.served is not None
    assert np.array_equal(masks.served.mask, plain.labels.array), "what would be served"
    assert masks.served.soft == sources[0].soft_outputs(plain, STRUCTURES)
    assert subsample(masks, 2).served is masks.served
    assert np.array_equal(masks.masks[-1], sources[-1].predict(read_scan(cases[3].scan)).labels.array)
    with pytest.raises(LeakError, match=r"has seen patient p1's label"):
        masks_of(sources, cases[1], QUICK)
    assert all(isinstance(m, Segmenter) and m.card.seen == ("p0", "p1", "p2") for m in sources)


def test_masks_are_computed_by_the_backend_that_would_serve(tmp_path: Path) -> None:
    cases, settings = make_cases(tmp_path, 3), replace(QUICK, mixed_precision=True)
    plan = plan_for(cases, settings, in_channels=1, out_channels=2)
    sources = train_mask_sources("m", cases, STRUCTURES, plan, settings, tmp_path / "m", NoProgress())
    chosen = choose_backend(sources[0].network, plan, torch.device("cpu"), "auto")
    assert [source.wanted_backend for source in sources] == ["auto"] * len(sources)
    assert sources[0].backend.name == chosen.name
    assert QUICK.backend == "pytorch"


def test_masks_are_kept_for_one_content_of_scan_and_label(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 4)
    plan = plan_for(cases, QUICK, in_channels=1, out_channels=2)
    sources = train_mask_sources("m", cases[:3], STRUCTURES, plan, QUICK, tmp_path / "m", NoProgress())
    case, folder = cases[3], tmp_path / "masks"
    first = stored_masks(sources, case, QUICK, folder)
    (kept,) = folder.iterdir()
    before = kept.stat().st_mtime_ns
    same = stored_masks(sources, case, QUICK, folder)
    assert np.array_equal(same.masks, first.masks)
    assert first.served is not None and same.served is not None
    assert np.array_equal(same.served.mask, first.served.mask)
    assert same.served.soft == first.served.soft
    assert kept.stat().st_mtime_ns == before
    # another scan with the same label, as after a change of intensities
    write_scan(Volume(-read_scan(case.scan).array, read_scan(case.scan).affine), case.scan)
    again = stored_masks(sources, case, QUICK, folder)
    assert np.array_equal(again.masks, masks_of(sources, case, QUICK).masks)
    assert not np.array_equal(again.masks, first.masks)


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 no archive", None])
def test_kept_masks_that_are_damaged_are_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    cases = make_cases(tmp_path, 2)
    plan = plan_for(cases, QUICK, in_channels=1, out_channels=2)
    sources = train_mask_sources("m", cases[:1], STRUCTURES, plan, QUICK, tmp_path / "m", NoProgress())
    first = stored_masks(sources, cases[1], QUICK, tmp_path / "masks")
    (kept,) = (tmp_path / "masks").iterdir()
    kept.write_bytes(kept.read_bytes()[:-200] if damage is None else damage)
    assert np.array_equal(stored_masks(sources, cases[1], QUICK, tmp_path / "masks").masks, first.masks)
    assert any(str(kept) in message and "made anew" in message for message in caplog.messages)


def test_segqc_trains_on_cross_fitted_masks_and_is_calibrated(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 5)
    patient_splits = placed(cases)
    model = train_assessor(cases, STRUCTURES, patient_splits, ALONE, tmp_path / "t", NoProgress())
    assert model.card.seen == tuple(f"p{i}" for i in range(5))
    assert len(model.card.calibration) == 1
    assert len(model.card.map_calibration) == 1
    validating = {c.patient for c in cases if patient_splits[c.patient].split == "validation"}
    for kind, masks in (("served", 1), ("strange", VALIDATION_MASKS)):
        intervals = model.card.calibration[0].kinds[kind].intervals  # type: ignore[index]
        assert intervals is not None
        assert len(intervals.dice.patients) == len(validating)
        assert {len(p.scores) for p in intervals.dice.patients} == {masks}, kind
    assert model.card.accuracy == 1 - model.card.scores["dice error ball"]
    assert model.card.report is not None
    assert {scan.patient for scan in model.card.report.scans} == validating
    assert [s.structure for s in model.card.report.structures] == ["ball"]
    made = {p.name.split("-")[0] for p in (tmp_path / "t" / "masks").iterdir()}
    assert made == {c.id for c in cases}
    again = KillAt(-1, "network for masks, fold 2 of 2: epoch")
    assert train_assessor(cases, STRUCTURES, patient_splits, ALONE, tmp_path / "t", again).version == model.version
    assert again.seen == 0, "finished folds are not trained again"
    kept = KillAt(-1, "masks by the network for masks")
    own = replace(ALONE, epochs=1, ensemble=False, scan_only_share=0.0, mask_deformation=1.0, patience=3, loss="dice")
    masks = sorted((tmp_path / "t" / "masks").iterdir())
    train_assessor(cases, STRUCTURES, patient_splits, own, tmp_path / "t", kept)
    assert kept.seen == len(cases)
    assert sorted((tmp_path / "t" / "masks").iterdir()) == masks, "SegQC-Net's own settings ask for no other masks"


def test_the_papers_recipe_can_be_chosen(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 4)
    recipe = replace(QUICK, average_flips=True, hide_mask=True).paper_recipe()
    assert (recipe.output_form, recipe.loss, recipe.learning_rate) == ("direct", "dice", 5e-4)
    model = train_assessor(cases, STRUCTURES, placed(cases), recipe, tmp_path / "t", NoProgress())
    assert model.card.output_form == "direct"
    assert (model.card.average_flips, model.card.hide_mask) == (False, False)


@pytest.mark.parametrize(
    "lacking", [{"average_flips": False}, {"output_form": "direct"}, {"scan_only_share": 0.0, "empty_mask_share": 0.0}]
)
def test_a_mask_is_hidden_only_from_networks_that_know_what_to_answer(lacking: dict[str, object]) -> None:
    able = replace(QUICK, average_flips=True, hide_mask=True, scan_only_share=0.0, empty_mask_share=0.2)
    with pytest.raises(ValueError, match="hide_mask needs average_flips"):
        replace(able, **lacking)  # type: ignore[arg-type]
    chosen = {"average_flips": True, "hide_mask": True, "scan_only_share": 0.4, **lacking}
    with pytest.raises(SettingsError, match="hide_mask needs average_flips"):
        build(TrainingSettings, chosen, "training")


def test_stratified_weights_draw_rare_qualities_more_often_but_not_without_end() -> None:
    dice = [0.95] * 15 + [0.55] * 4 + [0.11, 1.0]
    weights = np.array(stratified_weights(dice))
    shares = [weights[:15].sum() + weights[20], weights[15:19].sum(), weights[19]]
    np.testing.assert_allclose(shares, [4.0, 2.0, 1.0])


@pytest.mark.parametrize("epochs", [1, 2, 3, 8, 15, 25, 200])
def test_early_epochs_are_a_few_of_the_first_half(epochs: int) -> None:
    early = early_epochs(epochs)
    assert 1 <= len(early) <= 5
    assert list(early) == sorted(set(early))
    assert early[0] == 1
    assert early[-1] == max(1, epochs // 2)


def test_a_longer_training_makes_masks_of_more_qualities() -> None:
    assert early_epochs(8) == (1, 4)
    assert early_epochs(25) == (1, 2, 3, 6, 12)


def test_thinning_keeps_the_worst_and_the_best_mask() -> None:
    dice = (0.5, 0.9, 0.1, 0.7, 0.3)
    masks = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    full = MaskSet(Case("c", "p", Path("s"), Path("l")), masks, dice)
    few = subsample(full, 3)
    assert few.dice == (0.1, 0.5, 0.9)
    np.testing.assert_array_equal(few.masks.ravel(), [2, 0, 1])
    assert subsample(full, 5) is full


def test_a_patch_is_a_function_of_seed_and_draw(tmp_path: Path) -> None:
    (case,) = make_cases(tmp_path, 1)
    scan, truth = read_case(case, (1,))
    plan = plan_for([case], QUICK, in_channels=1, out_channels=2)
    examples = [make_example("c", scan, truth, plan, mask=np.asarray(truth.array))]
    settings = replace(QUICK, empty_mask_share=0.0)
    one, two = PatchDataset(examples, plan, settings, empty_until=3), PatchDataset(examples, plan, settings)
    _ = one[0], one[1]
    assert torch.equal(one[7]["image"], two[7]["image"])
    assert torch.equal(one[7]["truth"], one[7]["mask"]), "mask and truth move together"
    assert not torch.equal(one[7]["image"], one[8]["image"])
    assert not one[2]["mask"].any()
    some = PatchDataset(examples, plan, replace(QUICK, empty_mask_share=0.5))
    assert 5 < sum(bool(some[i]["mask"].any()) for i in range(40)) < 35
    assert not torch.equal(PatchDataset(examples, plan, replace(settings, seed=1))[7]["image"], two[7]["image"])


def test_masks_are_deformed_smoothly_in_millimetres() -> None:
    ball = torch.from_numpy(np.linalg.norm(np.indices((40, 40, 40)) - 20, axis=0)[None] < 12).float()
    shape, still = (40, 40, 40), np.random.default_rng(0)
    assert torch.equal(deformed(ball, sampling_grid(shape, (1, 1, 1), 0.0, still), labels=True), ball)
    dice = []
    for seed in range(20):
        grid = sampling_grid(shape, (1.0, 1.0, 1.0), 3.0, np.random.default_rng(seed))
        again = sampling_grid(shape, (1.0, 1.0, 1.0), 3.0, np.random.default_rng(seed))
        assert torch.equal(grid, again)
        moved = deformed(2 * ball, grid, labels=True)
        assert set(moved.unique().tolist()) <= {0.0, 2.0}
        dice.append(float(2 * (moved / 2 * ball).sum() / (moved / 2 + ball).sum()))
    assert min(dice) < 0.93 < 0.97 < max(dice), "as good as untouched, up to clearly wrong"
    # thick slices: what moves by 2 mm in the plane does not move through it
    thick = torch.zeros(1, 40, 40, 10)
    thick[..., 5] = 1
    grid = sampling_grid((40, 40, 10), (1.0, 1.0, 8.0), 2.0, np.random.default_rng(1))
    inside = deformed(thick, grid, labels=True)[0, 8:-8, 8:-8]
    assert inside[..., 5].all()
    assert not inside[..., :5].any()


def test_a_deformed_mask_leaves_scan_and_truth_alone(tmp_path: Path) -> None:
    (case,) = make_cases(tmp_path, 1)
    scan, truth = read_case(case, (1,))
    plan = plan_for([case], QUICK, in_channels=1, out_channels=2)
    examples = [make_example("c", scan, truth, plan, mask=np.asarray(truth.array))]
    plain = PatchDataset(examples, plan, QUICK)
    moved = PatchDataset(examples, plan, replace(QUICK, mask_deformation=3.0))
    differing = 0
    for draw in range(10):
        assert torch.equal(plain[draw]["image"], moved[draw]["image"])
        assert torch.equal(plain[draw]["truth"], moved[draw]["truth"])
        assert torch.equal(moved[draw]["mask"], moved[draw]["mask"])
        differing += not torch.equal(plain[draw]["mask"], moved[draw]["mask"])
    assert differing > 5


def test_a_patch_over_the_border_is_padded_with_zeros() -> None:
    array = np.arange(1, 28, dtype=np.float32).reshape(3, 3, 3)
    patch = cut(array, (-1, 2, 0), (3, 3, 3))[0].numpy()
    np.testing.assert_array_equal(patch[1:, :1], array[:2, 2:])
    assert not patch[0].any()
    assert not patch[:, 1:].any()


def test_an_ensemble_has_a_network_per_fold_and_calibrates_on_all_patients(tmp_path: Path) -> None:
    cases = make_cases(tmp_path, 8)
    where = placed(cases)
    settings = replace(ALONE, ensemble=True, epochs=2)
    trained = train_assessor(cases, STRUCTURES, where, settings, tmp_path / "t", NoProgress())
    assert trained.card.members == 2
    assert set(trained.card.seen) == {c.patient for c in cases}
    # the mean of the logits is what both answer together
    x = torch.zeros(1, 2, *trained.card.plan.patch, device=trained.device)
    with torch.inference_mode():
        alone = [member(x) for member in trained.network.members]  # type: ignore[union-attr]
        assert torch.allclose(trained.network(x), (alone[0] + alone[1]) / 2)
        assert not torch.allclose(alone[0], alone[1])
    trained.save(tmp_path / "model.pt")
    assert Assessor.load(tmp_path / "model.pt").version == trained.version
    served = trained.card.calibration[0].kinds["served"]
    assert served.intervals is not None
    assert len(served.intervals.dice.patients) == served.dice.patients == len(cases)
    assert {c.choice for c in served.dice.candidates} == set(DICE_OF_SERVED)
    assert len(json.loads((tmp_path / "t" / "curve.json").read_text())) == 2
    again = train_assessor(cases, STRUCTURES, where, settings, tmp_path / "t", NoProgress())
    assert again.version == trained.version
