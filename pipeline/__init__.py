"""Rows in, rows out: reading, templating, dispatch, generation and committed parts.

Knows nothing of GPU types, job files or Kubernetes; `cluster` and `jobs` import this package, never the reverse.
"""
