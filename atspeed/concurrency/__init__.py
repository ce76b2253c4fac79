"""Tasks, deadlines, signals, circuit breakers and reference counts."""
