"""Plans, stems, model files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from segqc.networks.card import ModelCard
from segqc.networks.inference import normalise
from segqc.networks.model import ModelError
from segqc.networks.plan import NetworkPlan, plan_network
from segqc.networks.segmenter import Segmenter
from segqc.networks.unet import build_network, depth_to_space, space_to_depth
from segqc.types import Structure

SMALL = NetworkPlan(
    in_channels=1,
    out_channels=2,
    spacing_mm=(1.0, 1.0, 3.0),
    patch=(16, 16, 4),
    stem=(2, 2, 1),
    kernels=((3, 3, 1), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (2, 2, 1), (2, 2, 2)),
    filters=(4, 8, 8),
)


def small_segmenter(seed: int = 0, **card: object) -> Segmenter:
    """An untrained network, quick to run."""
    values = {"kind": "segmentation", "structures": (Structure("a", (1,)),), "values": (1,), "seen": (), **card}
    return Segmenter(ModelCard(plan=SMALL, **values), build_network(SMALL, seed=seed))  # type: ignore[arg-type]


def test_thick_slices_are_pooled_in_plane_first_until_the_voxel_is_near_isotropic() -> None:
    plan = plan_network((1.0, 1.0, 4.0), (256, 256, 48), in_channels=2, out_channels=1, size="paper")
    spacing = np.array(plan.spacing_mm)
    for stride in plan.strides[1:]:
        if spacing.max() >= 2 * spacing.min():
            assert stride == (2, 2, 1)
        spacing = spacing * stride
    assert plan.strides[1:3] == ((2, 2, 1), (2, 2, 1))
    assert (2, 2, 2) in plan.strides
    assert plan.kernels[0] == (3, 3, 1)
    assert plan.kernels[2] == (3, 3, 3)
    assert plan.patch == (256, 256, 48)


@pytest.mark.parametrize("size", ["small", "medium", "paper"])
@pytest.mark.parametrize(
    ("spacing", "shape"),
    [
        ((1.0, 1.0, 1.0), (35, 51, 36)),
        ((1.0, 1.0, 5.0), (12, 10, 2)),
        ((1.25, 1.25, 8.0), (256, 256, 9)),
        ((0.8, 0.8, 2.0), (512, 512, 200)),
    ],
)
def test_a_planned_network_maps_its_patch_onto_logits_of_the_same_shape(
    size: str, spacing: tuple[float, float, float], shape: tuple[int, int, int]
) -> None:
    plan = plan_network(spacing, shape, in_channels=2, out_channels=3, size=size)  # type: ignore[arg-type]
    total = np.prod([plan.stem, *plan.strides], axis=0)
    assert all(p % t == 0 for p, t in zip(plan.patch, total, strict=True))
    if size == "small":
        with torch.inference_mode():
            assert build_network(plan)(torch.zeros(1, 2, *plan.patch)).shape == (1, 3, *plan.patch)


def test_a_plan_of_a_senseless_spacing_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        plan_network((1.0, 0.0, 1.0), (32, 32, 32), in_channels=1, out_channels=1)


def test_the_stem_loses_nothing_and_keeps_neighbours_together() -> None:
    x = torch.arange(2 * 3 * 4 * 6 * 5, dtype=torch.float32).reshape(2, 3, 4, 6, 5)
    packed = space_to_depth(x, (2, 3, 1))
    assert packed.shape == (2, 18, 2, 2, 5)
    assert torch.equal(depth_to_space(packed, (2, 3, 1)), x)
    block = {float(v) for v in x[0, 0, :2, :3, 0].ravel()}
    assert {float(v) for v in packed[0, :6, 0, 0, 0]} == block


def test_the_first_weights_are_a_function_of_the_seed() -> None:
    one, same, other = (build_network(SMALL, seed=s).state_dict() for s in (3, 3, 4))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_a_network_begins_without_checkerboards() -> None:
    plan = plan_network((1.0, 1.0, 1.0), (36, 52, 36), in_channels=1, out_channels=3)
    assert plan.stem == (2, 2, 2)
    network = build_network(plan, seed=2, first_bias=-1.5)
    x = torch.randn(1, 1, *plan.patch, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        smooth = network(x).numpy()
        rough = depth_to_space(network.unet(space_to_depth(x, plan.stem)), plan.stem).numpy()

    def checkerboard(y: np.ndarray) -> float:
        signs = np.indices(y.shape[2:]).sum(axis=0) % 2 * 2 - 1
        inside = (slice(None), slice(None), *[slice(2, -2)] * 3)
        return float(np.abs((y * signs)[inside].mean(axis=(2, 3, 4))).max())

    assert checkerboard(rough) > 0.01
    assert checkerboard(smooth) < 1e-3 * checkerboard(rough)
    # what does not change from voxel to voxel is left alone, up to the borders: first biases among it
    constant = torch.full((1, 3, 8, 8, 8), 0.7)
    assert network.smoothing is not None
    torch.testing.assert_close(network.smoothing(constant), constant)


def test_thick_slices_are_not_blended_by_the_smoothing() -> None:
    smoothing = build_network(SMALL).smoothing
    assert smoothing is not None and smoothing.kernel_size == (3, 3, 1)
    assert build_network(replace(SMALL, stem=(1, 1, 1))).smoothing is None


def test_a_model_file_alone_gives_the_model_back(tmp_path: Path) -> None:
    model = small_segmenter(seen=("p1",), scores={"dice": 0.5})
    model.save(tmp_path / "m.pt")
    again = Segmenter.load(tmp_path / "m.pt", "pytorch")
    assert again.card == model.card
    assert again.version == model.version != small_segmenter(seed=1, seen=("p1",)).version
    x = torch.rand(1, 1, 20, 18, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.run(x), again.run(x))


def test_a_model_file_cannot_run_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"segqc": 1, "card": Path("anything"), "weights": {}}, path)
    with pytest.raises(ModelError, match=r"evil\.pt: not a readable SegQC model"):
        Segmenter.load(path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"PK\x03\x04broken"])
def test_foreign_and_damaged_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"broken\.pt"):
        Segmenter.load(path)
    with pytest.raises(ModelError, match="no such model file"):
        Segmenter.load(tmp_path / "missing.pt")


def test_a_flipped_bit_in_a_model_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "flipped.pt"
    small_segmenter().save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"flipped\.pt: not a readable SegQC model"):
        Segmenter.load(path)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = small_segmenter()
    with torch.no_grad():
        next(model.network.parameters()).fill_(float("nan"))
    model.save(tmp_path / "nan.pt")
    with pytest.raises(ModelError, match=r"nan\.pt: holds weights that are no finite numbers"):
        Segmenter.load(tmp_path / "nan.pt")


def test_a_model_of_the_other_kind_is_refused() -> None:
    with pytest.raises(ModelError, match="a segmentation model was wanted"):
        small_segmenter(kind="segqc")


def test_normalising_ignores_scale_and_offset_and_bears_a_flat_scan() -> None:
    array = np.random.default_rng(0).normal(size=(8, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(normalise(array * 300 + 1000), normalise(array), atol=1e-3)
    assert not normalise(np.full((4, 4, 4), 7, np.float32)).any()
