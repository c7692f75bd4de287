"""MONAI Label's settings, typed: those of them that this server reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from monailabel.config import settings as _settings


class Config(Protocol):
    """What the environment says, under MONAI Label's own names; `segqc.server.serve` sets it."""

    MONAI_LABEL_STUDIES: str
    MONAI_LABEL_SERVER_PORT: int
    MONAI_LABEL_APP_CONF: Mapping[str, str]
    MONAI_LABEL_AUTH_ENABLE: bool


settings: Config = _settings
