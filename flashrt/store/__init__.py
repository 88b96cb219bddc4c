"""Rank 6: capsules that outlive the process: content-addressed objects, manifests, upkeep, reuse."""
