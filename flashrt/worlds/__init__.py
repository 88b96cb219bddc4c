"""Small text worlds with exact answers: what the bundled model was trained on and is asked about.

IS: seeded generators of chat documents (inventories, moves, a building with tools, stories) and the
simulators that answer tool calls. IS NOT: a tokenizer or a trainer. Called by: the demo, the
examples, the tests, tools/train_tiny. Import the modules.
"""
