"""Study of the planner: today's and simpler rules, simulated."""
