"""Write deploy/kubernetes/components/monitoring/rules.yaml, the alert rules as an object of the Prometheus Operator."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent

from atspeed.configuration.generated_page import write_or_check

RULES = Path(__file__).parent / "alerts.yml"
FILE = Path(__file__).parents[1] / "kubernetes" / "components" / "monitoring" / "rules.yaml"

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
    """Write the file, or check it."""
    rules = RULES.read_text(encoding="utf-8")
    return write_or_check(FILE, HEAD + indent(rules, "  "), "make rules", arguments)


if __name__ == "__main__":
    sys.exit(main())
