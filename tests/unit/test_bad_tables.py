"""Tables that cannot be created, found or trusted: the error names the file, what was expected and what was found.

The first list of cases has arguments of `create` and `open`. The second damages a good table, opens it in both modes,
calls `info`, and checks that these attempts changed nothing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hashemb
from hashemb import errors
from hashemb._files import format as _format
from hashemb._files import sealed as _sealed
from hashemb._files.building import new_directory

GOOD: dict[str, Any] = {"num_embeddings": 64, "embedding_dim": 3}

# (name, changes of the arguments of create, error, message)
ARGUMENTS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("no rows", {"num_embeddings": 0}, ValueError, r"num_embeddings must be between 1 and \d+, got 0"),
    ("negative rows", {"num_embeddings": -5}, ValueError, r"num_embeddings must be between 1 and \d+, got -5"),
    ("float rows", {"num_embeddings": 1e6}, TypeError, r"num_embeddings must be an integer, got float 1000000.0"),
    ("bool rows", {"num_embeddings": True}, TypeError, r"num_embeddings must be an integer, got bool True"),
    ("str rows", {"num_embeddings": "64"}, TypeError, r"num_embeddings must be an integer, got str '64'"),
    ("rows past 2**63", {"num_embeddings": 2**63}, ValueError, r"got 9223372036854775808"),
    ("no dim", {"embedding_dim": 0}, ValueError, r"embedding_dim must be between 1 and 16777216, got 0"),
    ("negative dim", {"embedding_dim": -1}, ValueError, r"embedding_dim must be between 1 and 16777216, got -1"),
    ("float dim", {"embedding_dim": 16.0}, TypeError, r"embedding_dim must be an integer, got float 16.0"),
    ("dim too large", {"embedding_dim": 2**24 + 1}, ValueError, r"embedding_dim .* got 16777217"),
    ("file past 2**63", {"num_embeddings": 2**60}, ValueError, r"1152921504606846976 rows of 3 need .* \d+ bytes"),
    (
        "dtype",
        {"dtype": "float64"},
        ValueError,
        r"dtype must be one of 'float32', 'float16', 'bfloat16', got 'float64'",
    ),
    ("no dtype", {"dtype": None}, ValueError, r"dtype must be one of .*, got None"),
    ("optimizer by name", {"optimizer": "adagrad"}, TypeError, r"optimizer must be Adagrad.*got 'adagrad'"),
    ("optimizer as class", {"optimizer": hashemb.SGD}, TypeError, r"optimizer must be Adagrad.*got <class"),
    ("init for optimizer", {"optimizer": hashemb.Zeros()}, TypeError, r"optimizer must be Adagrad.*got Zeros\("),
    ("init by number", {"init": 0.01}, TypeError, r"init must be Uniform, Normal or Zeros.*got 0.01"),
    ("init as class", {"init": hashemb.Zeros}, TypeError, r"init must be Uniform, Normal or Zeros.*got <class"),
    ("no hash", {"num_hashes": 0}, ValueError, r"num_hashes must be between 1 and 16, got 0"),
    ("many hashes", {"num_hashes": 17}, ValueError, r"num_hashes must be between 1 and 16, got 17"),
    ("float hashes", {"num_hashes": 2.0}, TypeError, r"num_hashes must be an integer, got float 2.0"),
    ("negative seed", {"seed": -1}, ValueError, r"seed must be between 0 and 18446744073709551615, got -1"),
    ("seed past 64 bits", {"seed": 2**64}, ValueError, r"seed must be between 0 and .* got 18446744073709551616"),
    ("no seed", {"seed": None}, TypeError, r"seed must be an integer, got NoneType None"),
    ("unknown argument", {"dimension": 3}, TypeError, r"dimension"),
]


@pytest.mark.parametrize(("changes", "error", "message"), [c[1:] for c in ARGUMENTS], ids=[c[0] for c in ARGUMENTS])
def test_create_with_bad_arguments(tmp_path: Path, changes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hashemb.create(tmp_path / "t.emb", **GOOD | changes)
    assert list(tmp_path.iterdir()) == [], "something was left behind"


def test_geometry_is_keyword_only(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="positional"):
        hashemb.create(tmp_path / "t.emb", 64, 3)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("", ValueError, "path must not be empty"),
        (b"t.emb", TypeError, "path must be a str or path-like of str, got bytes"),
        (7, TypeError, "expected str, bytes or os.PathLike object, not int"),
        (None, TypeError, "not NoneType"),
        ("a\0b", ValueError, r"path must not hold a null character, got 'a\\x00b'"),
    ],
)
def test_bad_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Any, error: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (lambda: hashemb.create(path, **GOOD), lambda: hashemb.open(path), lambda: hashemb.info(path)):
        with pytest.raises(error, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["a table", "a directory", "a file", "a dangling link"])
@pytest.mark.parametrize("exist_ok", [False, True])
def test_create_where_something_is(tmp_path: Path, what: str, exist_ok: bool) -> None:
    path = tmp_path / "t.emb"
    if what == "a table":
        hashemb.create(path, **GOOD).close()
    elif what == "a directory":
        path.mkdir()
        (path / "notes.txt").write_text("mine")
    elif what == "a file":
        path.write_text("mine")
    else:
        path.symlink_to(tmp_path / "nowhere")
    before = tree(tmp_path)
    if what == "a table" and exist_ok:
        hashemb.create(path, **GOOD, exist_ok=True).close()
    else:
        wanted = errors.FormatError if exist_ok else FileExistsError
        with pytest.raises(wanted, match=r"t\.emb"):
            hashemb.create(path, **GOOD, exist_ok=exist_ok)
    assert tree(tmp_path) == before


def test_exist_ok_wants_the_same_table(tmp_path: Path) -> None:
    path = tmp_path / "t.emb"
    hashemb.create(path, **GOOD).close()
    before = tree(tmp_path)
    other = {**GOOD, "num_embeddings": 65, "optimizer": hashemb.SGD()}
    with pytest.raises(
        ValueError, match=r"t\.emb holds another table: num_embeddings is 64, not 65; optimizer is Adagr"
    ):
        hashemb.create(path, **other, exist_ok=True)
    assert tree(tmp_path) == before


def test_create_where_there_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"directory to create it in does not exist.*missing"):
        hashemb.create(tmp_path / "missing" / "t.emb", **GOOD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["w", "r+b", "rb", "a", "", None, 1])
def test_open_in_an_unknown_mode(tmp_path: Path, mode: Any) -> None:
    with pytest.raises(ValueError, match=r'mode must be "r" or "r\+", got'):
        hashemb.open(tmp_path / "t.emb", mode)


# ---- damaged tables ----


def tree(folder: Path) -> dict[str, bytes | str]:
    """Return all files below a folder with their bytes, and links with their targets."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "directory"
    return found


