"""What a model has: linears, MLPs and attentions, and what stands around them."""
