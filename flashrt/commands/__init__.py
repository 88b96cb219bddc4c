"""The commands, one module or folder each; cli parses arguments and calls them."""
