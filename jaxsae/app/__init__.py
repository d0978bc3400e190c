"""The command `jaxsae`: its options, runs, studies, reports and pictures. The only place that prints.

`cli` runs the `commands`, `console` prints their results, `compilation_cache` keeps compiled programs, and `allocator`
freed memory. `options`, `runs` and `logs` are for `jaxsae train`: its options, the training, and its logged metrics.
`study` runs `jaxsae study`, and `plan` estimates what a training needs on TPUs. `report` makes a page of `html` with
charts of `svg`, and `plots` draws the figure of a study.
"""

from typing import TYPE_CHECKING

from jaxsae._core import lazy

if TYPE_CHECKING:
    from jaxsae.app import (
        logs as logs,
        options as options,
        plan as plan,
        plots as plots,
        report as report,
        runs as runs,
        study as study,
    )

__getattr__, __dir__ = lazy.attach(__name__, __file__)
