"""Formats of other libraries: one module for each, with `detect`, `read`, `convert` and `write`.

    path ──detect──▶ ──read──▶ Raw: arrays and configuration as they are ──convert──▶ SAE ──write──▶ path

A format is recognised by what is in its files, not by names alone. `convert` knows the conventions of its library,
and `write` refuses what its format cannot represent. `pretrained.py` has the table of formats.
"""

from jaxsae.formats import hub as hub, pretrained as pretrained, torch_pickle as torch_pickle
