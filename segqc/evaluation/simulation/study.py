"""A study: which queries are compared, how the annotator works, and how the product is set; a TOML file says it.

::

    start = 5                                  # scans that are labelled before anything is trained
    budgets = [0.1, 0.3, 1.0]                  # when a round is due: shares of all slices, opened so far
    seeds = [0, 1, 2]

    [structures]
    ventricle = [1]

    [settings.training]                        # as in a dataset folder's segqc.toml
    epochs = 30

    [arms.uniform]
    strategy = "uniform-random"
    assessed = false                           # SegQC-Net is of no use to it

    [arms."worst slices"]
    strategy = "segqc"
    settings.annotation.slices = 5             # over the settings of all arms
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from segqc.errors import SegqcError
from segqc.selection import strategies
from segqc.settings import Settings, SettingsError, load_settings
from segqc.text import TextError, decode_text, first_problem

Table: TypeAlias = dict[str, JsonValue]
Share: TypeAlias = Annotated[float, Field(gt=0, le=1)]
Seed: TypeAlias = Annotated[int, Field(ge=0)]

# one annotator, who is never interrupted: what was handed out stays so, also where the study itself was
_HANDED_OUT: Final[Table] = {"lease_minutes": 500_000, "repeat_seconds": 10_000_000}


class StudyError(SegqcError):
    """A study can't be read or run."""


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AnnotatorSettings(_Frozen):
    """How well the simulated annotator works; by default whatever was opened is as the truth is afterwards.

    Attributes:
        boundary_noise_mm: the contours that it draws are displaced smoothly by up to this standard deviation.
        missed_share: of the errors in a slice, each a connected part, it leaves this share as they are.
    """

    boundary_noise_mm: float = Field(default=0.0, ge=0, le=20)
    missed_share: float = Field(default=0.0, ge=0, le=1)


class MinutesModel(_Frozen):
    """What an annotator's work takes, in minutes: an assumption to compare by, not a measurement.

    Attributes:
        scan: to open a scan, find one's way in it, and submit it.
        slice: to look at a slice.
        changed_slice: to change something in a slice.
    """

    scan: float = Field(default=0.5, ge=0)
    slice: float = Field(default=0.05, ge=0)
    changed_slice: float = Field(default=0.5, ge=0)

    def minutes(self, scans: int, slices: int, changed_slices: int) -> float:
        """What so much work takes."""
        return self.scan * scans + self.slice * slices + self.changed_slice * changed_slices


class Arm(_Frozen):
    """A way to annotate that is compared with others.

    Attributes:
        strategy: what chooses the scans.
        assessed: whether rounds are whole ones, with SegQC-Net and its assessments of what waits; without it a strategy
            that does not need them is studied in much less time.
        settings: of the dataset folder, over those of the study.
    """

    strategy: str
    assessed: bool = True
    settings: Table = Field(default_factory=dict)


