"""A trained network with its card: loaded, saved and run."""

from __future__ import annotations

import functools
import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from segqc.networks.backends import Backend, choose_backend
from segqc.networks.cache import LatestCache
from segqc.networks.card import CARDS, ModelCard, NetworkName
from segqc.networks.device import device_of_choice
from segqc.networks.encoder import encoder_features, encoders, part_around, part_extent
from segqc.networks.inference import Predictor, Window, canonical_scan, sliding_window
from segqc.networks.model_file import ModelError as ModelError
from segqc.networks.model_file import model_status
from segqc.networks.unet import MeanOfNetworks, StemUNet, Weights
from segqc.quality.metrics import Values
from segqc.types import BackendName, BoolArray, Structure
from segqc.volumes import CanonicalFrame, Volume, atomic_write, canonical_frame

_FRAMES: LatestCache[CanonicalFrame] = LatestCache()  # SegQC-Net's is mostly the segmenter's
_FORMAT = 8  # 6: the Dice of each validation scan; 7: a network for people's masks; 8: its boxes' least evidence


class TrainedNetwork:
    """A network with its card: what `Segmenter` and `Assessor` share."""

    kind: NetworkName

    def __init__(self, card: ModelCard, network: nn.Module, backend: BackendName = "pytorch") -> None:
        if card.kind != self.kind:
            raise ModelError(f"this is a {card.kind} model; a {self.kind} model was wanted")
        self.card = card
        self.device = device_of_choice()
        self.network = network.to(self.device).eval()
        self.wanted_backend = backend
        self.version = version_of(card, network)

    @functools.cached_property
    def backend(self) -> Backend:
        """What computes it, made ready and checked when it is first asked for.

        Raises:
            BackendError: if the backend is not there, or wrong on this machine.
        """
        return choose_backend(self.network, self.card.plan, self.device, self.wanted_backend)

    def ready(self) -> Self:
        """Itself, once its backend is ready; errors as of `backend`."""
        _ = self.backend
        return self

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The structures it knows."""
        return self.card.structures

    @property
    def values(self) -> tuple[int, ...]:
        """The label values it knows, background (0) left out."""
        return self.card.values

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All networks of its file: the card's own, and that of the card for people's masks where it has one."""
        return (self.network,)

    def save(self, path: Path) -> None:
        """Write card and weights into one file, atomically."""
        states = [network.state_dict() for network in self.networks]
        weights = [{name: tensor.detach().cpu() for name, tensor in state.items()} for state in states]
        with atomic_write(path) as temporary:
            torch.save({"segqc": _FORMAT, "card": CARDS.dump_json(self.card).decode(), "weights": weights}, temporary)

    @classmethod
    def _read(cls, path: Path) -> tuple[ModelCard, list[nn.Module]]:
        """The card, and the networks in the order of `networks`."""
        if model_status(path) is None:
            raise ModelError(f"{path}: no such model file; train the network first (segqc train --help)")
        try:
            content = load_content(path)
            if content["segqc"] != _FORMAT:
                raise ModelError(
                    f"{path}: model format {content['segqc']}; this version reads format {_FORMAT}: train it again"
                )
            card = CARDS.validate_json(content["card"])
            if card.kind != cls.kind:
                raise ModelError(f"{path}: is a {card.kind} model; a {cls.kind} model was wanted: name or train that")
            cards = [card] if card.people is None else [card, card.people]
            networks = [_network(of, weights) for of, weights in zip(cards, content["weights"], strict=True)]
            if not all(bool(t.isfinite().all()) for network in networks for t in network.state_dict().values()):
                raise ModelError(f"{path}: holds weights that are no finite numbers; train it again or restore a copy")
        except ModelError:
            raise
        except PermissionError as error:
            raise ModelError(f"{path}: cannot be read (permission denied); let SegQC read this file") from error
        except Exception as error:  # torch.load raises many kinds on foreign and damaged files, without a common base
            raise ModelError(
                f"{path}: not a readable SegQC model file ({type(error).__name__}); train it again or restore a copy"
            ) from error
        return card, networks

    def frame(self, scan: Volume) -> CanonicalFrame:
        """The canonical frame in which the network sees a scan."""
        spacing = self.card.plan.spacing_mm
        known = _FRAMES.get(scan, spacing)
        return _FRAMES.keep(canonical_frame(scan, spacing_mm=spacing), scan, spacing) if known is None else known

    def features(self, scan: Volume, mask: BoolArray) -> Values | None:
        """What the encoders of its networks make of a scan around a mask, see `segqc.networks.encoder`.

        Args:
            scan: the scan.
            mask: where the structures are, on the scan's grid, (n0, n1, n2).

        Returns:
            (networks, features); None where the network is of a kind that has none.
        """
        networks = encoders(self.network)
        if not networks:
            return None
        frame, plan = self.frame(scan), self.card.plan
        part = part_around(canonical_scan(scan, frame), mask, frame, part_extent(plan))
        return encoder_features(networks, part.to(self.device), plan.in_channels)

    def run(
        self,
        x: torch.Tensor,
        predictor: Predictor | None = None,
        *,
        windows: Sequence[Window] | None = None,
        elsewhere: Sequence[float] = (),
    ) -> torch.Tensor:
        """Logits of a batch (N, C, a, b, c), see `sliding_window`; the backend's own unless a predictor is given."""
        patch = self.card.plan.patch
        return sliding_window(predictor or self.backend, x, patch, self.device, windows=windows, elsewhere=elsewhere)


def _network(card: ModelCard, weights: Weights) -> nn.Module:
    members = [StemUNet(card.plan) for _ in range(card.members)]
    network = members[0] if card.members == 1 else MeanOfNetworks(members)
    network.load_state_dict(weights)
    return network


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


def version_of(card: ModelCard, network: nn.Module, *, beside: str = "") -> str:
    """The version of a network, a function of its weights and of what its card says of its answers.

    Args:
        card: its card; that of a network for people's masks has no part in it.
        network: the network.
        beside: the version of a network that it belongs to.
    """
    # these say how sure the estimates are, and leave them as they are: new ones make no other network
    intervals = {"__all__": {"kinds": {"__all__": {"intervals"}}}}
    digest = hashlib.sha256(
        CARDS.dump_json(
            card,
            exclude={"calibration": intervals, "report": True, "unlikeness": True, "validation": True, "people": True},
        )
        + beside.encode()
    )
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]
