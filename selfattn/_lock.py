"""A lock of a cache for many readers or one writer, which remains usable in forked children."""

from __future__ import annotations

import os
import threading
import weakref
from types import TracebackType


class SharedLock:
    """`with lock.reading:` waits for writers, `with lock.writing:` waits for all readers and writers. Not reentrant."""

    def __init__(self) -> None:
        self.reading = _Reading(self)
        self.writing = _Writing(self)
        self._renew()
        _locks.add(self)

    def _renew(self) -> None:
        try:
            self.mutex = threading.Lock()
        except RuntimeError as error:  # how Python says that there is no memory for a lock
            raise MemoryError("no memory for a lock") from error
        self.changed = threading.Condition(self.mutex)
        self.waiting = 0  # threads that wait for a change; if there are none, notifying, which is slow, is skipped
        self.readers = 0
        self.writers = 0  # threads that write or wait to write; new readers wait for them
        self.is_written = False

    def wait(self) -> None:
        """Wait for a change; with the mutex held."""
        self.waiting += 1
        try:
            self.changed.wait()
        finally:
            self.waiting -= 1

    def notify(self) -> None:
        """Wake all that wait; with the mutex held."""
        if self.waiting:
            self.changed.notify_all()


class _Reading:
    __slots__ = ("_lock",)

    def __init__(self, lock: SharedLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        with lock.mutex:
            while lock.writers:
                lock.wait()
            lock.readers += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        lock = self._lock
        with lock.mutex:
            lock.readers -= 1
            if not lock.readers:
                lock.notify()


class _Writing:
    __slots__ = ("_lock",)

    def __init__(self, lock: SharedLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        lock = self._lock
        with lock.mutex:
            lock.writers += 1
            try:
                while lock.readers or lock.is_written:
                    lock.wait()
            except BaseException:  # Ctrl-C while waiting
                lock.writers -= 1
                lock.notify()
                raise
            lock.is_written = True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        lock = self._lock
        with lock.mutex:
            lock.is_written = False
            lock.writers -= 1
            lock.notify()


_locks: weakref.WeakSet[SharedLock] = weakref.WeakSet()


def _renew_all() -> None:
    # A child process has one thread: the threads that held a lock or waited for it no longer exist.
    for lock in list(_locks):
        lock._renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)
