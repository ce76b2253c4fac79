"""Consumer of users' events from Kafka, into a running service; extra `kafka`."""
