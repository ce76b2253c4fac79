"""Reads and writes of any store that fsspec knows, with errors of one line.

Credentials and endpoints are those of the store's own library: its environment variables, its files, or fsspec's configuration.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from atspeed.engine.errors import BundleError

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf", "http": "https", "https": "https"}
"""The extra with the library of each scheme."""
_WITH_FOLDERS = {"file", "memory", "sftp", "ssh"}
_ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class StoreError(BundleError):
    """A store that cannot be reached, or refuses. The text names the URL."""


def check_url(text: str) -> str:
    """Return the URL of a bundle without a slash at its end. Raises ValueError for one that cannot be a bundle's."""
    scheme, _, rest = text.partition("://")
    if not scheme.isalnum() or not rest.strip("/") or "::" in text:
        raise ValueError("must be SCHEME://PLACE")
    if urlsplit(text).password is not None:
        raise ValueError("must hold no password; the store's library reads credentials from its environment")
    return text.rstrip("/")


class ObjectStore:
    """The store behind a URL. Its methods take URLs of this store, and block."""

    def __init__(self, url: str) -> None:
        """Raise StoreError when the package for the URL's scheme is not installed."""
        self._url = url
        with self._failures(url):
            fsspec = _fsspec(url)
            # Listings that are kept would hide a new bundle.
            self._files, _ = fsspec.core.url_to_fs(url, use_listings_cache=False)

    def read(self, url: str) -> bytes | None:
        """Return the content of an object; None if there is none. Raises StoreError."""
        with self._failures(url):
            self._files.invalidate_cache()
            try:
                content: bytes = self._files.cat_file(self._path(url))
            except _ABSENT:
                return None
            return content

    def chunks(self, url: str, size: int = 8_388_608) -> Iterator[bytes]:
        """Yield the content of an object in parts. Raises StoreError, and BundleError when there is no such object."""
        with self._failures(url):
            try:
                file = self._files.open(self._path(url), "rb", cache_type="none")
            except _ABSENT:
                raise BundleError(f"{url}: missing") from None
            with file:
                while part := file.read(size):
                    yield part

    def write(self, url: str, content: bytes) -> None:
        """Write a small object in one step. Raises StoreError."""
        with self._failures(url):
            self._make_folder(url)
            self._files.pipe_file(self._path(url), content)

    def upload(self, source: Path, url: str) -> None:
        """Write an object from a file. Raises StoreError."""
        with self._failures(url):
            self._make_folder(url)
            self._files.put_file(str(source.resolve()), self._path(url))

    def _make_folder(self, url: str) -> None:
        """Create the object's folder in stores that have folders."""
        if urlsplit(url).scheme in _WITH_FOLDERS:
            self._files.makedirs(self._path(url).rpartition("/")[0], exist_ok=True)

    def _path(self, url: str) -> str:
        return str(self._files._strip_protocol(url))

    @contextmanager
    def _failures(self, url: str) -> Iterator[None]:
        """Turn what a store's library raises into a StoreError. Each library has exceptions of its own, without a common base."""
        try:
            yield
        except BundleError:
            raise
        except NotImplementedError as error:
            raise StoreError(f"{url}: this store cannot be written to") from error
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise StoreError(f"{url}: {type(error).__name__}{': ' if text else ''}{text}") from error


def _fsspec(url: str) -> Any:
    scheme = urlsplit(url).scheme
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        what = f"pip install 'atspeed-serving[{extra}]'" if extra else "install the fsspec package for it"
        raise StoreError(f"{url}: no support for {scheme}:// is installed: {what}") from error
    except ValueError as error:
        raise StoreError(f"{url}: no store has the scheme {scheme}") from error
    return fsspec
