"""A real S3 server: Ceph RGW on loopback, one monitor, one OSD with its data in memory, one gateway.

Its folder's path is short because sockets in it must fit into 107 bytes. `spawn` starts a daemon and outlives or ends
with the caller as the caller decides.
"""

from __future__ import annotations

import shutil
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.stack.processes import Process, free_ports, inherited
from pipeline.errors import ConfigError, PipelineError

PROGRAMS = ("ceph", "ceph-authtool", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
INSTALL = "apt-get install -y --no-install-recommends radosgw ceph-mon ceph-osd"
START_SECONDS = 120

Spawn = Callable[[str, Sequence[str | Path]], Process]
"""(name, command) -> the daemon."""

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


def refuse_missing() -> None:
    """ConfigError with the command that installs what is not there."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        raise ConfigError(f"no {', '.join(missing)} on this machine", cure=f"{INSTALL}  (or name an S3 endpoint: --s3)")


def start(folder: Path, port: int, access_key: str, secret_key: str, spawn: Spawn) -> None:
    """Bring the server up in an empty `folder`, with one account; returns when it answers."""
    daemons: list[Process] = []
    monitor, monitor_v1 = free_ports(2)
    addresses, fsid = f"[v2:127.0.0.1:{monitor},v1:127.0.0.1:{monitor_v1}]", str(uuid.uuid4())
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir(parents=True)
    text = CONFIGURATION.format(fsid=fsid, addresses=addresses, folder=folder, port=port)
    (folder / "ceph.conf").write_text(text)
    _make_keys(folder, addresses, fsid)
    daemons.append(spawn("ceph-mon", _command(folder, "ceph-mon", "-f", "-i", "a")))
    _until(lambda: _run(folder, "ceph", "--connect-timeout", "5", "mon", "stat", check=False) == 0, daemons)
    osd = str(uuid.uuid4())
    _run(folder, "ceph", "osd", "new", osd, "0")
    _run(folder, "ceph", "auth", "import", "-i", str(folder / "keyring"))
    _run(folder, "ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", osd)
    daemons.append(spawn("ceph-osd", _command(folder, "ceph-osd", "-f", "-i", "0")))
    daemons.append(spawn("s3", _command(folder, "radosgw", "-f", "-n", "client.rgw")))
    _until(lambda: answers(f"http://127.0.0.1:{port}"), daemons)
    account = ("--uid=glow", "--display-name=glow", f"--access-key={access_key}", f"--secret={secret_key}")
    _run(folder, "radosgw-admin", "user", "create", *account)


def answers(url: str) -> bool:
    """Whether an HTTP server is there, whatever it thinks of the request."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _make_keys(folder: Path, addresses: str, fsid: str) -> None:
    monmap, keyring = str(folder / "monmap"), str(folder / "keyring")
    _run(folder, "monmaptool", "--create", "--addv", "a", addresses, "--fsid", fsid, monmap)
    _run(folder, "ceph-authtool", "--create-keyring", keyring)
    for name, pairs in CAPABILITIES.items():
        caps = [word for kind, rule in zip(pairs[::2], pairs[1::2], strict=True) for word in ("--cap", kind, rule)]
        _run(folder, "ceph-authtool", keyring, "--gen-key", "-n", name, *caps)
    _run(folder, "ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", keyring)


def _command(folder: Path, program: str, *arguments: str) -> list[str]:
    return [program, "-c", str(folder / "ceph.conf"), *arguments]


def _run(folder: Path, program: str, *arguments: str, check: bool = True) -> int:
    """Run one of the tools to its end; what it says is shown only when it fails."""
    bare = program in ("monmaptool", "ceph-authtool")
    command = [program, *arguments] if bare else _command(folder, program, *arguments)
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=inherited(), timeout=START_SECONDS,
    )  # fmt: skip
    if check and done.returncode:
        said = done.stdout.decode(errors="replace")[-300:]
        raise PipelineError(f"{program} exited with {done.returncode}: {said}", where=str(folder))
    return done.returncode


def _until(ready: Callable[[], bool], daemons: list[Process]) -> None:
    end = time.monotonic() + START_SECONDS
    while not ready():
        if time.monotonic() > end or not all(daemon.alive for daemon in daemons):
            raise PipelineError("the S3 server did not start", cure="its log says why")
        time.sleep(0.1)
