"""Small text worlds with exact answers: what the bundled model was trained on and is asked about.

IS: seeded generators of chat documents (inventories, moves, a building with tools, stories) and the
simulators that answer tool calls. IS NOT: a tokenizer or a trainer. It exists so that the demo, the
examples and the tests can ask questions whose answer is known. Import the modules.
"""
