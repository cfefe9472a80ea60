"""`audit`: what a checkpoint would do to a program that loads it as programs commonly do. Nothing of it is executed.

Pickles are code: `audit_pickle.py` lists what each would import and call. The other formats hold numbers and text; what
else in a model's folder may run (a chat template, custom code that `config.json` points to, Python files) is named too.
Files that the readers refuse are audited all the same: the malicious ones are the point.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import FormatError, LoadstoneError, SourceError
from .audit_pickle import Named, PickleAudit, audit_pickle
from .datafile import DataFile
from .pickle_names import DANGEROUS, HARMLESS, UNKNOWN, VERDICTS
from .pickle_vm import printable
from .sniff import sniff
from .torch_archive import MAGIC_NUMBER, MAX_PICKLES, inflate, zip_region
from .wording import few, shown, visible

NOTHING = "nothing executable"
MAX_ENTRIES = 100  # pickles looked at in one archive
MAX_IN_A_ROW = 16  # pickles one after the other in one file; torch's old format has five
MAX_FILES = 1000
MAX_TEXT = 1 << 20  # bytes of a config
_LISTED = 20  # names in the printed lines


@dataclass(slots=True)
class FileAudit:
    """One file: what it is, the verdict, and for pickles the names that they import and call, in order."""

    file: str
    what: str
    verdict: str = NOTHING
    names: list[Named] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Audit:
    """`verdict` is the worst of the files: nothing executable, harmless, unknown or dangerous."""

    path: str
    verdict: str
    files: list[FileAudit]
    beside: list[str]  # what else in the folder is executed, or may be

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def audit(path: str | Path) -> Audit:
    """Audit a file, or every file of a folder.

    Raises SourceError if there is nothing at `path` or it cannot be read; never because of what is inside.
    """
    path = Path(path)
    try:
        folder = path if path.is_dir() else path.parent
        if path.is_dir():
            there = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
        elif path.is_file():
            there = [path]
        else:
            raise SourceError(f"{path}: there is no such file or folder.")
        files = [found for file in there[:MAX_FILES] if (found := _audit_file(file)) is not None]
        beside = list(_beside(folder)) if path.is_dir() or (folder / "config.json").is_file() else []
    except OSError as error:
        raise SourceError(f"{path}: it cannot be read: {error}.") from None
    if len(there) > MAX_FILES:
        beside.append(f"the folder holds {len(there):,} files, of which {MAX_FILES:,} were looked at")
    return Audit(str(path), max((file.verdict for file in files), key=_RANK.index, default=NOTHING), files, beside)


_RANK = (NOTHING, *VERDICTS)


def _audit_file(path: Path) -> FileAudit | None:
    """None for a file that is neither a checkpoint nor executable."""
    sniffed = sniff(path)
    file = FileAudit(path.name, f"this is {sniffed.what}")
    if look := _LOOK.get(sniffed.kind):
        look(path, file)
    elif "a part of a TensorFlow checkpoint" in sniffed.what:
        if path.suffix == ".meta":
            _not_followed(file, "a graph holds operations, which a program that imports it in TensorFlow runs")
        else:
            _only_numbers(path, file)
    elif risk := next((risk for part, risk in _OTHERS.items() if part in sniffed.what), None):
        file.verdict = UNKNOWN
        file.remarks.append(risk)
    else:
        return _old_pickle(path, file)
    return file


# What `sniff` calls formats that are not read, and what they may hold.
_OTHERS: Mapping[str, str] = MappingProxyType(
    {
        "HDF5": "Keras files may hold Python code (Lambda layers), which Keras runs unless told not to (safe_mode)",
        "NumPy": "NumPy files may hold pickled objects, which numpy.load runs with allow_pickle=True",
        "tar archive": "PyTorch's oldest files are tar archives of pickles: not looked into",
        "a program (ELF)": "a program",
    }
)


def _old_pickle(path: Path, file: FileAudit) -> FileAudit | None:
    """Protocols 0 and 1 begin with anything: what can be read as such a pickle is one."""
    try:
        data = DataFile(path)
        found, _ = audit_pickle(path, data.map(0, min(len(data), MAX_PICKLES)))
    except FormatError:
        return None
    if found.remarks and not found.names:
        return None
    file.what += ", and a pickle"
    _merge(file, "the pickle", found)
    file.verdict = _worst(file)
    return file


def _worst(file: FileAudit) -> str:
    return max([HARMLESS, file.verdict, *(name.verdict for name in file.names)], key=_RANK.index)


def _only_numbers(path: Path, file: FileAudit) -> None:
    file.remarks.append("the format holds numbers and text: there is nothing in it that could be executed")


def _gguf(path: Path, file: FileAudit) -> None:
    from .gguf import Gguf

    _only_numbers(path, file)
    try:
        templates = [key for key in Gguf(path).metadata if key.startswith("tokenizer.chat_template")]
    except LoadstoneError as error:
        file.remarks.append(f"its header cannot be read ({_problem(error)})")
        return
    if templates:
        file.remarks.append(f"{few(templates)}: {_TEMPLATE}")


_TEMPLATE = "a program in the template language Jinja, which Loadstone renders in a sandbox, with limits"


def _pickles(path: Path, file: FileAudit) -> None:
    """A zip archive's pickles, or the pickles at the beginning of the file."""
    try:
        data = DataFile(path)
        is_zip = data.read(0, min(4, len(data))).startswith(b"PK")
        for where, found in (_in_archive if is_zip else _in_a_row)(data, file):
            _merge(file, where, found)
    except FormatError as error:
        _not_followed(file, _problem(error))
    file.verdict = _worst(file)


