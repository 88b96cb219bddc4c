"""`flashrt bench`: sessions, drafting, resuming, control loops, beside the machine's limits."""
