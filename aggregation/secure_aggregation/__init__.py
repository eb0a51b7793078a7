# SPDX-License-Identifier: Apache-2.0
"""Summing updates that the server cannot read one by one: pairwise masks over integers that cancel
in the sum, and the shares that repair it when clients drop out. It combines with mergers that say
`sum_only` of themselves and with no others. Empty in this release."""
