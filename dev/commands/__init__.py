"""One module per command, which has its name (few_steps is `few-steps`).

Each has SUMMARY (one line for the list of commands), `add_arguments(parser)` and `run(arguments, extra, progress)`,
which returns the exit status. A command that passes arguments on sets EXTRA to what they are called.
"""
