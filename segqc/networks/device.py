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
