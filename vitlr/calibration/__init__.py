"""Model and images to statistics: streaming moments of every layer."""
