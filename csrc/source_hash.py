"""The hash that ties a build of dsfast._native to its sources: CMake compiles it in, dsfast.ops.native compares it."""

import hashlib
import sys
from pathlib import Path


def source_hash(folder):
    """SHA-256 over the names and bytes of the C++ and CMake files in `folder`."""
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).glob("*") if p.suffix in (".cpp", ".h", ".txt")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


if __name__ == "__main__":
    print(source_hash(sys.argv[1]))
