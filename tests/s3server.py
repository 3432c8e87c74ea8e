"""A real S3 server for tests: Ceph RGW on loopback, data in memory, gone with its context.

One monitor, one memstore OSD, one gateway, all children of this process that end with it. The folder's path is short
because sockets in it must fit into 107 bytes. Every secret is generated.
"""

from __future__ import annotations

import ctypes
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
INSTALL = "apt-get install -y --no-install-recommends radosgw ceph-mon ceph-osd"
START_SECONDS = 120
PR_SET_PDEATHSIG = 1

CONFIGURATION = """
[global]
fsid={fsid}
mon_host={addresses}
public_addr=127.0.0.1
public_network=127.0.0.0/8
auth_cluster_required=cephx
auth_service_required=cephx
auth_client_required=cephx
osd_pool_default_size=1
osd_pool_default_min_size=1
osd_pool_default_pg_num=1
osd_pool_default_pgp_num=1
osd_pool_default_pg_autoscale_mode=off
mon_allow_pool_size_one=true
mon_warn_on_pool_no_redundancy=false
mon_data_avail_crit=1
mon_data_avail_warn=1
osd_crush_chooseleaf_type=0
osd_objectstore=memstore
memstore_device_bytes=4294967296
ms_bind_ipv6=false
run_dir={folder}
admin_socket={folder}/$name.asok
log_file={folder}/$name.log
pid_file={folder}/$name.pid
mon_data={folder}/mon
osd_data={folder}/osd
keyring={folder}/keyring
[client.rgw]
rgw_data={folder}/rgw
rgw_frontends=beast endpoint=127.0.0.1:{port}
rgw_thread_pool_size=32
rgw_enable_usage_log=false
"""

CAPABILITIES = {
    "mon.": ("mon", "allow *"),
    "client.admin": ("mon", "allow *", "osd", "allow *", "mgr", "allow *"),
    "client.rgw": ("mon", "allow rw", "osd", "allow rwx"),
    "osd.0": ("mon", "allow profile osd", "osd", "allow *"),
}


class NoServerError(Exception):
    """The server cannot be had on this machine; the message says how it could be."""


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running server, an account on it, and the variables by which AWS clients find both."""

    endpoint: str
    access_key: str
    secret_key: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_REQUEST_CHECKSUM_CALCULATION": "WHEN_REQUIRED",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "WHEN_REQUIRED",
        }


@contextmanager
def s3_server() -> Iterator[Server]:
    """Run a server; `NoServerError` where its programs are not installed."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise NoServerError(f"no {', '.join(missing)} here: {INSTALL}")
    folder = Path(tempfile.mkdtemp(prefix="s3-", dir="/tmp"))
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        yield _start(folder, daemons)
    finally:
        for daemon in reversed(daemons):
            _stop(daemon)
        shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, daemons: list[subprocess.Popen[bytes]]) -> Server:
    port, addresses, fsid = (
        _free_port(),
        f"[v2:127.0.0.1:{_free_port()},v1:127.0.0.1:{_free_port()}]",
        str(uuid.uuid4()),
    )
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    text = CONFIGURATION.format(fsid=fsid, addresses=addresses, folder=folder, port=port)
    (folder / "ceph.conf").write_text(text)
    monmap, keyring = str(folder / "monmap"), str(folder / "keyring")
    _run(folder, "monmaptool", "--create", "--addv", "a", addresses, "--fsid", fsid, monmap)
    _run(folder, "ceph-authtool", "--create-keyring", keyring)
    for name, pairs in CAPABILITIES.items():
        caps = [word for kind, rule in zip(pairs[::2], pairs[1::2], strict=True) for word in ("--cap", kind, rule)]
        _run(folder, "ceph-authtool", keyring, "--gen-key", "-n", name, *caps)
    _run(folder, "ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)
    daemons.append(_daemon(folder, "ceph-mon", "-i", "a"))
    _until(lambda: _run(folder, "ceph", "--connect-timeout", "5", "mon", "stat", check=False) == 0, daemons)
    osd = str(uuid.uuid4())
    _run(folder, "ceph", "osd", "new", osd, "0")
    _run(folder, "ceph", "auth", "import", "-i", keyring)
    _run(folder, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    daemons.append(_daemon(folder, "ceph-osd", "-i", "0"))
    daemons.append(_daemon(folder, "radosgw", "-n", "client.rgw"))
    server = Server(
        endpoint=f"http://127.0.0.1:{port}",
        access_key=secrets.token_hex(10).upper(),
        secret_key=secrets.token_hex(20),
    )
    _until(lambda: _answers(server.endpoint), daemons)
    account = (
        "--uid=test",
        "--display-name=test",
        f"--access-key={server.access_key}",
        f"--secret={server.secret_key}",
    )
    _run(folder, "radosgw-admin", "user", "create", *account)
    return server


def _run(folder: Path, program: str, *arguments: str, check: bool = True) -> int:
    """Run one of the tools to its end; what it says is shown only when it fails."""
    command = [program, *arguments]
    if program not in ("monmaptool", "ceph-authtool"):
        command[1:1] = ["-c", str(folder / "ceph.conf")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=START_SECONDS)
    if check and done.returncode:
        raise RuntimeError(f"{program} exited with {done.returncode}: {done.stdout.decode(errors='replace')[-500:]}")
    return done.returncode


def _daemon(folder: Path, program: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [program, "-f", "-c", str(folder / "ceph.conf"), *arguments]
    with (folder / f"{program}.out").open("wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=_end_with_parent)


def _end_with_parent() -> None:
    """Ask the kernel to end this daemon when the test process is gone, however that ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(daemon: subprocess.Popen[bytes]) -> None:
    """End one daemon by its pid. Its data is in memory and ends with it, so nothing is lost by haste."""
    daemon.kill()
    daemon.wait()


def _until(ready: Callable[[], bool], daemons: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + START_SECONDS
    while not ready():
        gone = [daemon.args for daemon in daemons if daemon.poll() is not None]
        if gone or time.monotonic() > end:
            raise RuntimeError(f"the server did not start: {gone or 'out of time'}")
        time.sleep(0.1)


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    with s3_server() as running:
        for name, value in running.environment.items():
            print(f"export {name}={value}", flush=True)
        signal.pause()
