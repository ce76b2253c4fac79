"""The target service: evaluates token trees with the target model p."""
