"""The audit names what a file would import and call, in the files that readers refuse too, and executes nothing."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import small_files
from fuzz.mutate import changed_pickle
from gguf_files import STRING, gguf_file, pair
from gguf_files import text as gguf_text
from hostile_pickle import (
    CALLS,
    PYTHON,
    SENTINEL,
    call,
    mapping,
    name,
    pickled,
    storage,
    tensor,
    text,
    tuple_of,
    write_legacy,
    write_zip,
)
from loadstone.checkpoint.audit import NOTHING, Audit, audit, audit_lines
from loadstone.checkpoint.audit_pickle import audit_pickle
from loadstone.checkpoint.pickle_names import DANGEROUS, HARMLESS, UNKNOWN, verdict
from loadstone.checkpoint.torch_values import HANDLERS
from loadstone.errors import SourceError
from torch_files import FORMATS, training_checkpoint


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / SENTINEL).exists(), "something was executed"


def verdicts(found: Audit) -> dict[str, str]:
    return {entry.name: entry.verdict for file in found.files for entry in file.names}


def lines(found: Audit) -> str:
    return "\n".join(f"{label} {line}" for label, line in audit_lines(found))


# -- pickles


@pytest.mark.parametrize("called", CALLS)
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_call_is_named_wherever_it_stands(here: Path, called: str, is_zip: bool) -> None:
    value = mapping(w=tensor(), bad=CALLS[called])
    found = audit((write_zip if is_zip else write_legacy)(here / "m.pt", value))
    assert found.verdict == DANGEROUS
    assert verdicts(found)[called] == DANGEROUS
    assert verdicts(found)["torch._utils._rebuild_tensor_v2"] == HARMLESS
    assert f"DANGEROUS {called}" in lines(found)


class Attack:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {SENTINEL}",)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("suffix", [".pkl", ".pt", ".bin", ""])
def test_what_python_pickles(here: Path, protocol: int, suffix: str) -> None:
    path = here / f"m{suffix}"
    path.write_bytes(pickle.dumps([1, Attack()], protocol))
    found = audit(path)
    assert verdicts(found)[f"{os.name}.system"] == DANGEROUS
    assert f"{os.name}.system('touch {SENTINEL}')" in lines(found)


@FORMATS
def test_what_torch_writes_is_harmless(here: Path, is_zip: bool) -> None:
    model, checkpoint = training_checkpoint()
    for i, value in enumerate((model.state_dict(), checkpoint)):
        torch.save(value, here / f"{i}.pt", _use_new_zipfile_serialization=is_zip)
    found = audit(here)
    assert found.verdict == HARMLESS, lines(found)
    assert not [remark for file in found.files for remark in file.remarks if "followed" in remark]
    torch.save(model, here / "module.pt", _use_new_zipfile_serialization=is_zip)
    found = audit(here / "module.pt")
    assert (found.verdict, verdicts(found)["torch.nn.modules.linear.Linear"]) == (UNKNOWN, UNKNOWN)


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(b"X\x03\0\0\0\xed\xa0\x800", id="a surrogate, which Python takes"),
        pytest.param(b"\x82\x01", id="an opcode that no checkpoint needs"),
        pytest.param(b"0", id="a stack that is empty"),
        pytest.param(name("x" * 2000, "y"), id="a name too long"),
        pytest.param(b"]" * 3 + b"b", id="a state for a list"),
    ],
)
@pytest.mark.parametrize(
    "bad", [name("os", "system"), text("os") + text("system") + b"\x93", b"(" + PYTHON + b"ios\nsystem\n"]
)
def test_what_follows_a_trick_is_still_named(here: Path, before: bytes, bad: bytes) -> None:
    path = here / "m.pkl"
    path.write_bytes(pickled(before + bad))
    found = audit(path)
    assert verdicts(found)["os.system"] == DANGEROUS
    assert "it could be followed up to byte" in lines(found)


def test_a_pickle_inside_a_pickle(here: Path) -> None:
    inner = pickle.dumps(Attack(), 2)
    bytes_of = b"B" + len(inner).to_bytes(4, "little") + inner
    for loader in (("torch.storage", "_load_from_bytes"), ("pickle", "loads")):
        found = audit(write_zip(here / "m.pt", mapping(w=tensor(), x=name(*loader) + tuple_of(bytes_of) + b"R")))
        assert verdicts(found)[f"{os.name}.system"] == DANGEROUS
        assert verdicts(found)[".".join(loader)] == DANGEROUS


def test_pickles_inside_pickles_without_end(here: Path) -> None:
    data = b"N."
    for _ in range(50):
        data = name("pickle", "loads") + tuple_of(b"B" + len(data).to_bytes(4, "little") + data) + b"R."
    (here / "m.pkl").write_bytes(b"\x80\x02" + data)
    assert "deeper than is followed" in lines(audit(here / "m.pkl"))


def test_every_pickle_of_an_old_file_is_looked_at(here: Path) -> None:
    heads: tuple[Any, ...] = (0x1950A86A20F9469CFC6C, 1001, {})
    parts = [pickle.dumps(part, 2) for part in heads]
    for position in range(6):
        placed = [*parts, pickle.dumps({}, 2), pickle.dumps([], 2)]
        placed.insert(position, pickle.dumps(Attack(), 2))
        (here / "m.pt").write_bytes(b"".join(placed[:5]))
        assert verdicts(audit(here / "m.pt")) == ({f"{os.name}.system": DANGEROUS} if position < 5 else {})
    # What lies behind the fifth are numbers: 128 elements begin as a pickle does.
    found = audit(write_legacy(here / "m.pt", mapping(w=tensor(storage(numel=128))), {"0": (128, bytes(512))}))
    assert found.verdict == HARMLESS, lines(found)


def test_examples_are_short_and_cannot_paint_the_terminal(here: Path) -> None:
    huge = text("\x1b[2J" + "x" * 5000)
    deep = b"(" * 500 + b"t" * 500
    value = call("my\x1b[31mlib", "Thing", huge, deep, *[b"K\x01"] * 50) + b"}" + text("k\n") + b"NsbN"
    (here / "m.pkl").write_bytes(pickled(value))
    shown = lines(audit(here / "m.pkl"))
    assert "my\\x1b[31mlib.Thing, called 2 times, as in my\\x1b[31mlib.Thing('\\x1b[2Jxxx" in shown
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) < 1000


def test_a_million_names_are_not_kept(here: Path) -> None:
    (here / "m.pkl").write_bytes(pickled(b"".join(name("m", f"n{i}") + b"0" for i in range(3000))))
    found = audit(here / "m.pkl")
    assert len(found.files[0].names) == 2000
    assert "it names more than 2,000 things" in lines(found)


# -- archives


def test_an_archive_with_several_pickles(here: Path) -> None:
    path = write_zip(here / "m.pt", mapping(w=tensor()))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/other.pkl", pickle.dumps(Attack(), 2))
        archive.writestr("archive/code/__torch__.py", "x")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("archive/data.pkl", pickled(name("builtins", "eval")))
    found = audit(path)
    assert verdicts(found)[f"{os.name}.system"] == verdicts(found)["builtins.eval"] == DANGEROUS
    assert "TorchScript" in lines(found)
    assert "two entries have the same name" in lines(found)


def test_an_archive_that_is_damaged(here: Path) -> None:
    raw = write_zip(here / "m.pt", mapping(w=tensor(), bad=CALLS["os.system"])).read_bytes()
    (here / "m.pt").write_bytes(raw[:-30])
    found = audit(here / "m.pt")
    assert found.verdict == UNKNOWN
    assert "its zip directory cannot be read" in lines(found)
    wrong = bytearray(raw)
    wrong[14:18] = b"\0\0\0\0"  # the checksum of data.pkl, at which torch does not look either
    (here / "m.pt").write_bytes(wrong)
    assert audit(here / "m.pt").verdict == DANGEROUS


# -- what cannot execute anything, and what lies beside


def test_formats_without_code(here: Path) -> None:
    template = pair("tokenizer.chat_template", STRING, gguf_text("{{ 1 }}"))
    (here / "m.gguf").write_bytes(gguf_file([template]))
    small_files.safetensors(here / "m.safetensors")
    small_files.bundle(here)
    found = audit(here)
    assert found.verdict == NOTHING, lines(found)
    assert "tokenizer.chat_template: a program in the template language Jinja" in lines(found)
    assert lines(found).count("there is nothing in it that could be executed") == 5


def test_what_lies_beside(here: Path) -> None:
    save_file({"w": np.ones(2, np.float32)}, here / "model.safetensors")
    (here / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "evil\x1b.M"}}))
    (here / "evil.py").touch()
    (here / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ x }}", "auto_map": {}}))
    for path in (here, here / "model.safetensors"):
        shown = lines(audit(path))
        assert "evil.py: code; Loadstone never imports or runs it" in shown
        assert "config.json: auto_map ({'AutoModel': 'evil\\x1b.M'}) asks programs to run the model's own" in shown
        assert "tokenizer_config.json: a program in the template language Jinja" in shown
        assert "tokenizer_config.json: auto_map" in shown


def test_other_files(here: Path) -> None:
    (here / "page.bin").write_text("<!doctype html><title>Not found</title>")
    np.save(here / "a.npy", np.ones(3))
    (here / "k.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    found = audit(here)
    assert [file.file for file in found.files] == ["a.npy", "k.h5"]
    assert found.verdict == UNKNOWN
    assert "Lambda layers" in lines(found)
    assert "verdict no checkpoint was found" in lines(audit(here / "page.bin"))
    with pytest.raises(SourceError, match="there is no such file or folder"):
        audit(here / "nothing")


def test_it_is_json(here: Path) -> None:
    found = audit(write_zip(here / "m.pt", mapping(w=tensor(), bad=CALLS["os.system"])))
    facts = json.loads(json.dumps(found.as_dict()))
    assert facts["verdict"] == DANGEROUS
    (entry,) = (entry for entry in facts["files"][0]["names"] if entry["name"] == "os.system")
    assert entry == {
        "name": "os.system", "verdict": DANGEROUS, "calls": 1, "example": f"os.system('touch {SENTINEL}')",
    }  # fmt: skip


# -- the verdicts


def test_the_closed_set_is_harmless() -> None:
    assert {verdict(known) for known in HANDLERS} == {HARMLESS}


@pytest.mark.parametrize(
    ("named", "wanted"),
    [
        *((f"{module}.f", DANGEROUS) for module in ("os", "subprocess", "builtins", "runpy", "ctypes", "dill")),
        *((f"torch.serialization.{inner}", DANGEROUS) for inner in ("os.system", "pickle.loads", "sys.modules.clear")),
        ("numpy.f2py.os.system", DANGEROUS),
        ("collections.OrderedDict.__init__.__globals__", DANGEROUS),
        ("my.Model.__subclasses__", DANGEROUS),
        ("torch.storage._load_from_bytes", DANGEROUS),
        ("torch.hub.load", DANGEROUS),
        ("types.CodeType", DANGEROUS),
        ("types.SimpleNamespace", HARMLESS),
        ("builtins.set", HARMLESS),
        ("builtins.getattr", UNKNOWN),
        ("torch.float8_e4m3fn", HARMLESS),
        ("torch.FloatStorage", HARMLESS),
        ("torch.nn.modules.linear.Linear", UNKNOWN),
        ("__main__.GPTConfig", UNKNOWN),
        ("functools.partial", UNKNOWN),
    ],
)
def test_verdicts(named: str, wanted: str) -> None:
    assert verdict(named) == wanted


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(CALLS)), st.randoms(use_true_random=False), st.binary(max_size=30))
def test_no_pickle_breaks_the_audit(called: str, random: Any, noise: bytes) -> None:
    data = pickled(mapping(w=tensor(), bad=CALLS[called]))
    for mutated in (changed_pickle(data, random), data[: random.randrange(len(data))] + noise):
        found, end = audit_pickle(Path("m.pkl"), mutated)
        assert end <= len(mutated)
        json.dumps([vars_of(entry) for entry in found.names.values()])


def vars_of(entry: Any) -> dict[str, Any]:
    return {key: getattr(entry, key) for key in entry.__slots__}
