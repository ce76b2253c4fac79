"""A demonstration on real data: `python -m atspeed.cli.demo`."""
