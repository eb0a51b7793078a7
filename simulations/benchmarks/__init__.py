# SPDX-License-Identifier: Apache-2.0
"""What is measured, by stable names: each module has `figures(progress) -> list[Figure]`, run by
`fedloom bench`. Figures are ratios within one run where the machine would decide a bare number."""
