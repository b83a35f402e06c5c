"""Whole or not at all: every write is killed and failed at each of its system calls."""

from __future__ import annotations

import errno
import os
import stat
import time

import pytest
from disk.syscalls import deny, every_point, in_child

from runmgr.disk import atomic

OLD, NEW = b"old " * 1000, b"new " * 2000
FILE_CALLS = ("openat", "write", "fsync", "fchmod", "rename,renameat,renameat2", "close")
LINK_CALLS = ("link,linkat", "rename,renameat,renameat2", "unlink,unlinkat")


def write_bytes(folder):
    atomic.write_bytes(folder / "name", NEW)


def new_read_only_file(folder):
    with atomic.new_file(folder / "name", mode=0o444) as descriptor:
        atomic.write_all(descriptor, NEW)


def create_bytes(folder):
    atomic.create_bytes(folder / "name", NEW)


def point_name(folder):
    atomic.point_name(folder / "name", folder / "target")


WRITERS = {
    write_bytes: (FILE_CALLS, True),
    new_read_only_file: (FILE_CALLS, True),
    create_bytes: ((*FILE_CALLS, "link,linkat", "unlink,unlinkat"), False),
    point_name: (LINK_CALLS, True),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def prepare(folder, writer):
    for path in folder.iterdir():
        path.unlink()
    if WRITERS[writer][1]:
        (folder / "name").write_bytes(OLD)
    if writer is point_name:
        (folder / "target").write_bytes(NEW)


def temporaries(folder):
    return [path.name for path in folder.iterdir() if atomic.TEMPORARY in path.name]


def content(folder):
    return (folder / "name").read_bytes() if (folder / "name").exists() else None


@pytest.mark.needs("strace")
@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_killed_at_any_system_call_leaves_the_old_file_or_the_new_one(writer, folder, tmp_path):
    calls, replaces = WRITERS[writer]
    found = set()

    def check(call, nth, ended):
        assert ended.was_killed
        found.add(content(folder))
        names = {path.name for path in folder.iterdir() if atomic.TEMPORARY not in path.name}
        assert names <= {"name", "target"}, (call, nth)

    points = every_point(
        lambda: writer(folder), tmp_path / "log", calls=calls, fault="signal=SIGKILL",
        before=lambda: prepare(folder, writer), after=check,
    )  # fmt: skip
    assert points >= len(calls) - 1
    assert found == {OLD if replaces else None, NEW}


@pytest.mark.needs("strace")
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EROFS"])
@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_an_error_at_any_system_call_is_raised_with_a_path_and_leaves_no_part(writer, error, folder, tmp_path):
    calls, replaces = WRITERS[writer]

    def check(call, nth, ended):
        point = f"{call} #{nth}"
        assert isinstance(ended.error, OSError), point
        assert ended.error.errno == getattr(errno, error), point
        assert str(ended.error.filename).startswith(str(folder)), point
        assert content(folder) in {OLD if replaces else None, NEW}, point
        if "unlink" not in call:
            assert temporaries(folder) == [], point

    every_point(
        lambda: writer(folder), tmp_path / "log", calls=calls, fault=f"error={error}",
        before=lambda: prepare(folder, writer), after=check,
    )  # fmt: skip


@pytest.mark.needs("strace")
def test_a_call_that_writes_only_a_part_is_followed_by_the_rest(folder, tmp_path):
    from disk.syscalls import with_fault

    def write_in_parts():
        original, os.write = os.write, lambda descriptor, data: original(descriptor, data[:100])
        try:
            atomic.write_bytes(folder / "name", NEW)
        finally:
            os.write = original

    ended = with_fault(write_in_parts, tmp_path / "log", call="write", nth=99, fault="error=EIO")
    assert ended.error is None
    assert content(folder) == NEW


@pytest.mark.parametrize(
    "error", [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get
)
def test_where_links_do_not_work_a_name_is_a_copy_and_a_creation_still_has_one_winner(error, folder):
    (folder / "target").write_bytes(NEW)
    (folder / "name").write_bytes(OLD)

    def without_links():
        deny("link", "linkat", error=error)
        atomic.point_name(folder / "name", folder / "target")
        atomic.create_bytes(folder / "created", NEW)
        with pytest.raises(FileExistsError):
            atomic.create_bytes(folder / "created", OLD)

    in_child(without_links)
    assert content(folder) == (folder / "created").read_bytes() == NEW
    assert not (folder / "name").samefile(folder / "target")
    assert stat.S_IMODE((folder / "name").stat().st_mode) & 0o222 == 0
    assert temporaries(folder) == []


@pytest.mark.parametrize(
    ("error", "asked"),
    [(errno.EPERM, 1), (errno.EOPNOTSUPP, 1), (errno.ENOSYS, 1), (errno.EXDEV, 3), (errno.EMLINK, 3)],
)
def test_only_a_file_system_that_has_no_links_at_all_is_asked_just_once(error, asked, folder):
    (folder / "target").write_bytes(NEW)
    link, calls = os.link, []

    def count(*paths):
        calls.append(paths)
        link(*paths)

    def without_links():
        os.link = count
        deny("link", "linkat", error=error)
        for _ in range(3):
            atomic.point_name(folder / "name", folder / "target")
        return len(calls)

    assert in_child(without_links) == asked
    assert content(folder) == NEW


def test_an_error_of_a_link_that_says_nothing_about_links_is_raised(folder):
    (folder / "target").write_bytes(NEW)
    (folder / "name").write_bytes(OLD)

    def full():
        deny("link", "linkat", error=errno.ENOSPC)
        for attempt in (point_name, create_bytes):
            with pytest.raises(OSError, match="No space left"):
                attempt(folder)

    in_child(full)
    assert content(folder) == OLD
    assert temporaries(folder) == []


def test_a_copy_is_whole_where_the_kernel_cannot_copy_by_itself(folder):
    (folder / "target").write_bytes(NEW)

    def without_ranges():
        deny("copy_file_range", error=errno.EXDEV)
        atomic.copy(folder / "target", folder / "name")

    in_child(without_ranges)
    assert content(folder) == NEW


def test_pointing_a_name_at_the_file_it_already_names_leaves_no_temporary(folder):
    (folder / "target").write_bytes(NEW)
    for _ in range(2):
        point_name(folder)
    assert (folder / "name").samefile(folder / "target")
    assert sorted(os.listdir(folder)) == ["name", "target"]


@pytest.mark.parametrize(
    ("umask", "mode", "expected"),
    [(0o022, 0o666, 0o644), (0o077, 0o666, 0o600), (0o002, 0o444, 0o444), (0o027, 0o444, 0o440), (0, 0o666, 0o666)],
    ids=lambda value: f"{value:03o}",
)
def test_the_umask_and_a_setgid_directory_rule_over_modes(umask, mode, expected, folder):
    group = 12345 if os.geteuid() == 0 else os.getegid()
    os.chown(folder, -1, group)
    folder.chmod(0o2777)

    def write():
        os.umask(umask)
        with atomic.new_file(folder / "name", mode=mode) as descriptor:
            atomic.write_all(descriptor, NEW)
        return stat.S_IMODE((folder / "name").stat().st_mode), (folder / "name").stat().st_gid

    assert in_child(write) == (expected, group)


def test_of_many_processes_that_create_one_file_at_once_one_wins_and_no_reader_sees_a_part(folder):
    from processes import run_ranks, values

    start = time.monotonic() + 0.3

    def create(rank):
        time.sleep(max(0.0, start - time.monotonic()))
        try:
            atomic.create_bytes(folder / "name", b"%d" % rank * 100_000)
        except FileExistsError:
            found = content(folder)
            return False, len(set(found)) == 1
        return True, True

    found = values(run_ranks(8, create, store="none"))
    assert [won for won, _ in found].count(True) == 1
    assert all(whole for _, whole in found)
    assert os.listdir(folder) == ["name"]


def test_an_error_inside_the_block_leaves_what_was_there(folder):
    (folder / "name").write_bytes(OLD)

    def write_half():
        with atomic.new_file(folder / "name") as descriptor:
            atomic.write_all(descriptor, NEW)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert content(folder) == OLD
    assert os.listdir(folder) == ["name"]


def test_json_is_utf8_strict_and_keeps_undecodable_file_names(folder):
    atomic.write_json(folder / "name", {"path": "\udce4", "text": "ä🚀"})
    assert content(folder) == b'{\n "path": "\xe4",\n "text": "\xc3\xa4\xf0\x9f\x9a\x80"\n}\n'
    with pytest.raises(ValueError, match="Out of range float"):
        atomic.write_json(folder / "name", {"x": float("nan")})
    assert os.listdir(folder) == ["name"]


def test_a_file_system_that_does_not_know_its_size_refuses_nothing(tmp_path):
    assert 0 < atomic.free_bytes(tmp_path) < 1 << 50
    size = os.statvfs("/proc")
    assert size.f_blocks == 0
    assert atomic.free_bytes(type(tmp_path)("/proc")) == 1 << 62


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    path.write_bytes(b"new")
    stale, true = [OSError(errno.ESTALE, "Stale file handle", str(path))], type(path).read_bytes

    def read(self):
        if stale:
            raise stale.pop()
        return true(self)

    monkeypatch.setattr(type(path), "read_bytes", read)
    assert atomic.read_bytes(path) == b"new"
    assert not stale
