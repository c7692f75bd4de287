from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from segqc.networks.augmentation import Member, tta_group


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(shape, dtype=np.float32))


@pytest.mark.parametrize("shape", [(4, 5, 3), (2, 4, 5, 3), (2, 3, 4, 5, 3), (1, 1, 1)])
def test_inverting_gives_the_image_back_exactly(shape: tuple[int, ...]) -> None:
    x = image(*shape)
    for member in tta_group():
        assert torch.equal(member.invert(member.apply(x)), x), member.name


def test_a_map_of_an_augmented_image_comes_back_to_the_image_s_frame() -> None:
    x = image(2, 4, 5, 3)
    for member in tta_group(gammas=(0.7,)):
        made = (member.apply(x) > 0.5).float().sum(dim=0, keepdim=True)  # a network: two channels in, one out
        spatial = Member("", member.flips, member.transpose)
        contrast = Member("", gamma=member.gamma)
        wanted = (contrast.apply(x) > 0.5).float().sum(dim=0, keepdim=True)
        assert torch.equal(member.invert(made), wanted), member.name
        assert torch.equal(spatial.apply(contrast.apply(x)), member.apply(x))


def test_the_group_has_the_eight_symmetries_of_the_square() -> None:
    x = image(4, 4, 3)
    wanted = [torch.rot90(y, k, (0, 1)) for y in (x, x.transpose(0, 1)) for k in range(4)]
    got = [member.apply(x) for member in tta_group()]
    assert len(got) == 8
    assert torch.equal(got[0], x)
    for w in wanted:
        assert sum(torch.equal(w, g) for g in got) == 1


@pytest.mark.parametrize(("transposes", "size"), [(True, 8), (False, 4)])
def test_the_group_is_closed(transposes: bool, size: int) -> None:
    x = image(4, 4, 2)
    group = tta_group(transposes=transposes)
    images = [member.apply(x) for member in group]
    assert len(group) == size
    for a, b in itertools.product(group, repeat=2):
        both = b.apply(a.apply(x))
        assert sum(torch.equal(both, i) for i in images) == 1, (a.name, b.name)


def test_members_are_distinct_and_the_identity_is_first() -> None:
    group = tta_group(gammas=(0.7, 1.5))
    assert len(group) == 24
    assert group[0] == Member("identity")
    assert len({member.name for member in group}) == 24
    x = image(4, 4, 2)
    results = [member.apply(x) for member in group]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(results, 2))


def test_the_through_plane_axis_is_never_touched() -> None:
    x = torch.arange(4.0).expand(3, 3, 4)
    for member in tta_group():
        assert torch.equal(member.apply(x), x), member.name


def test_transposes_exchange_the_in_plane_shape() -> None:
    assert Member("t", transpose=True).apply(image(2, 4, 5, 3)).shape == (2, 5, 4, 3)


def test_contrast_is_a_gamma_on_each_channel_s_own_range() -> None:
    x = torch.stack([image(4, 5, 3) * 7 - 2, image(4, 5, 3, seed=1) * 0.1 + 40])
    got = Member("g", gamma=2.0).apply(x.clone())
    for channel, result in zip(x.numpy(), got.numpy(), strict=True):
        low, high = channel.min(), channel.max()
        wanted = low + (high - low) * ((channel - low) / (high - low)) ** 2
        np.testing.assert_allclose(result, wanted, rtol=1e-5)
        np.testing.assert_allclose([result.min(), result.max()], [low, high], rtol=1e-6)


def test_contrast_leaves_masks_constants_and_its_argument_alone() -> None:
    gamma = Member("g", gamma=0.6)
    mask = (image(4, 5, 3) > 0.5).float()
    assert torch.equal(gamma.apply(mask), mask)
    assert torch.equal(gamma.apply(torch.full((4, 5, 3), 3.0)), torch.full((4, 5, 3), 3.0))
    x = image(4, 5, 3)
    gamma.apply(x)
    assert torch.equal(x, image(4, 5, 3))


@pytest.mark.parametrize("gammas", [(0.0,), (-1.0,), (1.0,), (0.7, 0.7)])
def test_contrasts_that_make_no_new_member_are_refused(gammas: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="gammas"):
        tta_group(gammas=gammas)
