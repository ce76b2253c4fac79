"""Consumer of users' events from Kafka, which records them in a running service; needs the extra `kafka`."""