def _merge(file: FileAudit, where: str, found: PickleAudit) -> None:
    by_name = {name.name: name for name in file.names}
    for name in found.names.values():
        if name.name not in by_name:
            file.names.append(name)
            continue
        kept = by_name[name.name]
        kept.calls, kept.example = kept.calls + name.calls, kept.example or name.example
    file.remarks += [f"{where}: {remark}" for remark in found.remarks]
    if found.remarks:
        file.verdict = UNKNOWN


def _not_followed(file: FileAudit, remark: str) -> None:
    file.remarks.append(remark)
    file.verdict = UNKNOWN


def _problem(error: LoadstoneError) -> str:
    return error.problem.rstrip(".") if isinstance(error, FormatError) else str(error)


def _in_a_row(data: DataFile, file: FileAudit) -> Iterator[tuple[str, PickleAudit]]:
    mapped = data.map(0, min(len(data), MAX_PICKLES))
    # Behind torch's five pickles come numbers, which may look like a pickle.
    limit = 5 if MAGIC_NUMBER.to_bytes(10, "little") in mapped[:64] else MAX_IN_A_ROW
    position, number = 0, 0
    while position < len(mapped) and mapped[position] == 0x80 and number < limit:
        found, position = audit_pickle(data.path, mapped, position)
        number += 1
        yield f"pickle {number}", found
    if number > 1:
        file.remarks.append(f"{number} pickles one after the other, as in torch.save's older format")


def _in_archive(data: DataFile, file: FileAudit) -> Iterator[tuple[str, PickleAudit]]:
    try:
        with data.stream() as stream, zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
    except Exception as error:  # zipfile's errors have no common class
        _not_followed(file, f"its zip directory cannot be read ({printable(str(error))}): pickles in it are not listed")
        return
    names = [info.filename for info in infos]
    if any("/code/" in f"/{name}" or name.endswith("constants.pkl") for name in names):
        _not_followed(file, "a TorchScript program: torch.jit.load, and torch.load of old, run what is in its code/")
    if len(set(names)) != len(names):
        _not_followed(file, "two entries have the same name: programs differ in which one they load; both are listed")
    pickles = [info for info in infos if info.filename.endswith((".pkl", ".pickle")) or "data.pkl" in info.filename]
    if len(pickles) > MAX_ENTRIES:
        _not_followed(file, f"it holds {len(pickles):,} pickles, of which {MAX_ENTRIES} were looked at")
    for info in pickles[:MAX_ENTRIES]:
        entry = printable(info.filename)
        try:
            yield entry, audit_pickle(data.path, inflate(data, zip_region(data, info)))[0]
        except FormatError as error:
            _not_followed(file, f"{entry}: {_problem(error)}")


