"""`flashrt bench`: sessions, drafting, resuming and control loops, measured beside the machine's limits."""
