"""What the user sees of a run: one line on the node, a report as JSON, a plot."""
