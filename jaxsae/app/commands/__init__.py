"""The commands, a file for each group of them: a new one is a function there, and a line in `cli.COMMANDS`."""