class Study(_Frozen):
    """A study; see the module.

    Attributes:
        structures: names and label values.
        pool, test: the parts of the data set's ``splits.json`` that are annotated, and that masks are measured on.
        max_scans: at most so many scans of each part; None for all.
        start: scans that are labelled, wholly, before anything is trained.
        budgets: of the slices of the pool, the shares at which a round is due, ascending; the first is at the start,
            and what is annotated ends at the last.
        seeds: of the draw of the first scans, the trainings and the suggestions.
        accepted_dice: a pseudo-label with a lower true Dice of its worst structure is a bad one.
        annotator: how well it works.
        minutes: what its work takes.
        settings: of the dataset folder.
        arms: what is compared, by name.
    """

    structures: dict[str, tuple[int, ...]] = Field(min_length=1)
    pool: str = "train"
    test: str = "test"
    max_scans: int | None = Field(default=None, ge=1)
    start: int = Field(default=5, ge=0)
    budgets: tuple[Share, ...] = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
    seeds: tuple[Seed, ...] = Field(default=(0, 1, 2), min_length=1)
    accepted_dice: float = Field(default=0.75, ge=0, le=1)
    annotator: AnnotatorSettings = AnnotatorSettings()
    minutes: MinutesModel = MinutesModel()
    settings: Table = Field(default_factory=dict)
    arms: dict[str, Arm] = Field(min_length=1)

    @field_validator("budgets")
    @classmethod
    def _ascending(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or any(a >= b for a, b in itertools.pairwise(value)):
            raise ValueError("budgets must be shares of the slices, each above the one before")
        return value

    @field_validator("arms")
    @classmethod
    def _folders_of_their_own(cls, value: dict[str, Arm]) -> dict[str, Arm]:
        first: dict[str, str] = {}
        for name in value:
            if (other := first.setdefault(plain_name(name), name)) != name:
                raise ValueError(f"the arms {other!r} and {name!r} would have one folder; rename one of them")
        return value

    @classmethod
    def read(cls, path: Path) -> Study:
        """Read a study's file.

        Raises:
            StudyError: if it can't be read, is no TOML, or says what can't be meant, also of a single arm.
        """
        try:
            study = cls.model_validate(tomllib.loads(decode_text(path.read_bytes())))
        except OSError as error:
            raise StudyError(f"{path}: cannot be read ({error.strerror})") from error
        except ValidationError as error:
            raise StudyError(f"{path}: {first_problem(error.errors())}") from error
        except (TextError, ValueError) as error:
            raise StudyError(f"{path}: not a TOML file: {error}") from error
        for name, arm in study.arms.items():  # before the first one has taken hours
            if arm.strategy not in strategies():
                there = ", ".join(strategies())
                raise StudyError(f"{path}: the arm {name!r}: there is no strategy {arm.strategy!r}; there are {there}")
            try:
                settings = study.settings_of(None, arm, study.seeds[0])
            except SettingsError as error:
                raise StudyError(f"{path}: the arm {name!r}: {error}") from error
            by_rounds = {
                f"the strategy {arm.strategy!r}": strategies()[arm.strategy].needs_rounds,
                "'annotation.slices'": settings.annotation.slices > 0,
                "'pseudo_labels.mode'": settings.pseudo_labels.mode != "off",
            }
            if not arm.assessed and (needing := [what for what, needs in by_rounds.items() if needs]):
                raise StudyError(
                    f"{path}: the arm {name!r}: leave 'assessed = false' away, as {needing[0]} needs whole rounds"
                )
        return study

    def only(self, name: str, seed: int) -> Study:
        """The study with one of its arms and one seed.

        Raises:
            StudyError: if there is no arm of this name.
        """
        return self.model_copy(update={"arms": {name: self.arm(name)}, "seeds": (seed,)})

    def arm(self, name: str) -> Arm:
        """An arm by its name.

        Raises:
            StudyError: if there is none of this name.
        """
        if name not in self.arms:
            raise StudyError(f"there is no arm {name!r}; there are {', '.join(map(repr, self.arms))}")
        return self.arms[name]

    def settings_of(self, folder: Path | None, arm: Arm, seed: int) -> Settings:
        """The settings of an arm's dataset folder; None where there is none yet.

        Raises:
            SettingsError: if one is unknown or can't be used.
        """
        # a simulated annotator's masks are judged by nobody
        of_seed: Table = {"training": {"seed": seed, "people_epochs": 0}, "annotation": {**_HANDED_OUT, "seed": seed}}
        overrides = _over(_over(self.settings, arm.settings), of_seed)
        return load_settings(folder, overrides={**overrides, "structures": self.structures})


def plain_name(arm: str) -> str:
    """An arm's name as a part of its folder's."""
    return "".join(letter if letter.isalnum() else "-" for letter in arm.lower())


def _over(table: Mapping[str, JsonValue], other: Mapping[str, JsonValue]) -> Table:
    """A table with another one's values over it, table by table."""
    merged = dict(table)
    for key, value in other.items():
        below = merged.get(key)
        merged[key] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
