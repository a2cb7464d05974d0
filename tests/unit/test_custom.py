"""A user's own function or class, named by a setting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cgtgan.config import custom_name, is_custom
from cgtgan.errors import InputError, MissingFileError
from cgtgan.runtime.custom import call_custom, custom_file, custom_fingerprint, load_custom

FIELD = "evaluate.metrics"
CODE = """
from dataclasses import dataclass

@dataclass
class Box:
    side: int = 2

class Outer:
    @staticmethod
    def inner():
        return "inside"

def double(x):
    return 2 * x

def fails(x):
    y = x
    raise RuntimeError("no such luck\\nsecond line")
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    file = tmp_path / "own code.py"
    file.write_text(CODE)
    return file


@pytest.mark.parametrize(
    ("spec", "custom"),
    [
        ("a.py:f", True),
        ("folder/b c.py:f", True),
        ("package.module:f", True),
        ("a.py:Outer.inner", True),
        ("C:/code/a.py:f", True),
        ("cider", False),
        ("a.py", False),
        ("a.py:", False),
        (":f", False),
        ("a.py:1f", False),
        ("C:/code/a.py", False),
    ],
)
def test_what_counts_as_own_code(spec: str, custom: bool) -> None:
    assert is_custom(spec) is custom


def test_its_name_is_what_stands_behind_the_colon() -> None:
    assert custom_name("folder/a.py:brevity") == "brevity"
    assert custom_name("cider") == "cider"


def test_functions_classes_and_nested_names_are_loaded(code: Path) -> None:
    assert load_custom(f"{code}:double", FIELD)(21) == 42
    assert load_custom(f"{code}:Box", FIELD)().side == 2
    assert load_custom(f"{code}:Outer.inner", FIELD)() == "inside"
    assert load_custom("os.path:basename", FIELD)("a/b") == "b"
    assert custom_file("json.decoder:JSONDecoder", FIELD).name == "decoder.py"


def test_a_path_is_relative_to_the_working_directory(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(code.parent)
    assert load_custom("own code.py:double", FIELD)(1) == 2


def test_a_changed_file_is_loaded_anew_and_has_another_fingerprint(code: Path) -> None:
    before = custom_fingerprint(f"{code}:double", FIELD)
    assert custom_fingerprint(f"{code}:Box", FIELD) == before
    code.write_text(CODE.replace("2 * x", "3 * x"))
    assert custom_fingerprint(f"{code}:double", FIELD) != before
    assert load_custom(f"{code}:double", FIELD)(10) == 30


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ("{folder}/missing.py:f", MissingFileError, ["missing.py", "does not exist"]),
        ("no_such_package.part:f", MissingFileError, ["no module no_such_package"]),
        ("json.no_such_part:f", MissingFileError, ["no module json.no_such_part"]),
        ("{code}:absent", InputError, ["has no absent", "double", "Box"]),
        ("cider", InputError, ["path.py:name"]),
        ("sys:path", InputError, ["no source file"]),
    ],
)
def test_what_is_not_there_is_named(code: Path, spec: str, kind: type[Exception], words: list[str]) -> None:
    spec = spec.format(code=code, folder=code.parent)
    load: Callable[[str, str], object] = custom_file if spec == "sys:path" else load_custom
    with pytest.raises(kind) as error:
        load(spec, FIELD)
    assert f"{FIELD}={spec}" in str(error.value)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("x = 1\ny = x +\n", 2, "invalid syntax"),
        ("import math\n\nmath.no_such_name\n", 3, "AttributeError"),
        ("\nimport no_such_package_at_all\n", 2, "no_such_package_at_all"),
        ("\n\nraise SystemError\n", 3, "SystemError"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_its_line(
    tmp_path: Path, text: str, line: int, words: str
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(InputError) as error:
        load_custom(f"{file}:f", FIELD)
    assert f"{file}, line {line}" in str(error.value)
    assert words in str(error.value)


def test_an_exception_of_own_code_names_its_file_and_line(code: Path) -> None:
    spec = f"{code}:fails"
    line = CODE.splitlines().index('    raise RuntimeError("no such luck\\nsecond line")') + 1
    with pytest.raises(InputError) as error:
        call_custom(load_custom(spec, FIELD), spec, FIELD, 1)
    assert str(error.value) == f"{FIELD}={spec} failed at {code}, line {line}: RuntimeError: no such luck"
