"""Dictionary learning by k-SVD: code with the dictionary fixed, update one atom at a time, and repeat.

    minimise ‖Y − Z D‖²   over D [m d] with rows of norm 1, and Z [n m] with at most k entries per row

`learning` defines the loop, `rank_one` the update of an atom, `images` denoising and inpainting, and `image_files`
reads and writes pictures.
"""

from jaxsae.ksvd import image_files as image_files, images as images
from jaxsae.ksvd.learning import (
    History as History,
    approximate as approximate,
    exact as exact,
    fit as fit,
    mod as mod,
    replace as replace,
)
