"""Archives carry runs between machines, and nothing in one is trusted."""

import contextlib
import dataclasses
import gzip
import io
import json
import pickle
import random
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from satlib.cli import main
from satlib.errors import SatlibError
from satlib.study import archive
from satlib.study.ledger import Ledger
from satlib.study.records import DamageWarning, RunSpec, digest_of, render_record


def spec(number=0):
    return RunSpec("toy", {"number": number}, version=1)


def compute(number, size=10):
    def run(work):
        work.save_tensors("weights", {"a": torch.full((size,), float(number))})
        work.save_tensors("small", {"a": torch.arange(3) + number})
        return {"number": number}

    return run


@pytest.fixture
def source(tmp_path):
    """A ledger with three runs."""
    ledger = Ledger(tmp_path / "source")
    for number in range(3):
        ledger.get_or_compute(spec(number), compute(number), labels={"title": f"run {number}"})
    return ledger


@pytest.fixture
def target(tmp_path):
    return Ledger(tmp_path / "inner" / "target")


@pytest.fixture
def members(source, tmp_path):
    """The honest archive's members, name -> content, to be rearranged by the tests."""
    archive.pack(source, tmp_path / "honest.tar")
    with tarfile.open(tmp_path / "honest.tar", "r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def regular(path, content, **changes):
    header = tarfile.TarInfo(path)
    header.size = len(content)
    for field, value in changes.items():
        setattr(header, field, value)
    return header, content


def write(path, entries, form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for header, content in entries:
            tar.addfile(header, io.BytesIO(content))
    return path


def files(folder):
    """Every file below, with its content, apart from the ledger's lock files."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.suffix != ".lock" and not path.is_dir()
    }


@contextlib.contextmanager
def nothing_outside(tmp_path, target):
    """Whatever happens, files appear in the target's runs only, and nothing there is half-written."""
    before = files(tmp_path)
    yield
    inside = str(target.runs.relative_to(tmp_path)) + "/"
    assert {name: text for name, text in files(tmp_path).items() if not name.startswith(inside)} == before
    assert not list((target.runs / ".tmp").glob("*"))


# Carrying runs


def test_runs_arrive_as_they_were(source, target, tmp_path):
    packed = archive.pack(source, tmp_path / "runs.tar")
    assert packed.left_out == [] and packed.files == [tmp_path / "runs.tar"]
    assert packed.packed == [record.id for record in source.records()]
    merged = archive.merge(target, [tmp_path / "runs.tar"])
    assert (merged.merged, merged.present, merged.refused) == (packed.packed, [], [])
    for old in source.records():
        new = target.find(old.id, ["weights", "small"])
        assert new == dataclasses.replace(old, path=new.path)
        assert torch.equal(new.tensors("weights")["a"], old.tensors("weights")["a"])
    again = archive.merge(target, [tmp_path / "runs.tar", tmp_path / "runs.tar"])
    assert (again.merged, again.present, again.refused) == ([], packed.packed * 2, [])
    assert target.get_or_compute(spec(1), lambda work: pytest.fail("it was merged")).metrics == {"number": 1}


def interrupt(ledger, number=7, epoch=3):
    """A run that is cut off after it saved a checkpoint."""

    def cut_off(work):
        work.save_checkpoint({"a": torch.full((5000,), float(epoch))}, {"epoch": epoch})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.get_or_compute(spec(number), cut_off)


def resume(ledger, number=7):
    """The epoch that such a run would go on from."""
    epochs = []

    def go_on(work):
        tensors, info = work.load_checkpoint() or ({"a": torch.zeros(1)}, {"epoch": 0})
        assert (tensors["a"] == info["epoch"]).all()
        epochs.append(info["epoch"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.get_or_compute(spec(number), go_on)
    return epochs[0]


def test_an_unfinished_run_goes_on_elsewhere(source, target, tmp_path):
    interrupt(source)
    packed = archive.pack(source, tmp_path / "runs.tar")
    assert (len(packed.packed), packed.unfinished, packed.left_out) == (3, [spec(7).id], [])
    merged = archive.merge(target, [tmp_path / "runs.tar"])
    assert (len(merged.merged), merged.unfinished, merged.refused) == (3, [spec(7).id], [])
    assert resume(target) == 3
    interrupt(target, epoch=5)
    again = archive.merge(target, [tmp_path / "runs.tar"])
    assert spec(7).id in again.present and resume(target) == 5, "what is here stays"
    target.get_or_compute(spec(7), compute(7))
    assert archive.pack(target, tmp_path / "done.tar").unfinished == []
    assert archive.merge(target, [tmp_path / "runs.tar"]).unfinished == []


def test_an_unfinished_run_alone(target, tmp_path):
    ledger = Ledger(tmp_path / "source")
    interrupt(ledger)
    assert archive.pack(ledger, tmp_path / "one.tar").packed == []
    assert archive.merge(target, [tmp_path / "one.tar"]).unfinished == [spec(7).id]


def test_a_damaged_checkpoint_is_neither_packed_nor_merged(source, target, tmp_path):
    interrupt(source)
    archive.pack(source, tmp_path / "runs.tar")
    path = source.runs / ".work" / spec(7).id / "checkpoint"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    entry = regular(f"{spec(7).id}/checkpoint", bytes(content))
    write(tmp_path / "evil.tar", [entry])
    with nothing_outside(tmp_path, target):
        merged = archive.merge(target, [tmp_path / "evil.tar"])
    assert merged.unfinished == [] and "SHA-256" in merged.refused[0][1]
    assert resume(target) == 0
    path.write_bytes(content)
    assert archive.pack(source, tmp_path / "again.tar").unfinished == []


def test_the_same_runs_give_the_same_archive(source, tmp_path):
    archive.pack(source, tmp_path / "a.tar")
    archive.pack(source, tmp_path / "b.tar", ids=[record.id[:10] for record in reversed(source.records())])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {member.mtime for member in tar} == {0}


def test_only_the_named_runs_are_packed(source, target, tmp_path):
    run_id = spec(2).id
    assert archive.pack(source, tmp_path / "one.tar", ids=[run_id[:8], run_id]).packed == [run_id]
    assert archive.merge(target, [tmp_path / "one.tar"]).merged == [run_id]
    with pytest.raises(SatlibError, match="no sound record"):
        archive.pack(source, tmp_path / "none.tar", ids=["f" * 10])
    assert not (tmp_path / "none.tar").exists()


def test_runs_go_into_as_many_archives_as_it_takes(source, target, tmp_path):
    """Each but one with a single run is at most as large as asked for, and all together bring everything."""
    whole = archive.pack(source, tmp_path / "all.tar")
    (size,) = (file.stat().st_size for file in whole.files)
    limit = size * 0.75 / 1e6
    packed = archive.pack(source, tmp_path / "runs.tar", max_mb=limit)
    assert packed.packed == whole.packed and len(packed.files) > 1
    assert packed.files == [tmp_path / f"runs-{i + 1}.tar" for i in range(len(packed.files))]
    assert all(file.stat().st_size <= limit * 1e6 for file in packed.files)
    single = archive.pack(source, tmp_path / "each.tar", max_mb=1e-6)
    assert len(single.files) == len(whole.packed)
    assert archive.merge(target, packed.files).merged == whole.packed
    assert archive.merge(target, single.files).present == whole.packed
    with pytest.raises(SatlibError, match="max_mb=0: expected a positive number"):
        archive.pack(source, tmp_path / "none.tar", max_mb=0)


def test_a_whole_run_replaces_one_without_artefacts_and_not_the_other_way(source, target, tmp_path):
    archive.pack(source, tmp_path / "all.tar")
    (source.runs / spec(1).id / "weights.safetensors").unlink()
    packed = archive.pack(source, tmp_path / "runs.tar")
    assert archive.merge(target, [tmp_path / "runs.tar"]).merged == packed.packed
    thin = target.find(spec(1).id)
    assert thin.has("small") and not thin.has("weights")
    with pytest.raises(SatlibError, match="is not here"):
        thin.tensors("weights")
    assert archive.merge(target, [tmp_path / "all.tar"]).merged == [spec(1).id]
    assert target.find(spec(1).id, ["weights"]) is not None
    assert archive.merge(target, [tmp_path / "runs.tar"]).merged == []
    assert target.find(spec(1).id, ["weights"]) is not None


def test_a_damaged_run_is_left_out_by_name(source, tmp_path):
    path = source.runs / spec(1).id / "small.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.warns(DamageWarning, match="small.safetensors"):
        packed = archive.pack(source, tmp_path / "runs.tar")
    assert packed.left_out == [(spec(1).id, "damaged")] and len(packed.packed) == 2


def test_an_archive_that_cannot_be_written_leaves_nothing(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SatlibError, match="cannot be written"):
        archive.pack(source, tmp_path / "file" / "runs.tar")
    with pytest.raises(SatlibError, match="cannot be written"):
        archive.pack(source, tmp_path / "source")  # a folder
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "source"]


def test_an_empty_ledger_and_a_missing_archive_are_clear_errors(target, tmp_path):
    with pytest.raises(SatlibError, match="no run to pack"):
        archive.pack(target, tmp_path / "runs.tar")
    with pytest.raises(SatlibError, match="no such file"):
        archive.merge(target, [tmp_path / "runs.tar"])


def test_a_run_that_is_being_computed_is_refused_and_merged_the_next_time(source, target, tmp_path):
    archive.pack(source, tmp_path / "runs.tar")
    with target.lock(spec(1).id):
        merged = archive.merge(target, [tmp_path / "runs.tar"])
        assert len(merged.merged) == 2
        assert merged.refused == [(spec(1).id, "another process works on this run")]
    assert archive.merge(target, [tmp_path / "runs.tar"]).merged == [spec(1).id]


def test_a_damaged_run_is_set_aside_and_merged_anew(source, target, tmp_path):
    archive.pack(source, tmp_path / "runs.tar")
    archive.merge(target, [tmp_path / "runs.tar"])
    (target.runs / spec(0).id / "record.json").write_text("{}")
    with pytest.warns(DamageWarning, match="set aside"):
        assert archive.merge(target, [tmp_path / "runs.tar"]).merged == [spec(0).id]
    assert target.find(spec(0).id, ["weights"]) is not None


# Attacks: each is refused by name, the honest runs beside it still arrive

ONE = spec(1).id
LINK = {"type": tarfile.SYMTYPE, "linkname": "../../../../outside"}
HARD = {"type": tarfile.LNKTYPE, "linkname": f"{ONE}/record.json"}
DEVICE = {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3}


WRONG_NAMES = [
    "../outside.safetensors",
    "/satlib-outside.safetensors",
    f"{ONE}/../outside.safetensors",
    f"{ONE}/../../outside.npz",
    f"./{ONE}/small.safetensors",
    f"{ONE}//small.safetensors",
    f"{ONE}/deeper/small.safetensors",
    f"{ONE}/.hidden.safetensors",
    f"{ONE}/model.pkl",
    f"{ONE}/weights.pt",
    f"{ONE}/weights.npy",
    f"{ONE}/code.py",
    f"{ONE}/other.json",
    f"{ONE}/small.safetensors\n",
    f"{ONE}/na\u00efve.safetensors",
    f"{ONE}\\small.safetensors",
    f"{ONE.upper()}/small.safetensors",
    f"{ONE[:-1]}/small.safetensors",
    "record.json",
    ONE,
]


@pytest.mark.parametrize(
    "kind", [{}, LINK, DEVICE, {"type": tarfile.DIRTYPE}], ids=["file", "link", "device", "folder"]
)
def test_wrong_names_are_refused_and_nothing_is_written_for_them(members, target, tmp_path, kind):
    content = b"" if kind else pickle.dumps({"a": 1})
    evil = [regular(name, content, **kind) for name in WRONG_NAMES]
    write(tmp_path / "evil.tar", [*evil, *(regular(*item) for item in members.items())])
    with nothing_outside(tmp_path, target):
        merged = archive.merge(target, [tmp_path / "evil.tar"])
    assert len(merged.merged) == 3
    shown = [ascii(name.encode().decode("ascii", "surrogateescape")) for name in WRONG_NAMES]
    assert merged.refused == [(name, "not the name of a run's file") for name in shown]
    written = {str(path.relative_to(target.runs)) for path in target.runs.rglob("*") if path.suffix != ".lock"}
    assert {name for name in written if "/" in name} == set(members)
    assert not Path("/satlib-outside.safetensors").exists()


def forged(text, **changes):
    """A record with changes and a digest that fits them."""
    return render_record({**json.loads(text), **changes})


def artefacts(text, **changes):
    return {**json.loads(text)["artefacts"], **changes}


RECORD, WEIGHTS, SMALL = (f"{ONE}/{name}" for name in ("record.json", "weights.safetensors", "small.safetensors"))
ENTRY = {"sha256": "0" * 64, "bytes": 3}

ATTACKS = {
    "a symbolic link": (lambda m: [regular(SMALL, b"", **LINK)], "no regular file"),
    "a hard link": (lambda m: [regular(SMALL, b"", **HARD)], "no regular file"),
    "a device": (lambda m: [regular(SMALL, b"", **DEVICE)], "no regular file"),
    "a pipe": (lambda m: [regular(SMALL, b"", type=tarfile.FIFOTYPE)], "no regular file"),
    "a folder": (lambda m: [regular(SMALL, b"", type=tarfile.DIRTYPE)], "no regular file"),
    "a record that is a link": (lambda m: [regular(RECORD, b"", **LINK)], "no regular file"),
    "a member twice": (lambda m: [regular(SMALL, m[SMALL]), regular(SMALL, m[SMALL])], "comes twice"),
    "a record twice": (lambda m: [regular(RECORD, m[RECORD]), regular(RECORD, m[RECORD])], "comes twice"),
    "no record": (lambda m: [], "has no record"),
    "wrong content": (lambda m: [regular(SMALL, m[SMALL][:-1] + b"!")], "SHA-256 is not the recorded one"),
    "a wrong size": (lambda m: [regular(SMALL, m[SMALL] + b"!")], "the record says"),
    "an unlisted file": (lambda m: [regular(f"{ONE}/extra.npz", b"PK")], "extra.npz is not listed"),
    "another run's record": (lambda m: [regular(RECORD, m[f"{spec(2).id}/record.json"])], "its id is not"),
    "a changed metric": (lambda m: [regular(RECORD, m[RECORD].replace(b'"number": 1', b'"number": 9'))], "digest"),
    "a changed config": (lambda m: [regular(RECORD, forged(m[RECORD], config={"number": 5}))], "its id is not"),
    "a wrong hash": (
        lambda m: [regular(RECORD, forged(m[RECORD], artefacts=artefacts(m[RECORD], **{"small.safetensors": ENTRY})))],
        "the record says 3",
    ),
    "a listed path": (
        lambda m: [regular(RECORD, forged(m[RECORD], artefacts=artefacts(m[RECORD], **{"../x.npz": ENTRY})))],
        "not listed properly",
    ),
    "a listed pickle": (
        lambda m: [regular(RECORD, forged(m[RECORD], artefacts=artefacts(m[RECORD], **{"x.pkl": ENTRY})))],
        "not listed properly",
    ),
    "a negative size": (
        lambda m: [regular(RECORD, forged(m[RECORD], artefacts={"a.npz": {"sha256": "0" * 64, "bytes": -1}}))],
        "not listed properly",
    ),
    "no JSON": (lambda m: [regular(RECORD, b"\x80\x04K\x01.")], "not a record"),
    "not a number": (
        lambda m: [regular(RECORD, m[RECORD].replace(b'"number": 1\n', b'"number": NaN\n'))],
        "not a record",
    ),
    "a bottomless record": (lambda m: [regular(RECORD, b"[" * 1_000_000)], "not a record"),
    "a list": (lambda m: [regular(RECORD, b"[]")], "not a record"),
    "a number that is too long": (lambda m: [regular(RECORD, b"9" * 100_000)], "not a record"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_run_that_breaks_a_rule_is_refused_whole(members, target, tmp_path, attack):
    make, reason = ATTACKS[attack]
    replaced = make(members)
    if attack == "no record":
        names, replaced = {RECORD}, []
    else:
        names = {header.name for header, _ in replaced}
    entries = [regular(name, content) for name, content in members.items() if name not in names]
    write(tmp_path / "evil.tar", [*entries[:3], *replaced, *entries[3:]])
    with nothing_outside(tmp_path, target):
        merged = archive.merge(target, [tmp_path / "evil.tar"])
    assert [name for name, _ in merged.refused] == [ONE] and reason in merged.refused[0][1]
    assert sorted(merged.merged) == sorted([spec(0).id, spec(2).id])
    assert target.find(ONE) is None and not (target.runs / ONE).exists()


def header_of(name, size):
    header, _ = regular(name, b"")
    header.size = size
    return header.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (header_of(f"{ONE}/a.npz", 10**10), "unexpected end of data"),
        (header_of(f"{ONE}/a.npz", -512), "size -512"),
        (header_of(f"{ONE}/a.npz", 100) + b"short", "unexpected end of data"),
        (b"\x01" * 512, "no end"),
        (b"abc", "no end"),
        (b"", "no end"),
    ],
    ids=["huge", "negative", "cut short", "noise", "truncated", "no end"],
)
def test_an_archive_that_is_not_sound_to_its_end_says_so(members, target, tmp_path, tail, reason):
    path = write(tmp_path / "evil.tar", [regular(*item) for item in members.items()])
    with tarfile.open(path, "r:") as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    path.write_bytes(path.read_bytes()[:end] + tail)
    with nothing_outside(tmp_path, target):
        merged = archive.merge(target, [path])
    assert len(merged.merged) == 2  # the last run may be incomplete
    assert any(name == str(path) and reason in why for name, why in merged.refused)


@pytest.mark.parametrize("form", ["gz", "bz2", "xz"])
def test_compressed_archives_are_refused(source, target, tmp_path, form):
    archive.pack(source, tmp_path / "runs.tar")
    with tarfile.open(tmp_path / "evil.tar", f"w:{form}") as tar:
        tar.add(source.runs / ONE, ONE)
    merged = archive.merge(target, [tmp_path / "evil.tar", tmp_path / "runs.tar"])
    assert len(merged.merged) == 3 and [name for name, _ in merged.refused] == [str(tmp_path / "evil.tar")]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_long_names_are_refused(members, target, tmp_path, form):
    long = f"{ONE}/{'a' * 300}.npz"
    write(tmp_path / "evil.tar", [*(regular(*item) for item in members.items()), regular(long, b"")], form)
    with nothing_outside(tmp_path, target):
        merged = archive.merge(target, [tmp_path / "evil.tar"])
    assert len(merged.merged) == 3 and merged.refused == [(ascii(long), "not the name of a run's file")]


def test_a_sparse_file_is_refused(members, target, tmp_path):
    """A few bytes in the archive, 10^12 on the disk."""
    header, content = regular(SMALL, b"")
    header.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(10**12)}
    entries = [regular(*item) for item in members.items() if item[0] != SMALL]
    write(tmp_path / "evil.tar", [*entries, (header, content)], tarfile.PAX_FORMAT)
    merged = archive.merge(target, [tmp_path / "evil.tar"])
    assert len(merged.merged) == 2 and "no regular file" in str(merged.refused)


def test_other_files_are_no_archives(target, tmp_path):
    contents = {"empty": b"", "text": b"hello" * 500, "pickle": pickle.dumps([1]), "zip": gzip.compress(b"x" * 9999)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    merged = archive.merge(target, [tmp_path / name for name in contents])
    assert [name for name, _ in merged.refused] == [str(tmp_path / name) for name in contents]
    assert not target.records()


def test_an_archive_by_plain_tar_is_merged_where_it_keeps_the_rules(source, target, tmp_path):
    with tarfile.open(tmp_path / "plain.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for run_id in source.ids():
            tar.add(source.runs / run_id, run_id)
    merged = archive.merge(target, [tmp_path / "plain.tar"])
    assert merged.merged == source.ids()
    assert {reason for _, reason in merged.refused} == {"not the name of a run's file"}  # the folders themselves


def test_a_flipped_bit_anywhere_merges_honest_runs_or_none(source, tmp_path):
    archive.pack(source, tmp_path / "honest.tar", ids=[ONE])
    honest, chance = (tmp_path / "honest.tar").read_bytes(), random.Random(3)
    used = (tmp_path / "honest.tar").stat().st_size * 8
    merged = refused = 0
    for attempt in range(60):
        evil = bytearray(honest)
        bit = chance.randrange(used)
        evil[bit // 8] ^= 1 << bit % 8
        path = tmp_path / f"{attempt}.tar"
        path.write_bytes(evil)
        target = Ledger(tmp_path / "targets" / str(attempt))
        with nothing_outside(tmp_path, target):
            result = archive.merge(target, [path])
        record = target.find(ONE)
        merged, refused = merged + len(result.merged), refused + bool(result.refused)
        if record is not None:
            assert record.digest == source.find(ONE).digest
        path.unlink()
        shutil.rmtree(target.root, ignore_errors=True)
    assert merged and refused


def test_the_forgeries_above_carry_a_fitting_digest(members):
    content = json.loads(members[RECORD])
    assert forged(members[RECORD]) == members[RECORD]
    del content["digest"]
    assert json.loads(members[RECORD])["digest"] == digest_of(content)


def test_merging_by_relative_path(source, target, tmp_path, monkeypatch):
    archive.pack(source, tmp_path / "runs.tar")
    monkeypatch.chdir(tmp_path)
    assert len(archive.merge(target, ["runs.tar"]).merged) == 3 and Path("inner/target/runs").is_dir()


def test_the_commands_pack_and_merge(source, target, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SATLIB_HOME", str(tmp_path / "home"))
    shutil.copytree(source.root, tmp_path / "home" / "data")
    assert main(["ledger", "pack", str(tmp_path / "runs.tar")]) == 0
    shutil.rmtree(tmp_path / "home" / "data")
    assert main(["ledger", "merge", str(tmp_path / "runs.tar")]) == 0
    out = capsys.readouterr().out
    assert "3 runs packed: " in out and "runs.tar (" in out and "3 runs merged, 0 were already there, 0 refused" in out
