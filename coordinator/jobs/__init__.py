# SPDX-License-Identifier: Apache-2.0
"""Jobs of a deployment, from `submit` to the files that a finished run leaves behind.

registry    which jobs there are, and what the operator wants of them
folder      what lies on disk of one
submit      compiles a job and enters it
service     keeps the jobs that are wanted playing; a process of its own
process     what SuperLink starts for one of them
player      plays its rounds, and leaves its results
"""
