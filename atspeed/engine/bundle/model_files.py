"""An ONNX model as bytes in this process's own memory.

onnxruntime itself would map a file of weights: a write into that file would change the served model, and truncating it would end
the process with SIGBUS.
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
    """The files of a model.

    Attributes:
        path: the graph's path, for messages.
        graph: the graph.
        weights: its files of weights, by the names that the graph uses.
    """

    path: Path
    graph: bytes
    weights: Mapping[str, bytes]

    @classmethod
    def read(cls, path: Path, digests: Mapping[str, str] | None = None) -> ModelFiles:
        """Read the graph and the files that it names. Raises BundleError naming the file.

        digests: SHA-256 by path relative to the model's folder, to compare the bytes with; None for no check.
        """
        folder = path.parent
        graph = read_file(folder, path.name, digests)
        # A graph holds file names in plain UTF-8, so a file whose name it does not contain holds no weights of it.
        named = [name for name in files_below(folder) if name != path.name and name.encode() in graph]
        return cls(path, graph, {name: read_file(folder, name, digests) for name in named})

    @contextmanager
    def private_copy(self) -> Iterator[Path]:
        """Yield the graph's path in a temporary folder with the same files. Files that are mapped then outlive the folder."""
        with TemporaryDirectory(prefix="atspeed-model-") as temporary:
            for name, content in {self.path.name: self.graph, **self.weights}.items():
                path = Path(temporary, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            yield Path(temporary, self.path.name)
