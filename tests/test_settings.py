"""Settings: what wins over what, and what is said of a setting that cannot be used."""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path

import pytest

from segqc.quality.boxes import BoxSettings
from segqc.quality.error_maps import ExtractionSettings
from segqc.settings import SettingsError, ignored_variables, load_settings, write_settings
from segqc.training import TrainingSettings
from segqc.types import Structure


def write(folder: Path, text: str) -> Path:
    (folder / "segqc.toml").write_text(text)
    return folder


def test_without_a_file_the_library_s_own_defaults_hold(tmp_path: Path) -> None:
    settings = load_settings(tmp_path)
    assert settings.extraction == ExtractionSettings()
    assert settings.boxes == BoxSettings()
    assert settings.training_settings("segqc") == TrainingSettings()
    assert settings.structure_list() == ()
    assert settings.server.host == "127.0.0.1"


def test_flags_win_over_the_environment_and_the_environment_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path,
        "[server]\nport = 1001\nhost = '::1'\ninference_slots = 7\n[boxes]\nmin_area_mm2 = 11\nthreshold = 0.3\n",
    )
    monkeypatch.setenv("SEGQC_SERVER__PORT", "1002")
    monkeypatch.setenv("SEGQC_SERVER__HOST", "0.0.0.0")
    monkeypatch.setenv("SEGQC_BOXES__MIN_AREA_MM2", "22")
    settings = load_settings(tmp_path, overrides={"server": {"port": 1003}})
    assert (settings.server.port, settings.server.host, settings.server.inference_slots) == (1003, "0.0.0.0", 7)
    assert settings.boxes == BoxSettings(min_area_mm2=22, threshold=0.3)


def test_a_named_file_replaces_the_folder_s(tmp_path: Path) -> None:
    write(tmp_path, "[server]\nport = 1001\ninference_slots = 7\n")
    other = tmp_path / "other.toml"
    other.write_text("[server]\nport = 1004\n")
    assert load_settings(tmp_path, config=other).server.model_dump() == {
        **load_settings().server.model_dump(),
        "port": 1004,
    }


def test_each_network_may_have_its_own_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "[training]\nepochs = 9\nseed = 3\n[training.segqc]\nepochs = 5\n")
    settings = load_settings(tmp_path)
    assert settings.training_settings("segmentation") == TrainingSettings(epochs=9, seed=3)
    assert settings.training_settings("segqc") == TrainingSettings(epochs=5, seed=3)
    monkeypatch.setenv("SEGQC_TRAINING__EPOCHS", "2")
    assert load_settings(tmp_path).training_settings("segmentation").epochs == 2


