"""Pursuits: they choose the atoms that represent a row when no encoder does.

Each function chooses at most `k` atoms a row and ends in the shared `refit`:

    y ──▶ correlations D r ──▶ support ──refit──▶ SparseCode
              ▲                   │
              └──── residual ◀────┘

`greedy` adds one atom after another, `thresholding` revises a whole support at a time; `selection` is what they share.
"""

from jaxsae.pursuit.greedy import gradient_pursuit as gradient_pursuit, matching_pursuit as matching_pursuit, omp as omp
from jaxsae.pursuit.thresholding import cosamp as cosamp, iht as iht, iti as iti, niht as niht
