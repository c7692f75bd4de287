"""The device that networks run on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from segqc.errors import SegqcError
from segqc.networks.plan import Triple


class DeviceMemoryError(SegqcError):
    """The GPU has not enough memory."""

    status = 503


def device_of_choice() -> torch.device:
    """Return the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def name_of_device() -> str:
    """Name the GPU where there is one, for who reads how long something took."""
    device = device_of_choice()
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for bfloat16; without them it would be slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


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
