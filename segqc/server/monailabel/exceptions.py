"""The errors that MONAI Label's interfaces raise."""

from __future__ import annotations

from monailabel.interfaces.exception import (
    ImageNotFoundException,
    LabelNotFoundException,
    MONAILabelError,
    MONAILabelException,
)

__all__ = ["ImageNotFoundException", "LabelNotFoundException", "MONAILabelError", "MONAILabelException"]
