# SPDX-License-Identifier: Apache-2.0
"""Differential privacy for federated training: clipping of updates, noise in one place or shared
among clients, and the accounting that turns a run's settings into ε and δ. A filter that is asked
for and cannot be applied will stop the run; none passes updates through. Empty in this release."""
