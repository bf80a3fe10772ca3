"""What tests and benchmarks share: small models and samples, oracles, the rule on errors."""
