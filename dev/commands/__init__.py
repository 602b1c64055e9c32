"""One module a command; its name is the command's.

Each has SUMMARY (one line for the list of commands), `add_arguments(parser)` and `run(arguments, extra, progress)`,
which returns the exit status. A command that passes arguments on sets EXTRA to what they are called.
"""
