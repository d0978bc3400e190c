"""Pursuits: selection of the atoms that represent a row, without an encoder.

Each function selects at most `k` atoms per row and ends with the shared `refit`:

    y ──▶ correlations D r ──▶ support ──refit──▶ SparseCode
              ▲                   │
              └──── residual ◀────┘

`greedy` adds one atom at a time, `thresholding` revises the whole support at each step; `selection` is shared by both.
"""

from jaxsae.pursuit.atoms import Searchable as Searchable
from jaxsae.pursuit.greedy import gradient_pursuit as gradient_pursuit, matching_pursuit as matching_pursuit, omp as omp
from jaxsae.pursuit.thresholding import cosamp as cosamp, iht as iht, iti as iti, niht as niht
