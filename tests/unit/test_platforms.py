"""What Linux and macOS differ in, with the other system's answers put in."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import resource
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import apsw
import pytest

from ksi.host.platforms import (
    find_socket,
    folds_case,
    peer_pid,
    peer_uid,
    private_folder,
    raise_file_limit,
    runtime_folders,
    socket_place,
    sync,
    sync_folder,
    uid_of_xucred,
)
from ksi.store.sqlite.checkpoint import sync_fully

ROOT = Path(__file__).parents[2]
INFINITY = resource.RLIM_INFINITY


class Limits:
    """A system that accepts file limits up to a highest one."""

    def __init__(self, soft: int, hard: int, highest: int) -> None:
        self.now = (soft, hard)
        self.highest = highest

    def get(self, which: int) -> tuple[int, int]:
        assert which == resource.RLIMIT_NOFILE
        return self.now

    def put(self, which: int, limits: tuple[int, int]) -> None:
        assert limits[1] == self.now[1], "the hard limit stays"
        if limits[0] == INFINITY or limits[0] > self.highest:
            raise ValueError("current limit exceeds maximum limit")
        self.now = limits


@pytest.mark.promise("O12")
@pytest.mark.parametrize(
    ("soft", "hard", "highest", "reached"),
    [
        (1_024, 524_288, 1_048_576, 524_288),
        (1_024, 4_096, 1_048_576, 4_096),
        (256, INFINITY, 10_240, 10_240),
        (256, INFINITY, 24_576, 24_576),
        (256, INFINITY, 245_760, 65_536),
        (256, INFINITY, 300, 256),
        (256, 9_223_372_036_854_775_807, 10_240, 10_240),
        (INFINITY, INFINITY, 10_240, INFINITY),
        (200_000, INFINITY, 245_760, 200_000),
        (4_096, 4_096, 10, 4_096),
    ],
)
def test_the_highest_limit_of_files_that_the_system_accepts_holds(
    soft: int, hard: int, highest: int, reached: int
) -> None:
    limits = Limits(soft, hard, highest)
    assert raise_file_limit(limits.get, limits.put) == reached
    assert limits.now == (reached, hard)


@pytest.mark.promise("O12")
def test_a_file_is_synced_to_the_disk_itself_if_the_system_distinguishes_the_two(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[int, int]] = []
    plain: list[int] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda file, command: asked.append((file, command)))
    monkeypatch.setattr(os, "fsync", plain.append)
    sync(7)
    assert (asked, plain) == ([(7, 51)], [])
    sync_folder(tmp_path)
    assert len(asked) == 2


@pytest.mark.promise("O12")
def test_a_file_system_without_a_full_sync_gets_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, command: int) -> int:
        raise OSError(errno.ENOTSUP, "not supported")

    plain: list[int] = []
    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    monkeypatch.setattr(os, "fsync", plain.append)
    sync(7)
    assert plain == [7]


@pytest.mark.promise("O12")
@pytest.mark.parametrize("commits", [True, False])
def test_sqlite_is_set_to_sync_fully(tmp_path: Path, commits: bool) -> None:
    connection = apsw.Connection(str(tmp_path / "a.db"))
    sync_fully(connection, commits=commits)
    assert connection.pragma("fullfsync") == int(commits)
    assert connection.pragma("checkpoint_fullfsync") == 1
    connection.close()


@pytest.mark.promise("O12", "S2")
def test_the_peers_user_is_read_from_the_structure_of_macos() -> None:
    assert uid_of_xucred(struct.pack("@IIh16I", 0, 501, 2, 20, 12, *[0] * 14)) == 501
    assert uid_of_xucred(struct.pack("2I", 0, 4_294_967_294)) == 4_294_967_294


@pytest.mark.promise("O12", "S2")
@pytest.mark.parametrize("told", [b"", b"\0\0\0\0", struct.pack("2I", 1, 0) + bytes(68)])
def test_a_structure_of_another_layout_is_not_trusted(told: bytes) -> None:
    with pytest.raises(OSError, match="the peer"):
        uid_of_xucred(told)


@pytest.mark.promise("O12", "S2")
def test_a_system_without_so_peercred_is_asked_as_macos_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    class Peer(socket.socket):
        def getsockopt(self, level: int, option: int, size: int = 0) -> bytes:  # type: ignore[override]
            asked.append((level, option, size))
            return struct.pack("2I", 0, 501) + bytes(68)

    monkeypatch.delattr(socket, "SO_PEERCRED", raising=False)
    with Peer() as peer:
        assert peer_uid(peer) == 501
    assert asked == [(0, 1, 76)], "SOL_LOCAL, LOCAL_PEERCRED, the size of a struct xucred"


@pytest.mark.promise("M2", "O12")
def test_the_process_at_the_other_end_is_known_on_both_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    class Peer(socket.socket):
        def getsockopt(self, level: int, option: int, size: int = 0) -> bytes:  # type: ignore[override]
            asked.append((level, option, size))
            return struct.pack("i", 4711)

    one, other = socket.socketpair()
    with one, other:
        assert peer_pid(one) == os.getpid()
    monkeypatch.delattr(socket, "SO_PEERCRED", raising=False)
    with Peer() as peer:
        assert peer_pid(peer) == 4711
    assert asked == [(0, 2, 4)], "SOL_LOCAL, LOCAL_PEERPID, the size of an int"


def folders(*names: Path) -> Iterator[Path]:
    yield from names


@pytest.mark.promise("O12")
def test_a_path_that_fits_is_the_sockets_place() -> None:
    assert socket_place(Path("/home/me/ksi/var/run/daemon.sock")) == Path("/home/me/ksi/var/run/daemon.sock")


@pytest.mark.promise("O12")
def test_a_path_that_is_too_long_gets_a_short_place_of_its_own_in_the_first_folder_that_fits() -> None:
    one, other = (Path("/home") / ("é" * 60) / name for name in ("a.sock", "b.sock"))
    long, short = Path("/" + "x" * 90), Path("/run/user/501")
    place = socket_place(one, lambda: folders(long, short))
    assert place is not None
    assert place.parent == short / f"ksi-{os.geteuid()}"
    assert place == socket_place(one, lambda: folders(short))
    assert place != socket_place(other, lambda: folders(short))
    assert socket_place(one, lambda: folders(long)) is None


@pytest.mark.promise("O12")
def test_the_temporary_folder_of_macos_is_short_enough() -> None:
    temporary = Path("/private/var/folders/zz/zyxvpxvq6csfxvn_n0000000000000/T")
    place = socket_place(Path("/Users") / ("x" * 120), lambda: folders(temporary))
    assert place is not None
    assert len(os.fsencode(place)) <= 103


@pytest.mark.promise("O12")
def test_a_folder_of_the_session_comes_before_the_temporary_one(tmp_path: Path) -> None:
    first, *_ = runtime_folders({"XDG_RUNTIME_DIR": str(tmp_path)})
    assert first == tmp_path
    assert Path("/gone") not in list(runtime_folders({"XDG_RUNTIME_DIR": "/gone"}))


@pytest.mark.promise("O12")
def test_a_client_finds_a_socket_by_the_link_at_its_long_path(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 110)
    assert find_socket(long) == long
    long.symlink_to("/run/short.sock")
    assert find_socket(long) == Path("/run/short.sock")
    brief = Path("/tmp/brief.sock")
    assert find_socket(brief) == brief


@pytest.mark.promise("O12", "S2")
def test_a_short_place_in_a_shared_folder_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "ksi-501"
    folder.mkdir(mode=0o777)
    private_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(PermissionError, match="another user"):
        private_folder(tmp_path / "link")
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(PermissionError, match="another user"):
        private_folder(folder)


@pytest.mark.promise("O12")
def test_a_disk_that_folds_case_is_known_by_its_folders(tmp_path: Path) -> None:
    folder = tmp_path / "responses"
    assert not folds_case(folder), "it is not there yet"
    folder.mkdir()
    assert not folds_case(folder)
    other = tmp_path / "RESPONSES"
    other.mkdir()
    assert not folds_case(folder), "another folder of such a name"
    other.rmdir()
    other.symlink_to(folder)  # one folder under both names, as such a disk has it
    assert folds_case(folder)


LINUX_HELP = "\t\t-N\t\tShutdown the network socket after EOF on stdin"
MACOS_HELP = "\t\t-N num_probes\tNumber of probes to send before generating a write timeout event"


@pytest.mark.promise("O12")
@pytest.mark.parametrize(
    ("words", "arguments"),
    [(LINUX_HELP, ["-N", "-U", "var/run/daemon.sock"]), (MACOS_HELP, ["-U", "var/run/daemon.sock"])],
    ids=["netcat-openbsd", "macos"],
)
def test_the_readmes_line_uses_nc_as_each_system_has_it(tmp_path: Path, words: str, arguments: list[str]) -> None:
    (line,) = re.findall(r"```sh\n(echo [^`]*\bnc\b[^`]*)```", (ROOT / "README.md").read_text())
    nc = tmp_path / "nc"
    nc.write_text(f'#!/bin/sh\nif [ "$1" = -h ]; then echo "{words}" >&2; exit 1; fi\nprintf "%s\\n" "$@"; cat\n')
    nc.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", "-c", line], env=environ, capture_output=True, text=True, check=True, timeout=30)
    *found, sent = done.stdout.splitlines()
    assert found == arguments
    assert json.loads(sent)["event"] == "completion:request"
