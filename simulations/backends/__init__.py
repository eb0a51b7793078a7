# SPDX-License-Identifier: Apache-2.0
"""Ways to run simulated clients: in cohorts, one after another, or on Flower's Ray engine."""
