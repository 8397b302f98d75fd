"""Regenerates the committed `_pb2` modules: `python -m prfaas_jax.serving.proto.generate`.

Generated code runs on the grpcio and protobuf that made it or newer, so make it with grpcio-tools 1.75, the oldest that is supported.
"""

import pathlib
import sys

PACKAGE = pathlib.Path(__file__).resolve().parent
ROOT = PACKAGE.parents[2]


def main() -> int:
    """Runs protoc from the repository root, so that generated imports are absolute; returns its exit code."""
    from grpc_tools import protoc

    sources = [str(path.relative_to(ROOT)) for path in sorted(PACKAGE.glob("*.proto"))]
    outputs = [f"--{kind}_out={ROOT}" for kind in ("python", "pyi", "grpc_python")]
    code = int(protoc.main(["protoc", f"-I{ROOT}", *outputs, *sources]))
    # A file of messages only still gets a _grpc module; an empty one is noise.
    (PACKAGE / "common_pb2_grpc.py").unlink(missing_ok=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