_LOOK: Mapping[str, Callable[[Path, FileAudit], None]] = MappingProxyType(
    {"torch": _pickles, "unsure": _pickles, "safetensors": _only_numbers, "index": _only_numbers}
    | {"bundle": _only_numbers, "gguf": _gguf}
)


# -- what lies beside the weights


def _beside(folder: Path) -> Iterator[str]:
    code = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".py", ".so", ".dll", ".sh", ".exe"))
    if code:
        yield f"{few(map(visible, code))}: code; Loadstone never imports or runs it"
    config = _json_object(folder / "config.json")
    if "auto_map" in config:
        yield (
            f"config.json: auto_map ({shown(config['auto_map'])}) asks programs to run the model's own Python "
            "code (transformers with trust_remote_code=True); Loadstone never does"
        )
    tokenizer = _json_object(folder / "tokenizer_config.json")
    places = [name for name in ("chat_template.jinja", "chat_template.json") if (folder / name).is_file()]
    places += ["tokenizer_config.json"] if tokenizer.get("chat_template") else []
    if places:
        yield f"{few(places)}: {_TEMPLATE}"
    if "auto_map" in tokenizer:
        yield "tokenizer_config.json: auto_map asks programs to run Python code of its own; Loadstone never does"


def _json_object(path: Path) -> Mapping[str, Any]:
    """A JSON object; nothing where there is none, as this is not the place to complain."""
    try:
        file = DataFile(path)
        value = json.loads(file.read(0, min(len(file), MAX_TEXT)))
    except (OSError, ValueError, RecursionError):  # a FormatError is a ValueError
        return {}
    return value if isinstance(value, dict) else {}


# -- lines for a terminal


def audit_lines(found: Audit) -> Iterator[tuple[str, str]]:
    """(label, text) rows, as `report.inspect_lines` gives them; texts hold nothing that a terminal would obey."""
    for file in found.files:
        yield "file", f"{visible(file.file)}: {file.what}; {_SAYS[file.verdict]}"
        for wanted in VERDICTS:
            yield from _name_lines(wanted, [name for name in file.names if name.verdict == wanted])
        yield from (("note", visible(remark)) for remark in file.remarks)
    yield from (("beside", visible(remark)) for remark in found.beside)
    yield "verdict", f"{found.verdict}: {_SAYS[found.verdict]}" if found.files else "no checkpoint was found"


_SAYS: Mapping[str, str] = MappingProxyType(
    {
        NOTHING: "loading it runs no code",
        HARMLESS: "a pickle that asks only for what makes tensors and plain data",
        UNKNOWN: "loading it with another program may run code that Loadstone does not know",
        DANGEROUS: "loading it with a program that obeys pickles gives it that program; do not",
    }
)


def _name_lines(found: str, names: list[Named]) -> Iterator[tuple[str, str]]:
    if found == HARMLESS:
        if names:
            calls = sum(name.calls for name in names)
            yield HARMLESS, f"{len(names)} names, {calls:,} calls: {few(name.name for name in names)}"
        return
    label = found.upper() if found == DANGEROUS else found
    for name in names[:_LISTED]:
        times = f"called {name.calls:,} times, as in" if name.calls > 1 else "called:"
        yield label, visible(f"{name.name}, {times} {name.example}" if name.calls else f"{name.name}, imported")
    if len(names) > _LISTED:
        yield label, f"and {len(names) - _LISTED:,} more (--json lists all)"
