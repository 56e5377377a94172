"""What a budget costs, and where it went: one table, one figure, one page."""
