"""Serving: many owners' requests and sessions on the lanes of one engine."""
