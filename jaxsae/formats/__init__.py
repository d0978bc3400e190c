"""What other libraries save: one module a format, with `detect`, `read`, `convert` and `write`.

    path ──detect──▶ ──read──▶ Raw: arrays and configuration as they are ──convert──▶ SAE ──write──▶ path

A format is recognised by what is in its files, not by names alone. `convert` knows the conventions of its library,
and `write` refuses what its format cannot say. `pretrained.py` has the table of them.
"""

from jaxsae.formats import hub as hub, pretrained as pretrained, torch_pickle as torch_pickle