def test_structures_are_unions_of_label_values(tmp_path: Path) -> None:
    write(tmp_path, "[structures]\nhippocampus = [1, 2]\ncord = 3\n")
    settings = load_settings(tmp_path)
    assert settings.structure_list() == (Structure("hippocampus", (1, 2)), Structure("cord", (3,)))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[boxes]\nmin_area = 5", ["boxes", "min_area", "min_area_mm2"]),
        ("[boxes]\nmin_area_mm2 = 'wide'", ["boxes.min_area_mm2", "number"]),
        ("[boxes]\nthreshold = 2", ["threshold", "(0, 1]"]),
        ("[extraction]\nband = 2", ["band", "band_mm"]),
        ("[server]\nport = 99999", ["server.port", "65535"]),
        ("[server]\nprot = 80", ["[server]", "'prot'", "'port'"]),
        ("[structures]\na = [0]", ["structures", "1 to 255", "[0]"]),
        ("[structures]\na = [1, 1]", ["different", "[1, 1]"]),
        ("[structures]\na = [300]", ["300"]),
        ('[structures]\n"likely error" = [1]', ["'likely error'", "no structure"]),
        ("[structures]\nBackground = [1]", ["'Background'", "no structure"]),
        ("[structures]\nliver = [1]\nLiver = [2]", ["twice", "any case"]),
        ('[structures]\n"" = [1]', ["no name"]),
        ('[structures]\n"a\\nb" = [1]', ["no name", "one line"]),
        (f"[structures]\na = [{'9' * 5000}]", ["not a TOML file", "digits"]),
        (f"a = {'[' * 5000}{']' * 5000}", ["not a TOML file", "nested"]),
        ("sturctures = 1", ["sturctures"]),
        ("[training]\nepoch = 5", ["[training]", "'epoch'", "epochs"]),
        ("[training]\nepochs = 'many'", ["[training]", "epochs", "integer"]),
        ("[training]\nepochs = 0", ["[training]", "epochs", "from 1"]),
        ("[training]\nfolds = 0", ["[training]", "folds"]),
        ("[training]\nsegqc = 3", ["[training.segqc]", "table"]),
        ("[training.segcq]\nepochs = 3", ["[training]", "'segcq'"]),
        ("[training.segqc]\nepoch = 5", ["[training.segqc]", "'epoch'", "epochs"]),
        ("[training.segmentation]\nloss = 'hinge'", ["[training.segmentation]", "loss", "'dice'"]),
        ("[training.segqc]\nhide_mask = true", ["[training.segqc]", "hide_mask", "average_flips"]),
        ("[round]\nafter = 20", ["[round]", "'after'", "after_corrections"]),
        ("[round]\nafter_corrections = -1", ["round.after_corrections", "0, got -1"]),
        ("[round]\nafter_corrections = true", ["round.after_corrections", "wanted a number, got true"]),
        ("[structures]\nliver = true", ["structures.liver", "wanted a number, got true"]),
        ("[structures]\nliver = [1, false]", ["structures.liver", "wanted a number, got false"]),
        ("[boxes]\nthreshold = true", ["boxes.threshold", "wanted a number, got true"]),
        ("[training]\nepochs = true", ["[training]", "epochs: wanted a number, got true"]),
        ("[training.segqc]\ngammas = [true]", ["[training.segqc]", "gammas: wanted a number, got true"]),
        ("[training]\nvalidation_share = false", ["[training]", "validation_share: wanted a number"]),
        ("[pseudo_labels]\nmin_dice = 75", ["min_dice must be from 0 to 1, got min_dice = 75"]),
        ("[pseudo_labels]\nmode = 'on'", ["pseudo_labels.mode", "got 'on'"]),
        ("[server]\nport = 80800", ["server.port", "65535, got 80800"]),
        ("[round]\nat = '02:00'\nat = '03:00'", ["line 3", "at = '03:00'", "there already"]),
        ("[round]\n[server]\n[round]", ["line 3", "[round]", "there already"]),
        ("[round]\nat = '24:00'", ["round.at", '"00:00" to "23:59"', "24:00"]),
        ("[round]\nat = 2", ["round.at", "time of day"]),
        ("[round]\nenough_dice = 95", ["round.enough_dice", "1"]),
        ("[server]\nallowed_origins = ['*']", ["server.allowed_origins", "every page on the web"]),
        ("[server]\nallowed_origins = ['https://a.example/']", ["server.allowed_origins", "without a slash"]),
        ("[server]\nallowed_origins = ['a.example']", ["server.allowed_origins", "'a.example' is no origin"]),
        ("[server]\nallowed_origins = ['https://*.example']", ["server.allowed_origins", "no origin"]),
        ("[server\nport = 1", ["not a TOML file"]),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(tmp_path: Path, text: str, said: list[str]) -> None:
    write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in ["segqc.toml", *said]), message


@pytest.mark.parametrize("text", ['"2:30"', '"02:30"', "02:30:00"])
def test_a_time_of_day_may_be_text_or_toml_s_own(tmp_path: Path, text: str) -> None:
    write(tmp_path, f"[round]\nat = {text}\n")
    settings = load_settings(tmp_path).round
    assert (settings.at, settings.is_automatic) == (dt.time(2, 30), True)
    write(tmp_path, "[round]\nenough_dice = 0.9\n")
    assert not load_settings(tmp_path).round.is_automatic


def test_variables_may_hold_several_numbers_of_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEGQC_TRAINING__PATCH", "[8, 16, 4]")
    monkeypatch.setenv("SEGQC_TRAINING__SEGQC__EPOCHS", "2")
    settings = load_settings(tmp_path)
    assert settings.training_settings("segmentation") == TrainingSettings(patch=(8, 16, 4))
    assert settings.training_settings("segqc") == TrainingSettings(patch=(8, 16, 4), epochs=2)


def test_settings_that_go_together_may_be_in_both_tables(tmp_path: Path) -> None:
    write(tmp_path, "[training]\nhide_mask = true\naverage_flips = true\n")
    assert load_settings(tmp_path).training_settings("segqc").hide_mask
    write(tmp_path, "[training]\naverage_flips = true\n[training.segqc]\nhide_mask = true\n")
    assert load_settings(tmp_path).training_settings("segqc").hide_mask


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("SEGQC_SERVER__PORT", "none", "server.port: Input should be a valid integer"),
        ("SEGQC_SERVER__PRT", "90", r"\[server\] has no setting 'prt'; did you mean 'port'\?"),
        ("segqc_store__name", "x", r"\[store\] has no setting 'name'; it has url"),
        ("SEGQC_TRAINING__EPOCS", "3", r"\[training\] has no setting 'epocs'; did you mean 'epochs'\?"),
        ("SEGQC_TRAINING__SEGQC__EPOCHS", "-1", "epochs must be"),
        ("SEGQC_BOXES__X", "1", r"\[boxes\] has no setting 'x'; it has threshold"),
        ("SEGQC_STRUCTURES", "{liver", "is no JSON"),
        ("SEGQC_PATIENT_PATTERN", "(", "not a regular expression"),
    ],
)
def test_a_wrong_variable_is_named_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    write(tmp_path, "[structures]\nliver = 1\n[server]\nport = 80\n")
    monkeypatch.setenv("SEGQC_MODELS__KEEP", "3")
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=f"^the environment variable {variable}: .*{message}") as raised:
        load_settings(tmp_path)
    assert "segqc.toml" not in str(raised.value)
    assert "SEGQC_MODELS__KEEP" not in str(raised.value)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[server]\nprt = 80\n", r"\[server\] has no setting 'prt'; did you mean 'port'\?"),
        ("[servr]\nport = 80\n", r"there is no setting or table 'servr'; did you mean 'server'\?"),
        ("[trainnig]\nepochs = 80\n", r"there is no setting or table 'trainnig'; did you mean 'training'\?"),
    ],
)
def test_a_wrong_file_is_named_and_no_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str, message: str
) -> None:
    write(tmp_path, table)
    monkeypatch.setenv("SEGQC_SERVER__PORT", "90")
    with pytest.raises(SettingsError, match=rf"segqc\.toml: {message}") as raised:
        load_settings(tmp_path)
    assert "SEGQC_SERVER__PORT" not in str(raised.value)


