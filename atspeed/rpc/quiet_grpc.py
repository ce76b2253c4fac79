"""Keeps gRPC's core from writing to stderr by itself. Import it before grpc, which reads its environment as it is loaded.

It quotes what peers send, such as the text of a GOAWAY: any bytes and line breaks, amid JSON lines that nobody else may write.
"""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
