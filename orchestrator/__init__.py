"""The orchestrator service: the path of a request.

In the order of the call: server, requests, recommend (with history), request_session, model_clients, planning, search, replies.
An import contract holds the order of the packages.
"""
