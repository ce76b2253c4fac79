"""Tasks and deadlines on the event loop."""
