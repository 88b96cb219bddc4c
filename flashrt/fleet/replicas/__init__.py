"""A server on several machines: replicas that share a store, and the front before them.

IS: `flashrt serve --replicas`. IS NOT: rollouts, which need no server; the room around has them.
"""
