"""Rank 6: capsules that outlive the process: objects by content, manifests, upkeep, reuse."""
