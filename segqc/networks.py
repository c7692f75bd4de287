"""Plan, build, store and run the anisotropic U-Nets: one plan function for the segmentation network and SegQC-Net."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import DynUNet
from pydantic import TypeAdapter
from pydantic.main import IncEx
from torch import nn

from segqc.intervals import StructureIntervals
from segqc.metrics import LinearCalibration
from segqc.types import BoolArray, FloatArray, Structure
from segqc.volumes import CanonicalFrame, Volume, atomic_write, canonical_frame, to_canonical

NetworkSize: TypeAlias = Literal["small", "medium", "paper"]
Kind: TypeAlias = Literal["segmentation", "segqc"]
OutputForm: TypeAlias = Literal["truth", "direct"]
Triple: TypeAlias = tuple[int, int, int]
Spacing: TypeAlias = tuple[float, float, float]

_FORMAT = 2  # 2: with a smoothing layer behind the stem
_NEAR_ISOTROPIC = 2.0  # axes within this factor of the finest spacing are pooled together (nnU-Net's rule)


_VOXELS_AT_ONCE = 400_000  # of windows that go through a network together; a larger window goes alone
_LEAST_LEVELS = 3  # DynUNet's own minimum


class ModelError(ValueError):
    """A model file is missing, foreign or damaged."""


class DeviceMemoryError(RuntimeError):
    """The GPU has not enough memory."""


@dataclass(frozen=True, slots=True)
class NetworkPlan:
    """What a network looks like, in the canonical frame (through-plane axis last).

    ``stem`` is a space-to-depth factor per axis in front of the U-Net (and its inverse behind it): the cheap way to a
    large field of view on a CPU. ``(1, 1, 1)`` means none.
    """

    in_channels: int
    out_channels: int
    spacing_mm: Spacing
    patch: Triple
    stem: Triple
    kernels: tuple[Triple, ...]
    strides: tuple[Triple, ...]
    filters: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _SizeRule:
    base_filters: int
    max_filters: int
    levels: int
    stem: bool
    in_plane_limit: int
    patch_voxels: int


_SIZES: dict[NetworkSize, _SizeRule] = {
    "small": _SizeRule(24, 96, 3, True, 128, 112_000),
    "medium": _SizeRule(32, 256, 4, False, 256, 600_000),
    "paper": _SizeRule(32, 320, 6, False, 256, 256 * 256 * 48),
}


def _pooled_axes(spacing: Sequence[float], shape: Sequence[int]) -> Triple:
    """Factor 2 along the axes to pool next: the finest ones first, and none that would fall under 4 voxels."""
    finest = min(s for s, n in zip(spacing, shape, strict=True) if n >= 8) if max(shape) >= 8 else math.inf
    factors = [2 if n >= 8 and s < _NEAR_ISOTROPIC * finest else 1 for s, n in zip(spacing, shape, strict=True)]
    return factors[0], factors[1], factors[2]


def plan_network(
    spacing_mm: Spacing,
    shape: Triple,
    *,
    in_channels: int,
    out_channels: int,
    size: NetworkSize = "small",
    patch: Triple | None = None,
) -> NetworkPlan:
    """Plan a network for scans of a typical spacing and shape, both in the canonical frame.

    In-plane axes are pooled first, until the voxel is near isotropic; a kernel is 1 along an axis as long as its
    spacing is at least twice the finest. The ``small`` plan also coarsens the in-plane spacing of large slices.

    Args:
        spacing_mm: median spacing of the training scans.
        shape: median shape of the training scans, in voxels.
        in_channels: scan, or scan and one mask per structure.
        out_channels: one per class or structure.
        size: "small" (CPU, minutes), "medium" or "paper" (the paper's blocks, section 4.2).
        patch: training patch and prediction window; by default as much of the scan as the size allows.

    Raises:
        ValueError: if a spacing or an extent is not positive.
    """
    if min(spacing_mm) <= 0 or min(shape) <= 0:
        raise ValueError(f"spacing {spacing_mm} and shape {shape} must be positive")
    rule = _SIZES[size]
    coarsen = max(1.0, max(shape[:2]) / rule.in_plane_limit)
    spacing = (spacing_mm[0] * coarsen, spacing_mm[1] * coarsen, spacing_mm[2])
    extent = (round(shape[0] / coarsen), round(shape[1] / coarsen), shape[2])
    window = list(patch or extent)
    while patch is None and math.prod(window) > rule.patch_voxels:
        longest = int(np.argmax([n * s for n, s in zip(window, spacing, strict=True)]))
        window[longest] = math.ceil(window[longest] * 0.9) - 1

    stem = _pooled_axes(spacing, window) if rule.stem else (1, 1, 1)
    current = [s * f for s, f in zip(spacing, stem, strict=True)]
    extent_now = [max(1, n // f) for n, f in zip(window, stem, strict=True)]
    strides: list[Triple] = [(1, 1, 1)]
    kernels: list[Triple] = [_kernel(current)]
    while len(strides) < rule.levels:
        stride = _pooled_axes(current, extent_now)
        if max(stride) == 1:
            if len(strides) >= _LEAST_LEVELS:
                break
            stride = (2, 2, 1)  # a tiny scan: the patch grows to fit
        current = [s * f for s, f in zip(current, stride, strict=True)]
        extent_now = [max(1, n // f) for n, f in zip(extent_now, stride, strict=True)]
        strides.append(stride)
        kernels.append(_kernel(current))
    total = np.prod([stem, *strides], axis=0)
    fitted = tuple(int(math.ceil(n / t) * t) for n, t in zip(window, total, strict=True))
    filters = tuple(min(rule.max_filters, rule.base_filters * 2**level) for level in range(len(strides)))
    return NetworkPlan(
        in_channels=in_channels,
        out_channels=out_channels,
        spacing_mm=spacing,
        patch=(fitted[0], fitted[1], fitted[2]),
        stem=stem,
        kernels=tuple(kernels),
        strides=tuple(strides),
        filters=filters,
    )


def _kernel(spacing: Sequence[float]) -> Triple:
    finest = min(spacing)
    k = [3 if s < _NEAR_ISOTROPIC * finest else 1 for s in spacing]
    return k[0], k[1], k[2]


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
        self.smoothing = None if blocks == 1 else _binomial_filter(plan.out_channels, plan.stem)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, out_channels, a, b, c) of a batch (N, in_channels, a, b, c)."""
        if self.smoothing is None:
            return torch.as_tensor(self.unet(x))
        fine = depth_to_space(self.unet(space_to_depth(x, self.stem)), self.stem)
        return torch.as_tensor(self.smoothing(fine))


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


@dataclass(frozen=True, slots=True)
class StructureCalibration:
    """Linear calibration of the four 3D metrics of one structure, and the largest error box seen in training.

    ``intervals`` is None in model files from before there were intervals. They are no part of a model's version: they
    are made anew from audit draws, and the estimates stay what they were.
    """

    dice: LinearCalibration
    iou: LinearCalibration
    arvd: LinearCalibration
    rvd: LinearCalibration
    largest_box_mm2: float | None
    intervals: StructureIntervals | None = None


@dataclass(frozen=True, slots=True)
class MapCalibration:
    """Platt scaling of the network's logits of one structure, before they are read as probabilities."""

    scale: float = 1.0
    shift: float = 0.0

    def apply(self, logits: FloatArray) -> FloatArray:
        """The calibrated logits, of any shape."""
        return np.asarray(np.float32(self.scale) * logits + np.float32(self.shift), np.float32)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """Everything about a model but its weights; it lies in the model file, so that the file alone is enough.

    ``seen`` names the patients whose labels the network, or a network it was started from, has learnt from.
    ``members`` networks of the plan answer together, with the mean of their logits. With ``average_flips`` the answer
    is the mean over in-plane flips; with ``hide_mask`` half of these are looked at without the mask.
    ``map_calibration`` has one entry per structure, or none: then the logits are taken as they are.
    """

    kind: Kind
    plan: NetworkPlan
    structures: tuple[Structure, ...]
    values: tuple[int, ...]
    seen: tuple[str, ...]
    output_form: OutputForm = "truth"
    average_flips: bool = False
    hide_mask: bool = False
    transposes: bool = False
    calibration: tuple[StructureCalibration, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    members: int = 1
    map_calibration: tuple[MapCalibration, ...] = ()


_CARDS: TypeAdapter[ModelCard] = TypeAdapter(ModelCard)


def device_of_choice() -> torch.device:
    """Return the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name_of_device() -> str:
    """Name the GPU where there is one, for who reads how long something took."""
    device = device_of_choice()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"


@contextlib.contextmanager
def in_device_memory(patch: Triple) -> Iterator[None]:
    """Compute on patches of a size.

    Raises:
        DeviceMemoryError: if the GPU's memory does not hold them.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the GPU's memory does not hold patches of {' x '.join(map(str, patch))} voxels: end other programs on "
            "it, choose a smaller batch, patch or size of the networks in segqc.toml, or compute without a GPU "
            "(CUDA_VISIBLE_DEVICES=)"
        ) from error


def model_status(path: Path) -> os.stat_result | None:
    """What the file system knows of a model file; None where there is none.

    Raises:
        ModelError: if something else lies there, or nobody can see what.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise ModelError(
                f"{path}: is a link to a file that is not there; mend it, or remove it and train the network again"
            ) from None
        return None
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise ModelError(f"{path}: cannot be read ({reason}); let SegQC read this file and its folder") from error
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "something else"
        raise ModelError(f"{path}: is {what}, not a model file; remove it and train the network again")
    return status


class TrainedNetwork:
    """A network with its card: what `Segmenter` and `Assessor` share."""

    kind: Kind

    def __init__(self, card: ModelCard, network: nn.Module) -> None:
        if card.kind != self.kind:
            raise ModelError(f"this is a {card.kind} model; a {self.kind} model was wanted")
        self.card = card
        self.device = device_of_choice()
        self.network = network.to(self.device).eval()
        self.version = _version(card, network)

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The structures it knows."""
        return self.card.structures

    @property
    def values(self) -> tuple[int, ...]:
        """The label values it knows, background (0) left out."""
        return self.card.values

    def save(self, path: Path) -> None:
        """Write card and weights into one file, atomically."""
        state = {name: tensor.detach().cpu() for name, tensor in self.network.state_dict().items()}
        with atomic_write(path) as temporary:
            torch.save({"segqc": _FORMAT, "card": _CARDS.dump_json(self.card).decode(), "weights": state}, temporary)

    @classmethod
    def _read(cls, path: Path) -> tuple[ModelCard, nn.Module]:
        if model_status(path) is None:
            raise ModelError(f"{path}: no such model file; train the network first (segqc train --help)")
        try:
            content = load_content(path)
            if content["segqc"] != _FORMAT:
                raise ModelError(
                    f"{path}: model format {content['segqc']}; this version reads format {_FORMAT}: train it again"
                )
            card = _CARDS.validate_json(content["card"])
            if card.kind != cls.kind:
                raise ModelError(f"{path}: is a {card.kind} model; a {cls.kind} model was wanted")
            members = [StemUNet(card.plan) for _ in range(card.members)]
            network = members[0] if card.members == 1 else MeanOfNetworks(members)
            network.load_state_dict(content["weights"])
            if not all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values()):
                raise ModelError(f"{path}: holds weights that are no finite numbers; train it again or restore a copy")
        except ModelError:
            raise
        except PermissionError as error:
            raise ModelError(f"{path}: cannot be read (permission denied); let SegQC read this file") from error
        except Exception as error:  # torch.load raises many kinds on foreign and damaged files, without a common base
            raise ModelError(
                f"{path}: not a readable SegQC model file ({type(error).__name__}); train it again or restore a copy"
            ) from error
        return card, network

    def frame(self, scan: Volume) -> CanonicalFrame:
        """The canonical frame in which the network sees a scan."""
        return canonical_frame(scan, spacing_mm=self.card.plan.spacing_mm)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch (N, C, a, b, c), see `sliding_window`."""
        return sliding_window(self.network, x, self.card.plan.patch, self.device)


def load_content(path: Path) -> dict[str, Any]:
    """What `torch.save` wrote into a file as a dictionary; code in it is never run, and its checksums must be right.

    Raises:
        Exception: of many kinds, on foreign and damaged files.
    """
    with zipfile.ZipFile(path) as archive:  # PyTorch itself does not look at the checksums
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise ValueError("PyTorch compresses nothing")
        if (damaged := archive.testzip()) is not None:
            raise ValueError(f"{damaged} in it is damaged")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise TypeError(f"a dictionary was wanted, not {type(content).__name__}")
    return content


def windows_at_once(patch: Triple) -> int:
    """How many windows of a size go through a network together: of small ones a few, see `sliding_window`."""
    return max(1, _VOXELS_AT_ONCE // math.prod(patch))


def sliding_window(
    predictor: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, patch: Triple, device: torch.device
) -> torch.Tensor:
    """Logits of a batch (N, C, a, b, c) by sliding window, a quarter overlapping, with Gaussian blending.

    Small windows go through the network a few at a time: on a CPU PyTorch does not give the convolutions of one alone
    to oneDNN, and it takes three times as long (``benchmarks/results/windows.json``). So the last one goes twice, if it
    is left alone. Memory beside the result: these windows' activations and one count map.

    Args:
        predictor: the network, or the part of it that makes a map.
        x: the batch.
        patch: the window.
        device: where the predictor is.

    Raises:
        DeviceMemoryError: if the GPU's memory does not hold the windows.
    """
    at_once = windows_at_once(patch)

    def in_company(windows: torch.Tensor) -> torch.Tensor:
        alone = len(windows) == 1 and at_once > 1 and device.type == "cpu"
        return predictor(windows.repeat(2, 1, 1, 1, 1))[:1] if alone else predictor(windows)

    with torch.inference_mode(), in_device_memory(patch):
        logits = sliding_window_inference(
            x,
            roi_size=patch,
            sw_batch_size=at_once,
            predictor=in_company,
            overlap=0.25,
            mode="gaussian",
            sw_device=device,
            device=torch.device("cpu"),
        )
    return torch.as_tensor(logits)


def normalise(array: FloatArray) -> FloatArray:
    """Clip to the 0.5th and 99.5th percentile, subtract the mean, divide by the standard deviation."""
    sample = array[::2, ::2] if array.size > 4_000_000 else array
    low, high = np.percentile(sample, (0.5, 99.5))
    clipped = np.clip(array, low, high).astype(np.float32)
    deviation = float(clipped.std())
    clipped -= clipped.mean()
    return clipped / np.float32(deviation if deviation > 1e-6 else 1.0)


def canonical_scan(scan: Volume, frame: CanonicalFrame) -> FloatArray:
    """The scan as networks see it: in the canonical frame, normalised; shape ``frame.canonical_shape``."""
    return normalise(to_canonical(scan.array, frame, order=1).astype(np.float32))


def network_input(scan: Volume, masks: BoolArray, frame: CanonicalFrame) -> torch.Tensor:
    """Scan and masks (L, n0, n1, n2) as channels in the canonical frame: (1, 1 + L, a, b, c)."""
    image = canonical_scan(scan, frame)
    channels = to_canonical(masks.astype(np.float32), frame, order=0)
    return torch.from_numpy(np.concatenate([image[None], channels]).astype(np.float32))[None]


def _version(card: ModelCard, network: nn.Module) -> str:
    # models of before there were intervals, several members, calibrated maps, or hidden masks keep their version
    left_out: dict[str, IncEx | bool] = {"calibration": {"__all__": {"intervals"}}}
    left_out |= {"members": True} if card.members == 1 else {}
    left_out |= {} if card.map_calibration else {"map_calibration": True}
    left_out |= {} if card.hide_mask else {"hide_mask": True}
    digest = hashlib.sha256(_CARDS.dump_json(card, exclude=left_out))
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
