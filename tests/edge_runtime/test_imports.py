# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
before = set(sys.modules)
import aggregation, aggregation.privacy, aggregation.robust, aggregation.secure_aggregation
import edge_runtime, edge_runtime.bundle, protocol, protocol.signing
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names)))
"""


def test_what_a_device_needs_for_bundles_and_updates_is_small():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60
    )
    ours = {"aggregation", "edge_runtime", "protocol"}
    inside_cryptography = {"_cffi_backend", "_openssl"}
    found = set(done.stdout.split()) - ours - inside_cryptography
    assert found == {"cryptography", "numpy", "safetensors"}
