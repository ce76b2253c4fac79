"""Write the alert rules once more: as an object of the Prometheus Operator, and into the package for `atspeed up`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent

from atspeed.configuration.generated_page import write_or_check
from atspeed.local.prometheus import RULES as PACKAGED

RULES = Path(__file__).parent / "alerts.yml"
FILE = Path(__file__).parents[1] / "kubernetes" / "components" / "monitoring" / "rules.yaml"

PACKAGED_HEAD = "# Written by `make rules` from deploy/prometheus/alerts.yml; do not edit it.\n"
HEAD = """\
# Written by `make rules` from deploy/prometheus/alerts.yml; do not edit it.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: atspeed
  namespace: atspeed
  labels: { app.kubernetes.io/part-of: atspeed }
spec:
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the files, or check them."""
    rules = RULES.read_text(encoding="utf-8")
    texts = {FILE: HEAD + indent(rules, "  "), PACKAGED: PACKAGED_HEAD + rules}
    return max(write_or_check(path, text, "make rules", arguments) for path, text in texts.items())


if __name__ == "__main__":
    sys.exit(main())
