"""Robot policies: an encoder, a GRU memory, and chunks of actions by flow matching."""
