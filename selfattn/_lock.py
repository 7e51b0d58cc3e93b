"""A lock of a cache for many readers or one writer, which remains usable in forked children."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType


class SharedLock:
    """`with lock.reading:` waits for a writer, `with lock.writing:` for all readers and writers. Not reentrant."""

    def __init__(self) -> None:
        self.reading = _Reading(self)
        self.writing = _Writing(self)
        self._renew()
        _locks.add(self)

    def _renew(self) -> None:
        self.changed = threading.Condition(threading.Lock())
        self.readers = 0
        self.writers = 0  # waiting or writing; new readers wait for them
        self.is_written = False


class _Reading:
    __slots__ = ("_lock",)

    def __init__(self, lock: SharedLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        with lock.changed:
            while lock.writers:
                lock.changed.wait()
            lock.readers += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        lock = self._lock
        with lock.changed:
            lock.readers -= 1
            if lock.writers and not lock.readers:
                lock.changed.notify_all()


class _Writing:
    __slots__ = ("_lock",)

    def __init__(self, lock: SharedLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        with lock.changed:
            lock.writers += 1
            try:
                while lock.readers or lock.is_written:
                    lock.changed.wait()
            except BaseException:  # Ctrl-C while waiting
                lock.writers -= 1
                lock.changed.notify_all()
                raise
            lock.is_written = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        lock = self._lock
        with lock.changed:
            lock.is_written = False
            lock.writers -= 1
            lock.changed.notify_all()


_locks: weakref.WeakSet[SharedLock] = weakref.WeakSet()


def _renew_all() -> None:
    # A child process has one thread: the threads that held a lock or waited for it no longer exist.
    for lock in list(_locks):
        lock._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
