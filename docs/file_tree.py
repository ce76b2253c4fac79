"""Write the file tree of docs/architecture.md from the files themselves.

`--check` fails when the tree is stale, and when a purpose does not fit on its line. The purpose of a module, and of a package,
is the first sentence of its docstring. The purposes of other files and folders stand below.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from atspeed.configuration.generated_page import write_or_check

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tree -->\n```\n", "```\n<!-- /tree -->"
MAX_PURPOSE = 80  # characters: a line of the tree then fits on a screen
# In the order of the page. Folders that end in "/" are listed with their files, the others on one line.
PURPOSES = {
    "Makefile": "the commands of daily life",
    "pyproject.toml": "one distribution, its extras, and the settings of every tool",
    "constraints.txt": "the versions that CI tests",
    "docker-compose.yml": "redis, draft, target, orchestrator; profiles cpu and gpu",
    ".env": "the profile that docker compose runs by default",
    "buf.yaml": "rules of the protos",
    "protos": "the contract: atspeed/v1/{recommendation,errors,draft,target,types}.proto",
    "atspeed_client/": "the Python client, a distribution of its own",
    "orchestrator/": "the request's path: history, search, verification, reply",
    "draft_service/": "grows plans with the draft model",
    "target_service/": "evaluates token trees with the target model",
    "atspeed/": "what the services share, training, command line",
    "research/": "finished studies, outside of the product",
    "runs": "training recipes",
    "examples": "two checkpoints: trained, imported, distilled, served, compared",
    "bundles": "movielens-100k, the trained bundle of the demo, and the graph of its inflated target",
    "deploy": "Dockerfile, GPU set-up and pins, Envoy, Kubernetes, Prometheus, Grafana",
    "docs": "architecture, decisions, method, operations, settings, log",
    "tests": "unit, statistics, integration, faults, e2e, deploy, training, benchmarks, oracles",
}
_UNLISTED = {
    "README.md",
    "LICENSE",
    "NOTICE",
    "SECURITY.md",
    "CHANGELOG.md",
    ".gitignore",
    ".gitattributes",
    ".dockerignore",
    ".ci",
}


def tree() -> str:
    """Return the tree as text. Exits when a top-level entry has no purpose here, or a purpose has no entry."""
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
    yield f"{shown:<30}{PURPOSES[name]}"
    if name.endswith("/"):
        yield from _modules(Path(folder), files, indent=2)


def _modules(folder: Path, files: list[Path], indent: int) -> Iterator[str]:
    """Yield a folder's modules, then its sub-packages with their modules. Generated stubs are left out."""
    for file in sorted(file for file in files if file.parent == folder and _is_listed(file)):
        yield _line(file.name, ROOT / file, indent)
    for package in sorted(file.parent for file in files if file.parent.parent == folder and file.name == "__init__.py"):
        yield _line(f"{package.name}/", ROOT / package / "__init__.py", indent)
        yield from _modules(package, files, indent + 2)


def _is_listed(file: Path) -> bool:
    return file.suffix == ".py" and not file.name.startswith("__") and "_pb2" not in file.name


def _line(name: str, module: Path, indent: int) -> str:
    return f"{' ' * indent + name:<30}{_purpose(module)}"


def _purpose(module: Path) -> str:
    docstring = ast.get_docstring(ast.parse(module.read_text())) or sys.exit(f"{module}: no docstring")
    sentence = docstring.split("\n\n")[0].replace("\n", " ").split(". ")[0].rstrip(".")
    if len(sentence) > MAX_PURPOSE:
        sys.exit(
            f"{module.relative_to(ROOT)}: the docstring's first sentence has {len(sentence)} characters,"
            f" more than {MAX_PURPOSE}"
        )
    return sentence


def main() -> int:
    """Write the tree, or check it."""
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    return write_or_check(PAGE, f"{head}{BEGIN}{tree()}{END}{tail}", "make tree")


if __name__ == "__main__":
    sys.exit(main())
