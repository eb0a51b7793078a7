# SPDX-License-Identifier: Apache-2.0
"""What a run gives away, measured by attacking it: one audit a file, `fedloom audit` runs them."""
