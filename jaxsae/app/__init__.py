"""The command `jaxsae`: its options, runs, studies, reports and pictures. The only place that prints.

`cli` runs the `commands`. `options`, `runs` and `logs` are what `jaxsae train` is asked, does and writes, `study` is
what `jaxsae study` does, `plan` says what a training takes on a TPU, `report` and `plots` show what came out.
"""

from jaxsae._core import lazy

__all__ = ["logs", "options", "plan", "plots", "report", "runs", "study"]
__getattr__ = lazy.submodules(__name__, *__all__)
