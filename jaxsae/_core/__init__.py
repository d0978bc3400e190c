"""Machinery that every package stands on, and that knows nothing of them: pytrees, sums, chunks of rows, files."""
