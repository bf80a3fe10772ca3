"""The loss op in third-party trainers. Each module imports its library; cpo_fast imports none of
them."""
