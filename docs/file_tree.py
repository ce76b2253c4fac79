"""Write the README's file tree from the files themselves. `--check` fails when it is stale, so it cannot drift from the disk.

A module's purpose, and a sub-package's, is the first sentence of its docstring; other files' and folders' stand below.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- tree -->\n```\n", "```\n<!-- /tree -->"
WIDTH = 118
# In the order of the README. Folders ending in "/" are listed with their files, the others as one line.
PURPOSES = {
    "Makefile": "the commands of daily life",
    "pyproject.toml": "one distribution; extras cpu, gpu, local, otel, train, base-models, bench, dev; every tool's settings",
    "constraints.txt": "the versions that CI tests",
    "docker-compose.yml": "redis, draft, target, orchestrator; profiles cpu and gpu",
    ".env": "the profile that docker compose runs by default",
    "buf.yaml": "rules of the protos",
    "protos": "THE CONTRACT: atspeed/v1/{recommendation,draft,target,types}.proto and their stubs",
    "orchestrator/": "THE REQUEST'S PATH",
    "draft_service/": "grows plans with the draft model",
    "target_service/": "evaluates token trees with the target model",
    "atspeed/": "what the services share, training, client, command line",
    "research/": "finished studies, outside of the product",
    "runs": "training recipes",
    "bundles": "movielens-100k, the trained bundle that the demo serves",
    "deploy": "Dockerfile, GPU set-up and pins, Envoy, Kubernetes manifests",
    "docs": "architecture, method, settings, log of what did not work",
    "tests": "unit/ integration/ (real servers and Redis) faults/ e2e/ oracles/ (independent references) npm/ (`make tools`)",
}
_UNLISTED = {"README.md", "LICENSE", ".gitignore", ".gitattributes", ".dockerignore", ".ci"}


def tree() -> str:
    """The tree as text. Exits when a top-level entry has no purpose here, or a purpose has no entry."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603
    files = [Path(line) for line in listed.splitlines() if (ROOT / line).exists()]
    tops = {file.parts[0] for file in files} - _UNLISTED
    if tops != (known := {name.rstrip("/") for name in PURPOSES}):
        sys.exit(f"docs/file_tree.py: PURPOSES and the disk differ in {sorted(tops ^ known)}")
    return "".join(f"{line}\n" for name in PURPOSES for line in _entry(name, files))


def _entry(name: str, files: list[Path]) -> Iterator[str]:
    folder = name.rstrip("/")
    shown = name if (ROOT / folder).is_file() else f"{folder}/"
    yield f"{shown:<24}{PURPOSES[name]}"
    if name.endswith("/"):
        yield from _modules(Path(folder), files, indent=2)


def _modules(folder: Path, files: list[Path], indent: int) -> Iterator[str]:
    """A folder's modules, then its sub-packages, each with the purpose that its `__init__.py` states and its own modules."""
    for file in sorted(file for file in files if file.parent == folder and not file.name.startswith("__")):
        yield _line(file.name, ROOT / file, indent)
    for package in sorted(file.parent for file in files if file.parent.parent == folder and file.name == "__init__.py"):
        yield _line(f"{package.name}/", ROOT / package / "__init__.py", indent)
        yield from _modules(package, files, indent + 2)


def _line(name: str, module: Path, indent: int) -> str:
    return f"{' ' * indent + name:<24}{_purpose(module)}"


def _purpose(module: Path) -> str:
    docstring = ast.get_docstring(ast.parse(module.read_text())) or sys.exit(f"{module}: no docstring")
    sentence = docstring.split("\n\n")[0].replace("\n", " ").split(". ")[0]
    return shorten(sentence.rstrip("."), WIDTH - 24, placeholder=" ...")


def main() -> None:
    """Write the tree, or compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    text = readme.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    fresh = f"{head}{BEGIN}{tree()}{END}{tail}"
    if parser.parse_args().check:
        if fresh != text:
            sys.exit("README.md: stale file tree, run `make tree`")
        return
    readme.write_text(fresh)


if __name__ == "__main__":
    main()
