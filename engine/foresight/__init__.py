"""What a search will ask for next, learnt from earlier ones: by the orchestrator of a draft's plans, by the target of its own."""
