"""Which of an operation's kernels runs, and why."""
