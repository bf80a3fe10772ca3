"""The rewriter: counterfactual reports along the concept graph, without a language model."""
