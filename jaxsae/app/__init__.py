"""The command `jaxsae`: its options, runs, studies, reports and pictures. The only place that prints.

`cli` runs the `commands`, `console` prints their results, `compilation_cache` keeps compiled programs, and `allocator`
freed memory. `options`, `config`, `run_data`, `start`, `runs`, `monitor` and `logs` are for `jaxsae train`: its
options, a file of them, its data, what it starts from, the training, what it shows meanwhile, and its logged metrics.
`study` runs `jaxsae study`: `sources` has its rows, `tuned` trains to an L0, `measure` refines and compares, `summary`
takes means over seeds, `plots` draws figures. `report` makes a page of a run, and `study_page` that of a study, of
`html` with `charts` of `svg`; `features_page` that of latents, which `features_page.js` shows. `features` describes
latents: `feature_codes` makes one pass over the rows, `feature_examples` reads from its codes what is said of each,
`feature_text` has the tokens and the language model. `plan` estimates what a training needs on TPUs, whose rates are in
`chips`.
"""

from typing import TYPE_CHECKING

from jaxsae._core import lazy

if TYPE_CHECKING:
    from jaxsae.app import (
        chips as chips,
        evaluation as evaluation,
        features as features,
        features_page as features_page,
        logs as logs,
        loss as loss,
        measure as measure,
        options as options,
        plan as plan,
        plots as plots,
        report as report,
        runs as runs,
        sources as sources,
        study as study,
        summary as summary,
        tuned as tuned,
        units as units,
    )

__getattr__, __dir__ = lazy.attach(__name__, __file__)
