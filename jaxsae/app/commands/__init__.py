"""The commands, in a file for each group; to add one, write a function there and add a line to `cli.COMMANDS`.

`autoencoders` has eval, refine, convert and info; `pictures` denoise and inpaint; `plans` plan; `studies` study and
report; `texts` fetch and harvest; `training` train.
"""
