"""A bundle is changed in the volume of the Kubernetes overlays, by the command of docs/operations.md, in running services."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from pathlib import Path

from atspeed.engine.bundle.bundle import Bundle
from atspeed.engine.bundle.catalogue_update import update_catalogue
from atspeed.local.stack import LocalStack
from tests.bundles import new_bundle, random_history
from tests.catalogues import new_catalogue
from tests.kubernetes_manifests import FOLDER, PORTS, built, containers, of_kind, pods
from tests.serving import WINDOW, Client, ids, until

ROOT = Path(__file__).parents[2]


def mounted() -> dict[str, str]:
    """The bundle's path in the volume, by service, from what an overlay mounts and sets."""
    manifests = built(FOLDER / "overlays" / "cpu")
    paths = {}
    for name in PORTS:
        (volume,) = (one["name"] for one in pods(manifests)[name]["volumes"] if "persistentVolumeClaim" in one)
        (mount,) = (one for one in containers(manifests)[name]["volumeMounts"] if one["name"] == volume)
        assert "subPath" not in mount, "a link outside of what is mounted would be resolved once"
        told = of_kind(manifests, "ConfigMap")[f"atspeed-{name}"]["data"][f"ATSPEED_{name.upper()}_BUNDLE"]
        paths[name] = str(Path(told).relative_to(mount["mountPath"]))
    return paths


def move(volume: Path, link: str, bundle: str) -> None:
    """Run the command of the page for this volume."""
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (command,) = re.findall(
        r"^ln -s 2027-02 /bundles/next && mv -T /bundles/next /bundles/current$", page, re.MULTILINE
    )
    here = command.replace("2027-02", bundle).replace("/bundles/current", f"/bundles/{link}")
    subprocess.run(["sh", "-euc", here.replace("/bundles", str(volume))], check=True)


def test_a_link_swapped_in_the_volume_changes_the_bundle_and_no_caller_notices(tmp_path: Path) -> None:
    paths = mounted()
    (link,) = set(paths.values())
    volume = tmp_path / "volume"
    catalogue = new_catalogue()
    old = Bundle(new_bundle(tmp_path / "made", catalogue))
    shutil.copytree(old.root, volume / "2027-01")
    new = update_catalogue(old, volume / "2027-02", {}, [catalogue.id_of(0)])
    (volume / link).symlink_to("2027-01")
    following: dict[str, object] = {"bundle": volume / link, "bundle-poll-seconds": 0.2}
    flags = {
        "draft": dict(following),
        "target": {**following, "threads": 1},
        "orchestrator": {**following, "bundle-settle-seconds": 0.2, "draft-timeout-seconds": 30},
    }
    history = random_history(catalogue, WINDOW, seed=5)
    versions: list[str] = []
    ended = threading.Event()

    with LocalStack(volume / link, flags=flags) as stack, Client(stack.address) as client:

        def ask() -> None:
            while not ended.is_set():
                reply = client.recommend(history, k=5)
                assert len(ids(reply)) == 5
                versions.append(reply.versions.bundle)

        caller = threading.Thread(target=ask)
        caller.start()
        try:
            for bundle, name in ((new, "2027-02"), (old, "2027-01")):
                move(volume, link, name)
                until(lambda version=bundle.manifest.version: versions[-1:] == [version])  # type: ignore[misc]
        finally:
            ended.set()
            caller.join()
    served = [version for place, version in enumerate(versions) if versions[place - 1 : place] != [version]]
    assert served[-2:] == [new.manifest.version, old.manifest.version]
    assert set(served) == {old.manifest.version, new.manifest.version}
