"""What computes a network: PyTorch in float32 everywhere, bfloat16 and OpenVINO where they are there and right."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn

from segqc.errors import SegqcError
from segqc.networks.device import has_bfloat16, in_device_memory
from segqc.networks.plan import NetworkPlan
from segqc.networks.unet import MeanOfNetworks, StemUNet
from segqc.types import BackendName, ComputeName

logger = logging.getLogger(__name__)

TOLERANCES: Final[dict[ComputeName, float]] = {
    "openvino": 1e-3,
    "openvino-bfloat16": 0.1,
    "pytorch-bfloat16": 0.1,
    "compile": 1e-3,
}
"""The largest difference from PyTorch in float32, of a logit, in standard deviations of the logits."""


class BackendError(SegqcError):
    """A backend is not installed, does not go with this machine, or computes something else than PyTorch does."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A network made ready to answer.

    Attributes:
        name: what computes.
        compute: logits (N, out_channels, a, b, c) of a batch of windows (N, in_channels, a, b, c) on the device.
    """

    name: ComputeName
    compute: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of a batch of windows."""
        return self.compute(x)


def choose_backend(network: nn.Module, plan: NetworkPlan, device: torch.device, wanted: BackendName) -> Backend:
    """Make a network ready, by the backend that is wanted, and check it.

    "auto" takes the first one that is there and right: on a CPU OpenVINO, in bfloat16 where the CPU has instructions
    for it; else PyTorch, in bfloat16 where the CPU or GPU has. "compile", PyTorch's compiler, is never taken: it
    works for half a minute on each network and shape of windows. Each is compared with PyTorch in float32 on noise of
    the plan's patch, by `TOLERANCES`.

    Args:
        network: the network, on the device.
        plan: its plan.
        device: where it is.
        wanted: the backend.

    Raises:
        BackendError: if it is not there, or wrong on this machine; never with "auto".
        DeviceMemoryError: if the GPU's memory does not hold the patch.
    """
    if wanted == "pytorch":
        return Backend("pytorch", _one_by_one(network))
    if wanted != "auto":
        return _checked(wanted, network, plan, device)
    names: list[ComputeName] = ["openvino-bfloat16", "openvino", "pytorch-bfloat16"]
    for name in names:
        if _missing(name, network, device) is None:
            try:
                return _checked(name, network, plan, device)
            except BackendError as error:
                logger.warning("%s", error)
    return Backend("pytorch", _one_by_one(network))


def _checked(name: ComputeName, network: nn.Module, plan: NetworkPlan, device: torch.device) -> Backend:
    missing = _missing(name, network, device)
    if missing is not None:
        raise BackendError(f"the inference backend {name!r} {missing}; choose 'auto' or 'pytorch' in [inference]")
    bfloat16 = name.endswith("-bfloat16")
    if name.startswith("openvino"):
        from segqc.networks.openvino import OpenVinoNetwork  # the extra may not be installed

        assert isinstance(network, StemUNet | MeanOfNetworks)
        threads = torch.get_num_threads()
        backend = Backend(name, OpenVinoNetwork(network, plan.in_channels, bfloat16=bfloat16, threads=threads))
    elif name == "compile":
        backend = Backend(name, _one_by_one(torch.compile(network, dynamic=False, options={"freezing": True})))
    else:
        backend = Backend(name, _in_bfloat16(network, device))
    try:
        difference = difference_from_float32(backend, network, plan, device)
    except RuntimeError as error:
        if name != "compile":
            raise
        raise BackendError(
            f"the inference backend 'compile' does not compile this network here ({type(error).__name__}); choose "
            "'auto' or 'pytorch' in [inference]"
        ) from error
    if not difference <= TOLERANCES[name]:  # which NaN is not, either
        raise BackendError(
            f"the inference backend {name!r} computes wrong logits on this machine (they differ from PyTorch's in "
            f"float32 by {difference:.2g} standard deviations); choose 'auto' or 'pytorch' in [inference]"
        )
    return backend


def _missing(name: ComputeName, network: nn.Module, device: torch.device) -> str | None:
    """What a backend lacks here, as the rest of a sentence."""
    if name.endswith("-bfloat16") and not has_bfloat16(device):
        return "needs instructions for bfloat16, which this machine does not have"
    if name == "compile":
        if device.type == "cpu":
            return None if shutil.which(os.environ.get("CXX", "g++")) else "needs a C++ compiler (g++, or $CXX)"
        return None if importlib.util.find_spec("triton") else "needs triton (pip install triton)"
    if not name.startswith("openvino"):
        return None
    if device.type != "cpu":
        return "is for CPUs, and this machine has a GPU"
    if not isinstance(network, StemUNet | MeanOfNetworks):
        return "does not know this kind of network"
    if importlib.util.find_spec("openvino") is None:
        return "is not installed (pip install 'segqc[openvino]')"
    return None


def difference_from_float32(backend: Backend, network: nn.Module, plan: NetworkPlan, device: torch.device) -> float:
    """The largest difference of a logit from PyTorch's in float32, in standard deviations, on noise of the patch."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((1, plan.in_channels, *plan.patch), generator=generator).to(device)
    with torch.inference_mode(), in_device_memory(plan.patch):
        expected, got = network(noise).float(), backend(noise).float()
    return float((got - expected).abs().max() / expected.std().clamp(min=1e-6))


def _one_by_one(network: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A CPU computes windows one after the other: together they would not stay in its caches."""

    def compute(x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            return torch.as_tensor(network(x))
        return torch.cat([network(window) for window in x.split(1)])

    return compute


def _in_bfloat16(network: nn.Module, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    def compute(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return torch.as_tensor(network(x)).float()

    return compute
