"""The checks behind test_tidy.py: pure functions from text to complaints, so that each can be shown to fail.

A complaint is a sentence that names the place; an empty list means that the check passes.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400
MAX_TRACKED_BYTES = 300_000

#: Folders with a public face: other modules import from the folder itself, whose `__init__` exports all they may use.
ROOMS = ("_files", "_points")
#: The modules of the package that a module may import; imports run one way. An unlisted module is an error. "_files" is
#: the face of that folder; "_files.format" is one of its modules, which only modules of the same folder import.
ALLOWED_IMPORTS: dict[str, set[str]] = {
    "_version": set(),
    "_text": set(),
    "_random": set(),
    "errors": set(),
    "reference.numerics": set(),
    "_rules": {"errors"},
    "optim": {"errors", "_rules"},
    "init": {"errors", "_rules"},
    "_runtime": set(),
    "_open_file": set(),
    "_hashing": set(),
    "_sharing": {"errors"},
    "_core": {"errors", "_sharing"},
    "reference.table": {"errors", "optim", "init", "reference"},
    "reference.__init__": {"reference"},
    "_packages": {"_version", "_runtime", "errors"},
    "hashing": {"errors", "_hashing", "_packages", "_random", "table"},
    "_files.sealed": {"errors", "_rules"},
    "_files.format": {"errors", "optim", "init", "_rules", "_random", "_files.sealed"},
    "_files.lineage": {"errors", "_rules", "_files.sealed", "_files.format"},
    "_files.directory": {"errors", "_open_file", "_files.format", "_files.lineage"},
    "_files.blocks": {"errors", "_hashing", "_open_file", "_sharing", "_files.format", "_files.directory"},
    "_files.locks": {"errors", "_open_file", "_files.directory"},
    "_files.building": {"errors", "_sharing", "_files.format", "_files.directory", "_files.locks"},
    "_files.arrays": {"errors", "_open_file", "_files.format", "_files.directory"},
    "_files.space": {"_core", "_open_file", "_files.format", "_files.directory", "_files.blocks", "_files.arrays"},
    "_files.huge_pages": {"_open_file", "_files.format", "_files.directory", "_files.arrays"}
    | {"_files.space"},
    "_files.saving": {"errors", "_open_file", "_sharing"}
    | {f"_files.{name}" for name in ("format", "directory", "locks", "arrays")},
    "_files.recovery": {"_files.format", "_files.directory", "_files.arrays", "_files.blocks"},
    "_files.seats": {"errors", "_sharing", "_files.directory"},
    "_files.writers": {"errors", "_core", "_sharing", "_files.directory", "_files.locks", "_files.arrays"}
    | {"_files.space", "_files.saving", "_files.recovery", "_files.seats"},
    "_files.table_files": {"errors", "_core", "_sharing", "_files.directory", "_files.locks", "_files.arrays"}
    | {"_files.space", "_files.blocks", "_files.huge_pages", "_files.saving", "_files.writers"},
    "_files.binding": {"_core", "_files.format", "_files.locks", "_files.table_files"},
    "_points.problems": set(),
    "_points.half": {"_files"},
    "_points.snapshot": {"errors", "_sharing", "_files", "_points.problems"},
    "_points.delta_file": {"errors", "_rules", "_open_file", "_files", "_points.problems"},
    "_points.delta": {"errors", "optim", "_rules", "_sharing", "_files"}
    | {"_points.half", "_points.delta_file", "_points.snapshot"},
    "_points.scan": {"errors", "_files", "_points.problems"},
    "stats": {"_files", "_points"},
    "_arguments": {"errors", "optim", "init", "_rules", "_version", "_files"},
    "table": {"errors", "optim", "init", "stats", "hashing", "_arguments", "_core", "_files", "_points"},
    "replica": {"errors", "optim", "table", "_arguments", "_files", "_points"},
    "create": {"errors", "optim", "init", "table", "_arguments", "_files", "_points"},
    "verify": {"errors", "_arguments", "_files", "_points"},
    "restore": {"errors", "verify", "_arguments", "_sharing", "_files", "_points"},
    "__init__": {"errors", "optim", "init", "stats", "hashing", "reference", "table", "create", "replica", "verify"}
    | {"restore", "_version", "_packages", "_runtime", "_files", "_points"},
}
#: The modules that touch files and mappings.
STORAGE_MODULES = {"_files", "_points", "replica", "verify", "restore"}
#: Modules that use only what every program may use: the public names, and the modules that contain only values.
OUTER_MODULES = {"cli", "ctr", "torch", "sklearn", "__main__"}
PUBLIC_MODULES = {"errors", "init", "optim", "reference", "stats"}
#: The slow twin of the maths of ctr takes its exponential from the slow twin of the core's.
MAY_ALSO_IMPORT = {
    "cli": {"ctr", "_packages", "_text"}, "sklearn": {"ctr", "_packages", "_text"}, "__main__": {"cli"},
    "ctr": {"_packages", "_random", "_text", "torch"},
}  # fmt: skip
#: The rooms of ctr, and the rooms that each may import, from the face only. The modules of ctr that are in no room are
#: below all rooms. What needs an extra when it is loaded is not in a face, and is imported by its own name.
CTR_ROOMS: dict[str, set[str]] = {
    "data": set(),
    "models": set(),
    "metrics": set(),
    "synthetic": {"data"},
    "training": {"data", "models", "metrics"},
    "report": {"data", "models", "metrics", "training"},
}
BEHIND_NO_FACE = {"ctr.models.deep"}
OLD_NAMES = {"ctr.readers", "ctr.fields", "ctr.deep"}  # of rooms, for programs written before them
#: Modules that the command line loads after finding these extras, and modules that derive from classes of an extra.
EXTRAS_WHEN_LOADED = {
    "cli.models": {"typer", "rich"},
    "cli.arguments": {"typer"},
    "ctr.models.deep": {"torch"},
    "sklearn._base": {"sklearn"},
    "sklearn._checks": {"sklearn"},
    "torch.__init__": {"torch"},
    "torch._gradients": {"torch"},
    "torch._modules": {"torch"},
    "torch._optimizer": {"torch"},
}

#: The compiled modules. All of them may take threads, the instruction set and the check of buffers from `_runtime`.
CYTHON_MODULES = {"_runtime", "_open_file", "_hashing", "_sharing", "_core", "ctr._maths", "ctr.data._tokens"}
REQUIRED_PACKAGES = {"numpy", "scipy", "mmh3", "hashemb"}
#: Facts about this process, and the path protocol; everything else in `os` accesses files.
HARMLESS_OS_NAMES = {"PathLike", "fspath", "environ", "getpid", "cpu_count", "sched_getaffinity", "register_at_fork"}
LEXICAL_PATH_NAMES = {"basename", "dirname", "join", "normpath", "splitext"}
FILE_METHODS = {"read_bytes", "write_bytes", "read_text", "write_text", "mkdir", "unlink", "rmdir", "tofile"}
FILE_MODULES = {"mmap", "fcntl", "shutil", "tempfile", "io", "glob"}
NUMPY_FILE_NAMES = {"load", "save", "savez", "memmap", "fromfile", "open_memmap"}
#: Names that write to a terminal, and the modules that may call them.
PRINTING_NAMES = {"print", "echo", "secho"}
PRINTING_MODULES = {"cli.console"}
BANNED_FLAGS = re.compile(r"-march=native|-mtune=native|fast-math|-Ofast|-funsafe-math|-fassociative-math")


def file_too_long(name: str, text: str) -> list[str]:
    """Return complaints about a source file longer than `MAX_FILE_LINES`."""
    lines = text.count("\n")
    return [f"{name}: {lines} lines, more than {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []


def functions_too_long(name: str, text: str) -> list[str]:
    """Return complaints about functions longer than `MAX_FUNCTION_LINES`, not counting docstrings in Python."""
    return [
        f"{name}: {function} has {lines} lines, more than {MAX_FUNCTION_LINES}"
        for function, lines in function_lengths(name, text)
        if lines > MAX_FUNCTION_LINES
    ]


def function_lengths(name: str, text: str) -> list[tuple[str, int]]:
    """Return (name, lines) for each function of a .py, .pyx, .pxd, .c or .h file."""
    if name.endswith(".py"):
        return list(_python_functions(text))
    if name.endswith((".pyx", ".pxd")):
        return list(_cython_functions(text))
    return list(_c_functions(text))


def _python_functions(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = _end(node) - node.lineno + 1
            if ast.get_docstring(node, clean=False) is not None:
                lines -= _end(node.body[0]) - node.body[0].lineno + 1
            yield node.name, lines


def _end(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno


def _cython_functions(text: str) -> Iterator[tuple[str, int]]:
    """Find functions by indentation: one ends before the next line that is not indented deeper than its first line."""
    lines = text.splitlines()
    head = re.compile(r"^(\s*)(?:def|cpdef|cdef(?!\s+(?:extern|class|struct|enum|union)))\b[^=#]*?(\w+)\s*\(")
    for start, line in enumerate(lines):
        match = head.match(line)
        if match is None:
            continue
        last, open_brackets = start, 0
        for number in range(start, len(lines)):
            code = lines[number].split("#")[0]
            depth = len(code) - len(code.lstrip())
            if number > start and open_brackets <= 0 and code.strip() and depth <= len(match.group(1)):
                break
            open_brackets += code.count("(") - code.count(")")
            last = number if code.strip() else last
        yield match.group(2), last - start + 1


def _c_functions(text: str) -> Iterator[tuple[str, int]]:
    """Find functions by braces: a block at depth 0 after a closing parenthesis. A long macro counts as a function."""
    code = _without_c_comments(text)
    for match in re.finditer(r"^[ \t]*#[ \t]*define[ \t]+(\w+)(?:.*\\\n)+.*", code, re.MULTILINE):
        yield match.group(1), match.group(0).count("\n") + 1
    code = re.sub(r"^[ \t]*#(?:.*\\\n)*.*", _only_newlines, code, flags=re.MULTILINE)
    depth, start = 0, -1
    for match in re.finditer(r"[{}]", code):
        if match.group(0) == "}":
            depth -= 1
            if depth == 0 and start >= 0:
                yield _c_name(code, start), code.count("\n", start, match.start()) + 1
            continue
        if depth == 0:
            start = _c_signature_start(code, match.start())
        depth += 1


def _without_c_comments(text: str) -> str:
    pattern = r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
    return re.sub(pattern, _only_newlines, text, flags=re.DOTALL)


def _only_newlines(match: re.Match[str]) -> str:
    return "\n" * match.group(0).count("\n")


def _c_signature_start(code: str, brace: int) -> int:
    """Return where the signature before `brace` begins; -1 if the block is not a function (a struct, an array)."""
    before = code[:brace].rstrip()
    if not before.endswith(")"):
        return -1
    start = max(before.rfind("}"), before.rfind(";")) + 1
    return start + len(before[start:]) - len(before[start:].lstrip())


def _c_name(code: str, start: int) -> str:
    names = re.findall(r"(\w+)\s*\(", code[start : code.index("{", start)])
    return names[0] if names else "?"


def wrong_imports(module: str, text: str) -> list[str]:
    """Return complaints about imports in the wrong direction. `module` is "table", "ctr.metrics", "_core"…"""
    top = module.split(".")[0]
    if top in OUTER_MODULES:
        allowed = {top} | PUBLIC_MODULES | MAY_ALSO_IMPORT.get(top, set())
    elif top in ROOMS and module == f"{top}.__init__":
        allowed = {name for name in ALLOWED_IMPORTS if name.startswith(f"{top}.")}
    elif module in ALLOWED_IMPORTS:
        allowed = ALLOWED_IMPORTS[module]
    else:
        return [f"hashemb.{module}: not in ALLOWED_IMPORTS; give it a place in the order of the imports"]
    if module in CYTHON_MODULES:
        allowed = allowed | {"_runtime"}
    return [
        f"hashemb.{module} imports hashemb.{name}, it may import {sorted(allowed)}"
        for name in sorted(set(_package_imports(module, text)))
        if name not in allowed
    ]


def _package_imports(module: str, text: str) -> Iterator[str]:
    """Yield the modules of the package that `text` imports; `from hashemb import Adagrad` is public and yields none."""
    statements = _cython_imports(text) if module in CYTHON_MODULES else python_imports(text, module)
    for source, name in statements:
        parts = source.split(".")
        if parts[0] != "hashemb":
            continue
        if len(parts) > 1 and parts[1] in ROOMS:
            inside = [*parts[2:3], name][0]  # of "from hashemb._files import blocks" too, in that room
            is_own = module.split(".")[0] == parts[1] and f"{parts[1]}.{inside}" in ALLOWED_IMPORTS
            yield f"{parts[1]}.{inside}" if len(parts) > 2 or is_own else parts[1]
        elif len(parts) > 1:
            yield parts[1]
        elif name in ALLOWED_IMPORTS or name in OUTER_MODULES:
            yield name


def python_imports(text: str, module: str) -> Iterator[tuple[str, str]]:
    package = ["hashemb", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((source, alias.name) for alias in node.names)


def _cython_imports(text: str) -> Iterator[tuple[str, str]]:
    pattern = r"^\s*(?:from\s+([\w.]+)\s+c?import\s+(\w+)|c?import\s+([\w.]+))"
    for match in re.finditer(pattern, text, re.MULTILINE):
        source = match.group(1) or match.group(3)
        yield (f"hashemb{source}" if source.startswith(".") else source), match.group(2) or ""


def reaches_past_a_face(module: str, text: str) -> list[str]:
    """Return complaints about imports past the face of a room of ctr, or against the order of the rooms."""
    room = module.split(".")[1] if module.startswith("ctr.") and module.count(".") > 1 else ""
    found = []
    for source, name in _cython_imports(text) if module in CYTHON_MODULES else python_imports(text, module):
        _, _, inside = source.partition("hashemb.ctr.")
        target, _, part = (inside or name).partition(".")
        if not source.startswith("hashemb.ctr") or target not in CTR_ROOMS or target == room:
            continue
        if part and source.removeprefix("hashemb.") not in BEHIND_NO_FACE:
            found.append(f"hashemb.{module} imports {source}, and not from hashemb.ctr.{target}")
        is_room = module.startswith("ctr.") and module not in {"ctr.__init__", *OLD_NAMES}
        if is_room and target not in CTR_ROOMS.get(room, set()):
            found.append(f"hashemb.{module} imports ctr.{target}, which is not below it")
    return found


def needs_extra(module: str, text: str) -> list[str]:
    """Return complaints about imports, when the module is loaded, of anything beyond the required packages."""
    found = []
    allowed = REQUIRED_PACKAGES | EXTRAS_WHEN_LOADED.get(module, set())
    for node in _loaded_statements(ast.parse(text).body):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        if isinstance(node, ast.ImportFrom) and node.level:
            continue
        for package in {name.split(".")[0] for name in names}:
            if package not in allowed and package not in sys.stdlib_module_names:
                found.append(f"hashemb.{module} imports {package} when loaded, not in the function that needs it")
    return found


def _loaded_statements(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from _loaded_statements(node.orelse)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for field in ("body", "orelse", "finalbody", "handlers"):
                yield from _loaded_statements(getattr(node, field, []))


def touches_files(module: str, text: str) -> list[str]:
    """Return complaints about access to files, mappings or locks, which is left to the modules in STORAGE_MODULES."""
    tree = ast.parse(text)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return [f"hashemb.{module}: {what}; only _files and _points do" for what in _file_uses(tree, own)]


def _file_uses(tree: ast.Module, own: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if alias.name in FILE_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in FILE_MODULES:
            yield f"from {node.module} import …"
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (f"from os import {a.name}" for a in node.names if a.name not in HARMLESS_OS_NAMES)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "os" and node.attr not in HARMLESS_OS_NAMES | {"path"}:
                yield f"uses os.{node.attr}"
            elif node.value.id in {"np", "numpy"} and node.attr in NUMPY_FILE_NAMES:
                yield f"uses {node.value.id}.{node.attr}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "os.path":
            yield from () if node.attr in LEXICAL_PATH_NAMES else (f"uses os.path.{node.attr}",)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id == "open" and "open" not in own:
                yield "calls open()"
            elif isinstance(node.func, ast.Attribute) and node.func.attr in FILE_METHODS:
                yield f"calls .{node.func.attr}()"


def prints_raw(module: str, text: str) -> list[str]:
    """Return complaints about output of the command line that bypasses `cli.console`, which escapes names."""
    if module.split(".")[0] not in {"cli", "ctr"} or module in PRINTING_MODULES:
        return []
    calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    printing = [name for name in map(ast.unparse, calls) if name.split(".")[-1] in PRINTING_NAMES]
    return [f"hashemb.{module} calls {name}(); use say, print_line or confirm" for name in printing]


def banned_flags(name: str, text: str) -> list[str]:
    """Return complaints about compiler flags that make results or binaries depend on the machine."""
    return [f"{name}: {found}" for found in BANNED_FLAGS.findall(text)]


def unfit_for_git(name: str, content: bytes) -> list[str]:
    """Return complaints about a tracked file that is generated, large, or binary outside tests/golden/."""
    found = []
    if len(content) > MAX_TRACKED_BYTES:
        found.append(f"{name}: {len(content)} bytes, more than {MAX_TRACKED_BYTES}")
    if content.startswith(b"/* Generated by Cython"):
        found.append(f"{name}: generated by Cython")
    if b"\0" in content and not name.startswith("tests/golden/"):
        found.append(f"{name}: binary, and not a golden file")
    if name.endswith((".so", ".o", ".a", ".pyc", ".whl", ".gz", ".zst", ".parquet", ".ipynb")):
        found.append(f"{name}: a build product, data or a notebook")
    return found


def wrong_map(text: str, exists: Callable[[str], bool], wanted: list[str]) -> list[str]:
    """Return complaints about CONTRIBUTING.md's table of paths that do not exist, and of `wanted` ones that it lacks.

    A first cell names one or more paths, those after the first relative to its folder; after "…" they are relative to
    the last folder named.
    """
    named, folder = [], ""
    section = text.partition("## Where things are")[2].partition("\n## ")[0]
    for cell in re.findall(r"^\| ((?:… )?`[^|]*) \|", section, re.MULTILINE):
        paths = re.findall(r"`([^`]+)`", cell)
        if not cell.startswith("…"):
            folder = paths[0].rpartition("/")[0] + "/"
            paths[0] = paths[0].removeprefix(folder)
        named += [folder + path for path in paths]
    found = [f"CONTRIBUTING.md names {path}, which does not exist" for path in named if not exists(path)]
    return found + [f"CONTRIBUTING.md's map lacks {path}" for path in wanted if path not in named]
