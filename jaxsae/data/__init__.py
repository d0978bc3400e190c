"""Activations as rows `[n d]`, in memory or on disk, and batches of them in an order fixed by a seed.

`rows` opens files, `shards` is the directory format that a harvest writes, `batching` draws from them.
"""

from jaxsae.data import shards
from jaxsae.data.batching import Batches, batches
from jaxsae.data.photographs import image_patches
from jaxsae.data.rows import Rows, fingerprint, open_rows, require_finite

__all__ = ["Batches", "Rows", "batches", "fingerprint", "image_patches", "open_rows", "require_finite", "shards"]
