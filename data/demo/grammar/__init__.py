"""The invented world of the demo: three domains, the facts that hold in each, and the ways to say them."""
