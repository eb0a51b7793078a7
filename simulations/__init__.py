# SPDX-License-Identifier: Apache-2.0
"""Whole federations in one process: data sets and how they fall to clients, ways to run many
clients (cohort, sequential, Ray), reports and benchmarks. The round loop is the coordinator's own,
so a simulation is a deployment whose clients happen to live here."""
