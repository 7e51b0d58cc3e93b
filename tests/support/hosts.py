"""Several hosts on this machine: network namespaces with a bridge between them. Needs root and `ip`."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from string import ascii_lowercase

import mpi_run
import pytest

# Called by mpiexec as ssh would be: options, the host, the command.
LAUNCHER = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
exec ip netns exec "PREFIX${host##*.}" sh -c "$*"
"""


_letters = iter(ascii_lowercase)


class Hosts:
    """`count` hosts, 10.77.0.1 and following."""

    def __init__(self, count: int, folder: Path) -> None:
        self.count, self.folder = count, folder
        # Never used twice, because the system takes its time to remove what has been deleted.
        self.prefix = f"sa{os.getpid() % 100000}{next(_letters)}"
        self._launcher = folder / "launcher"
        self._launcher.write_text(LAUNCHER.replace("PREFIX", self.prefix), encoding="utf8")
        self._launcher.chmod(self._launcher.stat().st_mode | stat.S_IXUSR)

    def set_up(self, rate: str = "") -> None:
        """Connect the hosts; `rate` limits what each sends, for example "1gbit"."""
        ip(f"link add {self.prefix}b type bridge")
        ip(f"link set {self.prefix}b up")
        for host in range(1, self.count + 1):
            name, cable = f"{self.prefix}{host}", f"{self.prefix}v{host}"
            ip(f"netns add {name}")
            ip(f"link add {cable} type veth peer name eth0 netns {name}")
            ip(f"link set {cable} master {self.prefix}b up")
            ip(f"-n {name} addr add 10.77.0.{host}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")
            if rate:
                limit = f"tc qdisc add dev eth0 root tbf rate {rate} burst 256k latency 100ms"
                subprocess.run(["ip", "netns", "exec", name, *limit.split()], check=True, timeout=20)

    def tear_down(self) -> None:
        for host in range(1, self.count + 1):
            for pid in ip(f"netns pids {self.prefix}{host}", check=False).split():  # cut off, they would wait for ever
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            ip(f"netns del {self.prefix}{host}", check=False)
        ip(f"link del {self.prefix}b", check=False)

    def unplug(self, host: int) -> None:
        """Let a host disappear."""
        ip(f"-n {self.prefix}{host} link set eth0 down")

    def start(self, *arguments: str, seconds: int = mpi_run.SECONDS) -> subprocess.Popen[str]:
        """Start Python with these arguments on one rank per host; messages go over TCP."""
        hosts = ",".join(f"10.77.0.{host}" for host in range(1, self.count + 1))
        command = ["ip", "netns", "exec", f"{self.prefix}1", mpi_run.mpiexec(), "-launcher", "ssh"]
        command += ["-launcher-exec", str(self._launcher), "-hosts", hosts, "-iface", "eth0", "-n", str(self.count)]
        settings = {"RANK_SECONDS": str(seconds), "UCX_TLS": "tcp", "FI_PROVIDER": "tcp", "OMP_NUM_THREADS": "1"}
        for name, value in settings.items():
            command += ["-genv", name, value]
        return subprocess.Popen(
            [*command, sys.executable, *arguments],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def ip(arguments: str, *, check: bool = True) -> str:
    return subprocess.run(["ip", *arguments.split()], check=check, capture_output=True, timeout=20, text=True).stdout


@contextmanager
def hosts(count: int, folder: Path, rate: str = "") -> Iterator[Hosts]:
    """Make hosts, or skip the test if this is not allowed."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("making hosts needs root and iproute2")
    found = Hosts(count, folder)
    try:
        try:
            found.set_up(rate)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"cannot make hosts: {error.stderr or error}")
        yield found
    finally:
        found.tear_down()
