"""Rank 7: the commands, one module each; cli parses arguments and calls them."""
