"""Dictionary learning by k-SVD: code with the dictionary fixed, update the atoms one after another, and repeat.

    minimise ‖Y − Z D‖²   over D [m d] with rows of norm 1, and Z [n m] with at most k entries a row

`learning` has the loop, `rank_one` an atom's update, `images` denoising and inpainting,
`image_files` pictures on disk.
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
