"""Sparse autoencoders in JAX, and refinement of their codes with a certificate per row.

    x ──▶ encoder ──▶ SparseCode ──refine──▶ SparseCode ──decode──▶ x̂
                           └──── shrinkage ────┘

An `SAE` is a pytree of parameters, a `SparseCode` holds the active latents and their values, and everything else is a
pure function of the two. Packages, from the bottom up: `least_squares` (the refit and its solvers), `pursuit` and
`lasso` (selection of atoms without an encoder), `autoencoder`, `ksvd`, `formats` (files of other libraries), `train`;
beside them `data` and `language_model`.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from jaxsae._core import lazy as _lazy

if _TYPE_CHECKING:  # and on first use: importing the package imports neither JAX nor any of these
    from jaxsae import (
        app as app,
        autoencoder as autoencoder,
        codes as codes,
        data as data,
        formats as formats,
        ksvd as ksvd,
        language_model as language_model,
        lasso as lasso,
        least_squares as least_squares,
        pursuit as pursuit,
        sharding as sharding,
        train as train,
    )
    from jaxsae._core import pytrees as pytrees
    from jaxsae._core.files import InputError as InputError
    from jaxsae.autoencoder import (
        SAE as SAE,
        AbsTopK as AbsTopK,
        BatchTopK as BatchTopK,
        Gated as Gated,
        GroupMax as GroupMax,
        JumpReLU as JumpReLU,
        MatchingPursuit as MatchingPursuit,
        ReLU as ReLU,
        Shrinkage as Shrinkage,
        TopK as TopK,
        certify as certify,
        decode as decode,
        encode as encode,
        encode_dense as encode_dense,
        init as init,
        metrics as metrics,
        reconstruct as reconstruct,
        refine as refine,
        shrinkage as shrinkage,
        stream as stream,
    )
    from jaxsae.codes import SparseCode as SparseCode
    from jaxsae.formats import pretrained as pretrained
    from jaxsae.least_squares import (
        FISTA as FISTA,
        BlockPivoting as BlockPivoting,
        Certificate as Certificate,
        ConjugateGradient as ConjugateGradient,
        InteriorPoint as InteriorPoint,
        ProjectedGradient as ProjectedGradient,
        RefitInfo as RefitInfo,
        Status as Status,
        certify_gram as certify_gram,
        check as check,
        kernels as kernels,
        nnls as nnls,
        nnls_dense as nnls_dense,
        refit as refit,
        solvers as solvers,
    )

__getattr__, __dir__ = _lazy.attach(__name__, __file__)
