"""Planner ablation: today's planner and simpler rules, by simulation."""
