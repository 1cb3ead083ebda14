"""Speculation: drafts that one step verifies, and states rolled back when it refuses some."""
