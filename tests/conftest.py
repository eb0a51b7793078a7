# SPDX-License-Identifier: Apache-2.0
"""Settings that every test shares."""

from __future__ import annotations

from hypothesis import settings

# a busy machine is no failure: pytest-timeout bounds whole tests instead of single examples
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
