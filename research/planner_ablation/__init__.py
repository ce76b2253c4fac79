"""Planner ablation: today's planner and simpler rules, by simulation (docs/benchmarks/planner.md)."""
