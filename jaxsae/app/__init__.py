"""The command `jaxsae`: its options, runs, studies, reports and pictures. The only place that prints.

`cli` runs the `commands`, `console` prints their results, and `compilation_cache` keeps compiled programs. `options`,
`runs` and `logs` are for `jaxsae train`: its options, the training, and its logged metrics. `study` runs `jaxsae
study`, and `plan` estimates what a training needs on TPUs. `report` makes a page of `html` with charts of `svg`, and
`plots` draws the figure of a study.
"""

from jaxsae._core import lazy

__all__ = ["logs", "options", "plan", "plots", "report", "runs", "study"]
__getattr__ = lazy.submodules(__name__, *__all__)
