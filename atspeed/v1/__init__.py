"""Generated from protos/atspeed/**.proto by protos/generate.py."""
