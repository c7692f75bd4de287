"""The anisotropic U-Net of a plan, and the mean of several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from monai.networks.nets import DynUNet
from torch import nn

from segqc.networks.plan import NetworkPlan, Triple

Weights: TypeAlias = dict[str, torch.Tensor]


def space_to_depth(x: torch.Tensor, factors: Triple) -> torch.Tensor:
    """Move ``factors`` blocks of voxels into channels: (N, C, a, b, c) -> (N, C * prod, a/f0, b/f1, c/f2)."""
    n, c, *shape = x.shape
    f, (a, b, d) = factors, [s // k for s, k in zip(shape, factors, strict=True)]
    x = x.reshape(n, c, a, f[0], b, f[1], d, f[2]).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(n, c * math.prod(f), a, b, d)


def depth_to_space(x: torch.Tensor, factors: Triple) -> torch.Tensor:
    """Undo `space_to_depth`."""
    n, c, a, b, d = x.shape
    f = factors
    x = x.reshape(n, c // math.prod(f), f[0], f[1], f[2], a, b, d).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(n, c // math.prod(f), a * f[0], b * f[1], d * f[2])


class _Conv3d(nn.Conv3d):
    """A convolution that a CPU always computes by oneDNN, when it infers.

    PyTorch leaves small inputs, as a single window is in the lower levels, to code that takes three times as long.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, channels, a, b, c) of a batch (N, channels, a, b, c)."""
        plain = (
            input.device.type != "cpu"
            or torch.compiler.is_compiling()
            or input.dtype != torch.float32
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
            or not torch.backends.mkldnn.is_available()
        )
        if plain:
            return super().forward(input)
        padding = [int(n) for n in self.padding]
        return torch.mkldnn_convolution(input, self.weight, self.bias, padding, self.stride, self.dilation, self.groups)


class StemUNet(nn.Module):
    """MONAI's DynUNet behind a space-to-depth stem; returns logits of the input's spatial shape.

    The fine voxels of a coarse one have weights of their own. Until training has brought these together they disagree,
    and masks are checkerboards; so a last small convolution, in the fine grid, starts as a binomial filter, which takes
    out just that pattern, and learns with the rest.
    """

    def __init__(self, plan: NetworkPlan) -> None:
        super().__init__()
        self.stem = plan.stem
        blocks = math.prod(plan.stem)
        self.unet = DynUNet(
            spatial_dims=3,
            in_channels=plan.in_channels * blocks,
            out_channels=plan.out_channels * blocks,
            kernel_size=plan.kernels,
            strides=plan.strides,
            upsample_kernel_size=plan.strides[1:],
            filters=plan.filters,
        )
        for module in self.unet.modules():
            if type(module) is nn.Conv3d:
                module.__class__ = _Conv3d
        self.smoothing = None if blocks == 1 else _binomial_filter(plan.out_channels, plan.stem)
        self.mask_skip = MaskSkip(plan.out_channels) if plan.mask_skip else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, out_channels, a, b, c) of a batch (N, in_channels, a, b, c)."""
        if self.smoothing is None:
            logits = torch.as_tensor(self.unet(x))
        else:
            fine = depth_to_space(self.unet(space_to_depth(x, self.stem)), self.stem)
            logits = torch.as_tensor(self.smoothing(fine))
        return logits if self.mask_skip is None else logits + self.mask_skip(x[:, 1:])

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What each level of the encoder makes of a batch (N, in_channels, a, b, c), the finest first."""
        levels, out = [], space_to_depth(x, self.stem)
        for block in (self.unet.input_block, *self.unet.downsamples, self.unet.bottleneck):
            out = block(out)
            levels.append(out)
        return levels


class MaskSkip(nn.Module):
    """What a mask says of the truth by itself: s (2M - 1), with an s learnt for each structure.

    Behind it the network has to say only where it disagrees with the mask: of a mask that is mostly right it learns
    what is wrong, and not the truth anew.
    """

    FIRST = 3.0  # the truth's logit in a mask that is mostly right

    def __init__(self, structures: int) -> None:
        super().__init__()
        self.trust = nn.Parameter(torch.full((structures,), self.FIRST))

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        """Logits of the truth (N, L, a, b, c) of masks (N, L, a, b, c)."""
        return torch.as_tensor(self.trust.reshape(1, -1, 1, 1, 1) * (2 * masks - 1))


class _EdgePaddedConv(nn.Conv3d):
    """A convolution of 1 or 3 voxels along each axis that repeats the edge voxels around its input.

    What ``padding_mode="replicate"`` does, but that has a gradient on GPUs that differs from run to run.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, channels, a, b, c) of a batch (N, channels, a, b, c)."""
        x = input
        for axis in (axis for axis, size in enumerate(self.kernel_size, start=2) if size > 1):
            x = torch.cat([x.narrow(axis, 0, 1), x, x.narrow(axis, x.shape[axis] - 1, 1)], dim=axis)
        return super().forward(x)


def _binomial_filter(channels: int, stem: Triple) -> _EdgePaddedConv:
    """A convolution that starts as [1, 2, 1] / 4 along the axes of the stem, each channel by itself."""
    size = (3 if stem[0] > 1 else 1, 3 if stem[1] > 1 else 1, 3 if stem[2] > 1 else 1)
    filtering = _EdgePaddedConv(channels, channels, size)
    a, b, c = (torch.tensor([1.0, 2.0, 1.0]) / 4 if n == 3 else torch.ones(1) for n in size)
    with torch.no_grad():
        filtering.weight.copy_(torch.einsum("ij,a,b,c->ijabc", torch.eye(channels), a, b, c))
        filtering.get_parameter("bias").zero_()
    return filtering


class MeanOfNetworks(nn.Module):
    """Networks of one plan that answer with the mean of their logits."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mean logits (N, out_channels, a, b, c) of a batch (N, in_channels, a, b, c)."""
        total = self.members[0](x)
        for member in self.members[1:]:
            total = total + member(x)
        return torch.as_tensor(total / len(self.members))


def build_network(plan: NetworkPlan, *, seed: int = 0, first_bias: float | None = None) -> StemUNet:
    """Build the network of a plan; its first weights are a function of the seed alone.

    ``first_bias`` sets the bias of all output logits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = StemUNet(plan)
    if first_bias is not None:
        torch.nn.init.constant_(network.unet.output_block.conv.conv.bias, first_bias)
    return network
