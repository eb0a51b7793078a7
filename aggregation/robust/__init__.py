# SPDX-License-Identifier: Apache-2.0
"""Merging rules for federations in which some clients may lie: medians, trimmed means, norm bounds
and rules that compare updates with one another. They will stand behind the `Merger` protocol and
say of themselves that sums are not all they need, which keeps them apart from secure aggregation.
Empty in this release."""
