"""Verification: do the kernels compute what they should on this device, and which backend is fastest there?

A subprocess runs every case of `cases` against the float64 reference and times the backends; the result is a verdict
(`ops.verdicts`), from which the backend "auto" chooses.
"""