def overwrite(name: str, offset: int, data: bytes) -> Callable[[Path], None]:
    def damage(table: Path) -> None:
        content = bytearray((table / name).read_bytes())
        content[offset : offset + len(data)] = data
        (table / name).write_bytes(content)

    return damage


def resize(name: str, change: int) -> Callable[[Path], None]:
    return lambda table: os.truncate(table / name, (table / name).stat().st_size + change)


def remove(name: str) -> Callable[[Path], None]:
    return lambda table: (table / name).unlink()


def become_directory(name: str) -> Callable[[Path], None]:
    def damage(table: Path) -> None:
        (table / name).unlink()
        (table / name).mkdir()

    return damage


def edit_meta(**changes: Any) -> Callable[[Path], None]:
    """Change entries of meta.json and correct its checksum, like a file from another version, or a forged one."""

    def damage(table: Path) -> None:
        content = json.loads((table / "meta.json").read_bytes()) | changes
        content = {name: value for name, value in content.items() if value is not None}
        content.pop("checksum")
        (table / "meta.json").write_bytes(_sealed.dump_checked(content))

    return damage


def write_meta(data: bytes) -> Callable[[Path], None]:
    return lambda table: (table / "meta.json").write_bytes(data) and None


def header(**changes: Any) -> Callable[[Path], None]:
    """Write a valid header of weight.npy, but for another array."""
    spec = dataclasses.replace(_format.FileSpec((64, 3), "<f4"), **changes)
    return overwrite("weight.npy", 0, _format.encode_npy_header(spec))


def control(field: str, value: Any) -> Callable[[Path], None]:
    dtype, offset = _format.CONTROL_DTYPE.fields[field][:2]  # type: ignore[index]
    return overwrite("control", offset, np.array([value], dtype).tobytes())


Format, Corrupt = errors.FormatError, errors.CorruptTableError
#: Files that `info` reads, so that it must detect their damage; `open` detects damage of the arrays.
META_FILES = ("meta.json", "control")

