"""Muon's elementwise passes and the packing of a bucket, each in one launch over many pieces."""

from flashns_dist.optim.fused.passes import FusedPasses

__all__ = ["FusedPasses"]
