"""Rank 5: policy on token ids: sessions, waypoints, loading. Import the modules."""
