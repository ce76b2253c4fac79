"""An ONNX model as bytes in this process's own memory.

onnxruntime itself maps a file of weights: whoever writes into that file changes the model that is served, and whoever shortens it
ends the process with SIGBUS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from atspeed.engine.bundle.bundle_files import files_below, read_file


@dataclass(frozen=True)
class ModelFiles:
    """A model's graph, and its files of weights by the names that the graph has for them. path: the graph's, for messages."""

    path: Path
    graph: bytes
    weights: Mapping[str, bytes]

    @classmethod
    def read(cls, path: Path, digests: Mapping[str, str] | None = None) -> ModelFiles:
        """Read the graph, and of the files beside it those that it names.

        digests: SHA-256 by path relative to the model's folder, which the bytes read must have.
        Raises BundleError naming the file.
        """
        folder = path.parent
        graph = read_file(folder, path.name, digests)
        # A graph spells a file's name in plain UTF-8, so a file whose name is not in it is none of its weights.
        named = [name for name in files_below(folder) if name != path.name and name.encode() in graph]
        return cls(path, graph, {name: read_file(folder, name, digests) for name in named})

    @contextmanager
    def private_copy(self) -> Iterator[Path]:
        """The graph's path in a folder that holds the same files and is gone after the block; what maps them keeps them."""
        with TemporaryDirectory(prefix="atspeed-model-") as temporary:
            for name, content in {self.path.name: self.graph, **self.weights}.items():
                path = Path(temporary, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            yield Path(temporary, self.path.name)
