"""MONAI Label's own client, which 3D Slicer uses."""

from __future__ import annotations

from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

__all__ = ["MONAILabelClient", "MONAILabelClientException"]
