"""Rank 5: control loops: a policy at a fixed rate that can be snapshot, restored, forked and rewound."""
