"""Activations as rows `[n d]`, in memory, on disk or in a bucket, and batches of them in an order fixed by a seed.

`rows` opens files, `shards` is the directory format that a harvest writes, `origin` says where rows are from, `remote`
reads from buckets, `lazy` is what they return, `beside` puts some side by side, `cleaning` leaves some out, `batching`
draws from them; `photographs` and `synthetic` make rows.
"""

from jaxsae.data import cleaning as cleaning, shards as shards
from jaxsae.data.batching import Batches as Batches, batches as batches
from jaxsae.data.beside import beside as beside
from jaxsae.data.lazy import LazyRows as LazyRows
from jaxsae.data.origin import Origin as Origin
from jaxsae.data.photographs import image_patches as image_patches
from jaxsae.data.rows import (
    Rows as Rows,
    fingerprint as fingerprint,
    open_rows as open_rows,
    require_finite as require_finite,
)
from jaxsae.data.synthetic import Synthetic as Synthetic, synthetic as synthetic