def test_settings_that_cannot_be_read_are_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "segqc.toml").symlink_to("nowhere.toml")
    with pytest.raises(SettingsError, match=r"segqc\.toml: cannot be read"):
        load_settings(tmp_path)
    (tmp_path / "segqc.toml").unlink()
    (tmp_path / "segqc.toml").mkdir()
    with pytest.raises(SettingsError, match=r"segqc\.toml: cannot be read"):
        load_settings(tmp_path)
    (tmp_path / "segqc.toml").rmdir()
    os.mkfifo(tmp_path / "segqc.toml")
    with pytest.raises(SettingsError, match=r"segqc\.toml: cannot be read"):
        load_settings(tmp_path)


def test_a_missing_named_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.toml: no such settings file"):
        load_settings(tmp_path, config=tmp_path / "none.toml")


@pytest.mark.parametrize(
    "name",
    [
        "left lobe",
        'so-called "core"',
        "Große",
        "a.b",
        "# no comment",
        "[x]",
        "C:\\new",
        "a\tb",
        "del\x7f",
        "\U0001f9e0",
    ],
)
def test_written_settings_come_back_whatever_the_names(tmp_path: Path, name: str) -> None:
    structures = {"liver": (1,), **({name: (2, 3)} if name.isprintable() else {})}  # their names are lines of text
    write_settings(tmp_path, structures, {"P 1": ("P 1_ED", "P 1_ES"), name: (name,)})
    settings = load_settings(tmp_path)
    assert settings.structures == structures
    assert settings.patient_of(Path(f"{name}.nii.gz")) == name
    assert settings.patient_of(Path("P 1_ES.nii.gz")) == "P 1"
    assert settings.patient_of(Path("other.nrrd")) == "other"
    write_settings(tmp_path, {}, patient_tag=name)
    assert load_settings(tmp_path).patient_tag == name


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_settings_are_read_in_the_encodings_that_other_systems_write(tmp_path: Path, encoding: str, end: str) -> None:
    text = end.join(["[structures]", '"Größe" = [1]', "[server]", "port = 1001", ""])
    (tmp_path / "segqc.toml").write_bytes(text.encode(encoding))
    settings = load_settings(tmp_path)
    assert (settings.structures, settings.server.port) == ({"Größe": (1,)}, 1001)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[structures]\n"Größe" = [1]'.encode("cp1252"), "byte 16 (0xF6) is not UTF-8"),
        (b"\xff\xfea", "byte 2 (0x61) is not UTF-16"),
        (b"a\0b\0", "byte 1 is zero"),
    ],
)
def test_settings_in_another_encoding_are_named_with_the_byte(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "segqc.toml").write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load_settings(tmp_path)
    message = str(caught.value)
    assert all(part in message for part in ["segqc.toml", said, "save the file as UTF-8"]), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("SEGQC_SERVER_PORT", "SEGQC_SERVER__PORT"),
        ("segqc_store_url", "SEGQC_STORE__URL"),
        ("SEGQC_TRAINNG__EPOCHS", "SEGQC_TRAINING__EPOCHS"),
        ("SEGQC_TRAINING_EPOCHS", "SEGQC_TRAINING__EPOCHS"),
        ("SEGQC_STRUCTURE", "SEGQC_STRUCTURES"),
        ("SEGQC_PATIENT_TGA", "SEGQC_PATIENT_TAG"),
        ("SEGQC_PORT", "SEGQC_SERVER__PORT"),
        ("SEGQC_LEARNER__EPOCHS", "docs/settings.md"),
    ],
)
def test_a_variable_that_looks_like_a_setting_is_named(
    variable: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "1")
    (sentence,) = ignored_variables()
    assert f"{variable} is no setting" in sentence
    assert meant in sentence


@pytest.mark.parametrize(
    "variable", ["SEGQC_SERVER__PORT", "SEGQC_PATIENT_TAG", "segqc_training__epochs", "SEGQC_DATA", "MY_SEGQC_PORT"]
)
def test_settings_and_other_programs_variables_are_not_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    assert ignored_variables() == []
