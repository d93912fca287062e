"""Networks: one file per family, and functions that build, inspect and freeze them."""
