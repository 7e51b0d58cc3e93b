"""Hosts on one machine: network namespaces, and a switch between them with a given bandwidth and delay.

The switch is a thread of this process, to which each host is connected by a TUN device. So nothing of the kernel's
traffic control is needed: many kernels lack its delays (netem). Making hosts needs root, `ip` and /dev/net/tun.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import math
import os
import select
import shutil
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 1, 0x1000
_CLONE_NEWNET = 0x40000000
_MTU = 30000  # large, since each packet costs the switch some microseconds
_DESTINATION = slice(16, 20)  # of an IPv4 packet

# Called by mpiexec as ssh would be: options, the host, the command.
_LAUNCHER = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
host=$1; shift
exec ip netns exec "PREFIX${host##*.}" sh -c "$*"
"""
_numbers = itertools.count()


def why_not() -> str:
    """Return why this process cannot make hosts, or ''."""
    if shutil.which("ip") is None:
        return "making hosts needs iproute2"
    if os.geteuid() != 0 or not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "making hosts needs root and /dev/net/tun"
    return ""


class Hosts:
    """Hosts 10.77.0.1 to 10.77.0.`count`. A packet waits for its sender's link, and arrives `delay` seconds later.

    A host sends `rate` bytes per second. Use it in a ``with`` statement, at whose end what still runs on the hosts is
    killed.
    """

    def __init__(self, count: int, *, rate: float = math.inf, delay: float = 0.0) -> None:
        # A name is never used twice, because the system takes its time to remove what has been deleted.
        self._prefix = f"sa{os.getpid() % 100000}-{next(_numbers)}-"
        self.count = count
        self._rate, self._delay = rate, delay
        self._devices: dict[bytes, int] = {}
        self._unplugged: set[int] = set()
        self._stopped = threading.Event()
        self._switch = threading.Thread(target=self._forward, daemon=True)

    def __enter__(self) -> Hosts:
        try:
            for host in range(1, self.count + 1):
                name = f"{self._prefix}{host}"
                _ip(f"netns add {name}")
                self._devices[_address(host)] = _open_device(name)
                _ip(f"-n {name} addr add 10.77.0.{host}/24 dev eth0")
                _ip(f"-n {name} link set eth0 up mtu {_MTU}")
                _ip(f"-n {name} link set lo up")
        except BaseException:
            self._remove()
            raise
        self._switch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._switch.join()
        self._remove()

    def unplug(self, host: int) -> None:
        """Let a host disappear: packets from it and to it are lost."""
        self._unplugged.add(self._devices[_address(host)])

    def mpiexec(self, path: str, folder: Path, settings: Mapping[str, str]) -> list[str]:
        """Return the command that starts a program with one rank on each host, over TCP.

        `path` is that of MPICH's mpiexec. `folder` gets a launcher; `settings` are environment variables of the ranks.
        """
        launcher = folder / "launcher"
        launcher.write_text(_LAUNCHER.replace("PREFIX", self._prefix), encoding="utf8")
        launcher.chmod(0o755)
        hosts = ",".join(f"10.77.0.{host}" for host in range(1, self.count + 1))
        command = ["ip", "netns", "exec", f"{self._prefix}1", path, "-launcher", "ssh", "-launcher-exec", str(launcher)]
        command += ["-hosts", hosts, "-iface", "eth0", "-n", str(self.count)]
        for name, value in {"UCX_TLS": "tcp,self", "FI_PROVIDER": "tcp", **settings}.items():
            command += ["-genv", name, value]
        return command

    def _forward(self) -> None:
        """Pass packets on, until stopped."""
        with suppress(OSError):  # a thread that comes late would seem to be a slow network
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), -20)
        free = dict.fromkeys(self._devices.values(), 0.0)  # from when on each host's link is free
        waiting: list[tuple[float, int, int, bytes]] = []
        order = itertools.count()
        while not self._stopped.is_set():
            wait = min(max(waiting[0][0] - time.monotonic(), 0), 0.1) if waiting else 0.1
            for device in select.select(list(free), [], [], wait)[0]:
                for packet in _packets(device):
                    target = self._devices.get(packet[_DESTINATION])
                    if target is None or device in self._unplugged:
                        continue
                    free[device] = max(free[device], time.monotonic()) + len(packet) / self._rate
                    heapq.heappush(waiting, (free[device] + self._delay, next(order), target, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(waiting)
                if target not in self._unplugged:
                    with suppress(OSError):
                        os.write(target, packet)

    def _remove(self) -> None:
        for host in range(1, self.count + 1):
            for pid in _ip(
                f"netns pids {self._prefix}{host}", check=False
            ).split():  # cut off, they would wait for ever
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _ip(f"netns del {self._prefix}{host}", check=False)
        for device in self._devices.values():
            os.close(device)


def _address(host: int) -> bytes:
    return bytes((10, 77, 0, host))


def _packets(device: int) -> Sequence[bytes]:
    """Return the packets that a device has now; a few, so that the other devices have their turn."""
    found: list[bytes] = []
    with suppress(BlockingIOError):
        while len(found) < 16:
            found.append(os.read(device, 1 << 16))
    return found


def _ip(arguments: str, *, check: bool = True) -> str:
    return subprocess.run(["ip", *arguments.split()], check=check, capture_output=True, timeout=20, text=True).stdout


def _open_device(host: str) -> int:
    """Create the device of a host. A thread of its own enters the host's namespace, since it cannot be left again."""
    opened: list[int] = []

    def enter() -> None:
        with open(f"/run/netns/{host}", "rb") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TUN | _IFF_NO_PI))
        opened.append(device)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if not opened:
        raise OSError(f"cannot create the network device of {host}")
    return opened[0]
