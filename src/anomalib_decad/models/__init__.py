# SPDX-License-Identifier: Apache-2.0
"""The anomalib models, a folder each, and what they share.

Importing one of them imports no other.
"""