DAMAGES: list[tuple[str, Callable[[Path], None], type[Exception], str]] = [
    ("no meta.json", remove("meta.json"), Format, r"t\.emb: not a hashemb table: it holds no file meta.json"),
    ("meta.json is a directory", become_directory("meta.json"), Format, r"it holds no file meta.json"),
    ("empty meta.json", write_meta(b""), Corrupt, r"meta.json: expected JSON, found 0 bytes"),
    ("binary meta.json", write_meta(b"\xff\x00\x80"), Corrupt, r"meta.json: expected JSON, found 3 bytes"),
    ("truncated meta.json", resize("meta.json", -100), Corrupt, r"meta.json: expected JSON, found \d+ bytes"),
    ("one byte less", resize("meta.json", -1), Corrupt, r"meta.json: damaged: expected checksum"),
    ("one byte more", resize("meta.json", 1), Corrupt, r"meta.json"),
    ("a list", write_meta(b"[1, 2]"), Format, r"meta.json: not the description of a hashemb table"),
    ("other JSON", write_meta(b'{"name": "x"}'), Format, r"meta.json: not the description of a hashemb table"),
    ("newer format", edit_meta(format=2), Format, r"has format 2, this version reads up to 1: upgrade hashemb"),
    ("much newer format", write_meta(b'{"format": 9000}'), Format, r"has format 9000, this version reads up to 1"),
    ("format 0", edit_meta(format=0), Format, r"has format 0, formats begin at 1"),
    ("format by name", edit_meta(format="1"), Format, r"meta.json: not the description of a hashemb table"),
    ("format true", edit_meta(format=True), Format, r"not the description of a hashemb table"),
    ("flipped digit", overwrite("meta.json", 40, b"9"), Corrupt, r"meta.json: (damaged|expected JSON)"),
    ("no checksum", write_meta(b'{"format": 1}'), Corrupt, r"damaged: expected checksum \w{64}, found None"),
    ("unknown optimizer", edit_meta(optimizer={"kind": "adam"}), Format, r"optimizer.kind to be .*, found 'adam'"),
    ("unknown init", edit_meta(init={"kind": "ones"}), Format, r"expected init.kind to be .*, found 'ones'"),
    ("impossible rate", edit_meta(optimizer={"kind": "sgd", "lr": -1.0}), Format, r"cannot read.*lr must be"),
    ("geometry missing", edit_meta(num_embeddings=None), Format, r"expected a field num_embeddings, found none"),
    ("weight.npy too short", resize("weight.npy", -1), Corrupt, r"weight.npy: expected 4864 bytes, found 4863"),
    ("weight.npy too long", resize("weight.npy", 4096), Corrupt, r"weight.npy: expected 4864 bytes, found 8960"),
    ("weight.npy empty", resize("weight.npy", -4864), Corrupt, r"weight.npy: expected 4864 bytes, found 0"),
    ("accumulator.npy short", resize("accumulator.npy", -4), Corrupt, r"accumulator.npy: expected \d+ bytes, found"),
    ("paid.npy short", resize("paid.npy", -8), Corrupt, r"paid.npy: expected \d+ bytes, found"),
    ("blocks.npy short", resize("blocks.npy", -4), Corrupt, r"blocks.npy: expected \d+ bytes, found"),
    ("weight.npy float64", header(dtype="<f8"), Corrupt, r"expected shape \(64, 3\), dtype <f4; found .*dtype <f8"),
    ("weight.npy big-endian", header(dtype=">f4"), Corrupt, r"weight.npy: expected .*<f4; found .*>f4"),
    ("weight.npy transposed", header(shape=(3, 64)), Corrupt, r"expected shape \(64, 3\).*found shape \(3, 64\)"),
    ("weight.npy no header", overwrite("weight.npy", 0, b"\0" * 128), Corrupt, r"weight.npy: .*found no .npy header"),
    ("weight.npy header", overwrite("weight.npy", 12, b"\xff"), Corrupt, r"weight.npy: .*unreadable .npy header"),
    ("no weight.npy", remove("weight.npy"), Corrupt, r"t\.emb: expected a file weight.npy, found none"),
    ("no accumulator.npy", remove("accumulator.npy"), Corrupt, r"expected a file accumulator.npy, found none"),
    ("weight.npy a directory", become_directory("weight.npy"), Corrupt, r"weight.npy"),
    ("no control", remove("control"), Corrupt, r"control: expected 4096 bytes, found no file"),
    ("control short", resize("control", -1), Corrupt, r"control: expected 4096 bytes, found 4095"),
    ("control long", resize("control", 4096), Corrupt, r"control: expected 4096 bytes, found 4097|found 8192"),
    ("control of something else", control("magic", b"elephant"), Corrupt, r"control: expected b'hashemb.*b'elephant'"),
    ("control format", control("format", 7), Corrupt, r"control: expected .*format 1, found .*format 7"),
    ("control NaN rate", control("lr", np.nan), Corrupt, r"expected lr to be a number from 0 to 1e30, found nan"),
    ("control negative rate", control("lr", -0.5), Corrupt, r"control: expected lr to be .*, found -0.5"),
    ("control grown decay", control("decay_total", 1.0), Corrupt, r"decay_total to be .*, 0 or less, found 1.0"),
    ("control epoch 0", control("epoch", 0), Corrupt, r"epoch to be an integer from 1 to 4294967295, found 0"),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "t.emb"
    optimizer = hashemb.RowWiseAdagrad(lr=0.1, weight_decay=0.25)
    with hashemb.create(path, **GOOD, optimizer=optimizer) as table:
        table.update(np.arange(20), np.ones((20, 3), np.float32))
    return path


@pytest.mark.parametrize(("damage", "error", "message"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_damaged_table(tmp_path: Path, good: Path, damage: Any, error: type[Exception], message: str) -> None:
    path = tmp_path / "t.emb"
    shutil.copytree(good, path)
    damage(path)
    before = tree(path)
    assert before != tree(good), "no damage was done"
    calls: list[Callable[[], object]] = [lambda: hashemb.open(path), lambda: hashemb.open(path, "r+")]
    if any(before.get(name) != tree(good)[name] for name in META_FILES):
        calls.append(lambda: hashemb.info(path))
    for call in calls:
        with pytest.raises(error, match=message) as caught:
            call()
        assert type(caught.value) is error
    assert tree(path) == before


def test_canary_a_copy_without_damage_opens(tmp_path: Path, good: Path) -> None:
    """An undamaged copy opens: each damaged one is refused because of its damage only."""
    path = tmp_path / "t.emb"
    shutil.copytree(good, path)
    edit_meta()(path)
    overwrite("weight.npy", 0, b"\x93NUMPY")(path)
    assert tree(path) == tree(good)
    with hashemb.open(path, "r+") as table:
        assert table.step == 1


def test_every_bit_of_meta_json_counts(tmp_path: Path, good: Path) -> None:
    path = tmp_path / "t.emb"
    shutil.copytree(good, path)
    content = (path / "meta.json").read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (path / "meta.json").write_bytes(flipped)
        with pytest.raises(errors.FormatError, match=r"meta\.json"):
            hashemb.open(path)


@pytest.mark.parametrize("what", ["nothing", "an empty directory", "a file", "a weight.npy"])
@pytest.mark.parametrize("mode", ["r", "r+"])
def test_open_what_is_no_table(tmp_path: Path, what: str, mode: Any) -> None:
    path = tmp_path / "t.emb"
    if what == "an empty directory":
        path.mkdir()
    elif what == "a file":
        path.write_bytes(b"hello")
    elif what == "a weight.npy":
        np.save(path.with_suffix(".npy"), np.zeros((2, 2)))
        path.with_suffix(".npy").rename(path)
    before = tree(tmp_path)
    wanted = FileNotFoundError if what == "nothing" else errors.FormatError
    message = r"no table at this path.*t\.emb" if what == "nothing" else r"t\.emb: not a hashemb table"
    for call in (lambda: hashemb.open(path, mode), lambda: hashemb.info(path)):
        with pytest.raises(wanted, match=message):
            call()
    assert tree(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every file")
def test_files_that_may_not_be_written(tmp_path: Path, good: Path) -> None:
    path = tmp_path / "t.emb"
    shutil.copytree(good, path)
    for file in path.iterdir():
        file.chmod(0o444)
    hashemb.open(path).close()
    with pytest.raises(errors.ReadOnlyTableError, match=r'cannot be opened for writing.*open with mode="r"'):
        hashemb.open(path, "r+")


@pytest.mark.parametrize("made", ["table", "file"])
def test_something_that_appears_while_a_table_is_made_stays(tmp_path: Path, made: str) -> None:
    path = tmp_path / "t"

    def make_in_a_race() -> None:
        with new_directory(str(path)) as building:
            Path(building.path, "new").touch()
            if made == "table":
                hashemb.create(path, num_embeddings=10, embedding_dim=2).close()
            else:
                path.write_text("mine")

    with pytest.raises(FileExistsError):
        make_in_a_race()
    assert os.listdir(tmp_path) == ["t"]
    assert hashemb.info(path).num_embeddings == 10 if made == "table" else path.read_text() == "mine"
